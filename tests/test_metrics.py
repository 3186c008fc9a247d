"""Measures worked out by hand."""

import numpy as np
import pytest

from pipeline.longtail import class_groups
from pipeline.metrics import confusion, expected_calibration_error, group_means, scarce, scores

COUNTS = np.array([500, 101, 100, 20, 19, 1])


def logits_for(predicted, confidence, classes=6):
    """Logits whose softmax gives `confidence` to the predicted class and the rest to the others evenly."""
    p = np.full((len(predicted), classes), 0.0)
    p += ((1 - np.asarray(confidence)) / (classes - 1))[:, None]
    p[np.arange(len(predicted)), predicted] = confidence
    return np.log(p) + 3.0


def test_groups_at_their_borders():
    groups = class_groups(COUNTS)
    assert [int(g.sum()) for g in groups.values()] == [2, 2, 2]
    assert groups["many"].tolist() == [True, True, False, False, False, False]
    assert groups["few"].tolist() == [False, False, False, False, True, True]


def test_a_group_is_the_mean_of_its_classes_not_of_its_samples():
    labels = np.array([0] * 8 + [1] * 2 + [2, 3, 4, 5])
    predicted = np.array([0] * 8 + [0, 1] + [2, 0, 4, 4])
    found = scores(logits_for(predicted, np.full(14, 0.9)), labels, COUNTS)
    assert found.per_class.tolist() == [1, 0.5, 1, 0, 1, 0]
    summary = {k: v for k, v in found.summary.items() if k != "ece"}
    assert summary == pytest.approx({"all": 350 / 6, "many": 75, "medium": 50, "few": 50})
    assert found.correct.tolist() == [8, 1, 1, 0, 1, 0]
    assert found.total.tolist() == [8, 2, 1, 1, 1, 1]


def test_absent_classes_are_left_out_and_an_empty_group_is_none():
    found = scores(logits_for([0, 2], [0.9, 0.9]), np.array([0, 3]), COUNTS)
    assert found.summary["all"] == 50
    assert found.summary["many"] == 100
    assert found.summary["few"] is None
    assert np.isnan(found.per_class[1])
    assert group_means(np.full(6, np.nan), COUNTS)["all"] is None


def test_calibration_error_by_hand():
    # bins of 1/15: .95 and .97 fall in the last (14/15 … 1), .5 in another
    confidence, hit = np.array([0.95, 0.97, 0.5]), np.array([True, False, True])
    expected = (abs(1 - (0.95 + 0.97)) + abs(1 - 0.5)) / 3
    assert expected_calibration_error(confidence, hit) == pytest.approx(100 * expected)
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    same = expected_calibration_error(np.array([0.88, 0.92]), np.array([True, False]))  # both in 13/15 … 14/15
    assert same == pytest.approx(100 * 0.8 / 2)
    edge = np.array([0.2, 0.21])  # 3/15 belongs to the third bin, .21 to the fourth: gaps do not cancel
    assert expected_calibration_error(edge, np.array([True, False])) == pytest.approx(100 * (0.8 + 0.21) / 2)


def test_calibration_error_comes_from_the_softmax():
    predicted, labels = np.zeros(4, int), np.array([0, 0, 0, 1])
    assert scores(logits_for(predicted, np.full(4, 0.9)), labels, COUNTS).ece == pytest.approx(15)


def test_standard_error_by_hand():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    found = scores(logits_for(predicted, np.full(6, 0.9)), labels, COUNTS)
    assert found.standard_error == pytest.approx(100 * np.sqrt(0.5 * 0.5 / (4 - 1)) / 2)


def test_confusion_has_the_truth_in_rows():
    table = confusion(np.array([1, 1, 0]), np.array([0, 1, 2]), 3)
    assert table.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_groups_that_rest_on_few_test_samples_are_told():
    counts = np.array([200, 150, 50, 10, 5])
    labels = np.repeat(np.arange(5), [40, 40, 30, 4, 3])
    assert scarce(labels, counts) == [
        "few rests on 7 test image(s) of 2 class(es): its differences and their intervals mean little"
    ]
    assert scarce(labels[labels < 4], counts) == [
        "few rests on 4 test image(s) of 1 class(es): its differences and their intervals mean little"
    ]
    assert scarce(labels[labels < 3], counts) == []  # a group without any has no difference either
