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


def fitted(features, labels, *, rows=64, classes=4):
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    return fit_probe(lambda: zip(x.split(rows), y.split(rows), strict=True), classes=classes, width=x.shape[1])


def test_it_is_scikit_learns_logistic_regression_of_scaled_features(made):
    features, labels = made
    weight, bias = fitted(features, labels)
    mean = features.mean(0)
    scaled = (features - mean) / np.sqrt(((features - mean) ** 2).mean())
    reference = LogisticRegression(C=1 / (L2 * len(labels)), tol=1e-8, max_iter=2000).fit(scaled, labels)
    logits = features @ weight.T + bias
    ours = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(ours / ours.sum(1, keepdims=True), reference.predict_proba(scaled), atol=3e-3)


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
