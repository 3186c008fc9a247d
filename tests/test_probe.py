"""The linear probe against scikit-learn's logistic regression, whatever the scale, the blocks and the missing classes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.probe import L2, fit_probe

COUNTS = (80, 40, 20, 5)


@pytest.fixture(scope="module")
def made():
    """Features (N, 6) of four overlapping classes far from the origin, and labels."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(4), COUNTS))
    centres = random.normal(size=(4, 6))
    return (centres[labels] + random.normal(size=(len(labels), 6)) + 3).astype(np.float32), labels


def batches(features, labels, rows=64):
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    return lambda: zip(x.split(rows), y.split(rows), strict=True)


def fitted(features, labels, *, rows=64, classes=4):
    probe = fit_probe(batches(features, labels, rows), classes=classes, width=features.shape[1])
    return probe.weight, probe.bias


def scikit_learns(features, labels, l2):
    mean, scale = features.mean(0), features.std(0)
    model = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=5000).fit((features - mean) / scale, labels)
    return lambda x: model.predict_proba((x - mean) / scale)


def test_it_is_scikit_learns_logistic_regression_of_standardised_features(made):
    features, labels = made
    probe = fit_probe(batches(features, labels), classes=4, width=6)
    logits = features @ probe.weight.T + probe.bias
    ours = np.exp(logits - logits.max(1, keepdims=True))
    expected = scikit_learns(features, labels, probe.l2)(features)
    np.testing.assert_allclose(ours / ours.sum(1, keepdims=True), expected, atol=5e-4)


def test_l2_is_the_one_that_is_best_on_validation(made):
    """Few samples in many directions, so that L2 matters; scikit-learn's fits say which is best."""
    random = np.random.default_rng(1)
    centres = 0.5 * random.normal(size=(4, 30))
    labels, truth = np.repeat(np.arange(4), 15), np.repeat(np.arange(4), (400, 300, 200, 100))
    x, held_out = ((centres[y] + random.normal(size=(len(y), 30))).astype(np.float32) for y in (labels, truth))
    probe = fit_probe(batches(x, labels), classes=4, width=30, validation=batches(held_out, truth))
    expected = {}
    for l2 in L2:
        right = scikit_learns(x, labels, l2)(held_out).argmax(1) == truth
        expected[l2] = 100 * np.mean([right[truth == c].mean() for c in range(4)])
    assert probe.accuracies == pytest.approx(expected, abs=0.5)
    assert expected[probe.l2] >= max(expected.values()) - 0.5
    assert probe.l2 == max(probe.accuracies, key=probe.accuracies.get) > L2[0]
    assert probe.chosen_on == "validation"
    assert f"L2 {probe.l2:g}, chosen on validation" in str(probe)


def test_without_validation_folds_of_the_training_samples_decide_and_each_predicts_rows_it_was_not_fitted_on():
    random = np.random.default_rng(2)
    labels = np.repeat(np.arange(3), (30, 12, 1))
    noise = random.normal(size=(len(labels), 60)).astype(np.float32)  # nothing to learn: only memory could be right
    probe = fit_probe(batches(noise, labels), classes=3, width=60)
    assert probe.chosen_on == "folds"
    assert max(probe.accuracies.values()) < 75  # two classes at chance, the class of one sample is in no fold
    shuffled = random.permutation(len(labels))
    again = fit_probe(batches(noise[shuffled], labels[shuffled]), classes=3, width=60)
    assert again.chosen_on == "folds"
    alone = fit_probe(batches(noise[[0, 30, 42]], labels[[0, 30, 42]]), classes=3, width=60)
    assert (alone.chosen_on, alone.accuracies) == ("nothing", {})


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_features_changes_nothing_in_the_logits(made, scale):
    features, labels = made
    weight, bias = fitted(features, labels)
    other, shift = fitted(features * np.float32(scale), labels)
    np.testing.assert_allclose(features * scale @ other.T + shift, features @ weight.T + bias, atol=0.02)


def test_blocks_only_round_and_the_same_blocks_give_the_same_bytes(made):
    features, labels = made
    first, again, other = (fitted(features, labels, rows=rows) for rows in (64, 64, 7))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=0.02)


def test_a_class_without_rows_and_features_that_say_nothing_give_finite_numbers(made):
    features, labels = made
    weight, bias = fitted(features, labels, classes=5)
    assert (features @ weight.T + bias).argmax(1).max() < 4
    weight, bias = fitted(np.ones_like(features), labels)
    assert (np.isfinite(weight).all(), int(bias.argmax())) == (True, 0)


def test_it_can_be_stopped(made):
    def stop():
        raise KeyboardInterrupt

    features, labels = (torch.from_numpy(a) for a in made)
    with pytest.raises(KeyboardInterrupt):
        fit_probe(lambda: [(features, labels)], classes=4, width=6, stop=stop)
