"""Target values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from pipeline.longtail import class_balanced_weights
from pipeline.rebalance.engine.objective import (
    cosines,
    hardness_coefficient,
    number_coefficient,
    target,
)


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_number_coefficient_by_hand():
    counts = f64(7, 3, 1, 5)  # N = 16: 16/8, 16/4, 16/2, 16/6
    np.testing.assert_allclose(number_coefficient(counts), [1, 2, 3, math.log2(16 / 6)], rtol=1e-15)
    np.testing.assert_allclose(number_coefficient(counts, log_base="e"), np.log([2, 4, 8, 16 / 6]), rtol=1e-15)


def test_number_coefficient_of_cifar100_lt():
    counts = torch.tensor([int(500 * 100 ** (-c / 99)) for c in range(100)], dtype=torch.float64)
    assert counts.sum() == 10_847
    assert [round(float(v), 2) for v in number_coefficient(counts, log_base="e")[[0, 99]]] == [3.08, 7.5]
    assert [round(float(v), 2) for v in number_coefficient(counts)[[0, 99]]] == [4.44, 10.82]


def test_hardness_by_hand():
    weight, features, labels = f64([1, 0], [0, 2], [-3, 0]), f64([3, 4], [0, -5]), torch.tensor([1, 0])
    expected = [[0.6, 0.8, -0.6], [0, -1, 0]]
    np.testing.assert_allclose(cosines(weight, features), expected, atol=1e-15)
    vector = hardness_coefficient(weight, features, labels)
    np.testing.assert_allclose(vector, [[0.2, 0.1, 0.8], [0.5, 1, 0.5]], atol=1e-15)
    scalar = hardness_coefficient(weight, features, labels, hardness="scalar")
    np.testing.assert_allclose(scalar, [[0.1], [0.5]], atol=1e-15)
    assert hardness_coefficient(weight, features, labels, hardness="none").tolist() == [[1]]


def test_a_zero_feature_has_no_direction():
    assert cosines(f64([1, 0]), f64([0, 0])).tolist() == [[0]]
    assert cosines(f64([0, 0]), f64([1, 0])).tolist() == [[0]]


def test_target_by_hand():
    np.testing.assert_allclose(target(f64(1, 2), f64([0.2, 0.1]), 0.5), [[0.1, 0.1]], rtol=1e-15)


def test_class_balanced_weights_by_hand():
    np.testing.assert_allclose(class_balanced_weights(f64(1, 2), beta=0.5), [1.2, 0.8], rtol=1e-14)
    assert class_balanced_weights(f64(3, 900), beta=0).tolist() == [1, 1]


@pytest.mark.parametrize("counts", [(500, 5), (1_000_000, 1)])
def test_class_balanced_weights_sum_to_the_classes_and_follow_cui(counts):
    v = class_balanced_weights(f64(*counts))
    assert float(v.sum()) == pytest.approx(2, rel=1e-14)
    cui = [(1 - 0.9999) / (1 - 0.9999**n) for n in counts]
    assert float(v[1] / v[0]) == pytest.approx(cui[1] / cui[0], rel=1e-9)
