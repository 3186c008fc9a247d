"""The formulas of the rivals against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from pipeline.longtail import inverse_prior_weights, ldam_margins
from pipeline.rebalance.methods import losses
from pipeline.rebalance.methods.api import Stage1
from pipeline.rebalance.methods.training_free import iif, logit_adjust, nearest_mean, tau_norm

COUNTS = torch.tensor([80.0, 15.0, 5.0], dtype=torch.float64)
GIVEN = Stage1(
    COUNTS,
    torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64),
    torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64),
    length=2.0,
)
HALF = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)  # probabilities 1/8, 2/8, 5/8
CHORD = torch.tensor([[0.6, 0.8, -0.2]], dtype=torch.float64)


def label(c):
    return torch.tensor([c])


def test_focal_is_cross_entropy_less_of_what_is_sure():
    assert losses.focal(HALF, label(2), 0).item() == pytest.approx(-math.log(5 / 8))
    assert losses.focal(HALF, label(2), 2).item() == pytest.approx((3 / 8) ** 2 * -math.log(5 / 8))
    assert losses.focal(HALF, label(0), 1.5).item() == pytest.approx((7 / 8) ** 1.5 * math.log(8))


def test_a_sure_answer_has_a_finite_focal_gradient():
    logits = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    losses.focal(logits, label(0), torch.tensor([[0.5]])).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_the_prior_inside_the_softmax():
    weights = np.array([1, 2, 5]) * np.array([0.8, 0.15, 0.05])
    value = losses.cross_entropy(losses.with_prior(HALF, GIVEN, 1.0), label(1)).item()
    assert value == pytest.approx(-math.log(weights[1] / weights.sum()))
    assert losses.with_prior(HALF, GIVEN, 0.0).equal(HALF)


def test_weights_by_prior_have_mean_one():
    found = inverse_prior_weights(GIVEN.counts, 1.2)
    assert found.mean().item() == pytest.approx(1)
    assert (found[2] / found[0]).item() == pytest.approx(16**1.2)
    per_trial = inverse_prior_weights(GIVEN.counts, torch.tensor([[0.0], [1.2]], dtype=torch.float64))
    torch.testing.assert_close(per_trial[1], found)
    assert per_trial[0].tolist() == pytest.approx([1, 1, 1])


def test_ldam():
    margins = ldam_margins(GIVEN.counts, 0.5)
    assert margins.tolist() == pytest.approx([0.5 * 0.5, 0.5 * (1 / 3) ** 0.25, 0.5])
    z = np.array([6.0, 8.0, -2.0])
    z[0] -= 10 * 0.25
    expected = -z[0] + math.log(np.exp(z).sum())
    assert losses.ldam(CHORD, label(0), margins, 10.0).item() == pytest.approx(expected)


def test_adaptive_adjustment_takes_hardness_as_fixed():
    quantity = math.log(2) / math.log(80 / 5 + 1)
    z = np.array([6.0, 8.0, -2.0])
    z[0] -= 10 * (1 - 0.6) / 2 * quantity
    cosines = CHORD.clone().requires_grad_()
    loss = losses.adaptive_adjustment(cosines, label(0), GIVEN, 10.0)
    assert loss.item() == pytest.approx(-z[0] + math.log(np.exp(z).sum()))
    loss.sum().backward()
    p = np.exp(z) / np.exp(z).sum()
    assert cosines.grad[0].tolist() == pytest.approx([10 * (p[0] - 1), 10 * p[1], 10 * p[2]])
    rarest = losses.adaptive_adjustment(CHORD, label(2), GIVEN, 1.0).item()
    z = np.array([0.6, 0.8, -0.2 - (1 + 0.2) / 2])
    assert rarest == pytest.approx(-z[2] + math.log(np.exp(z).sum()))


def test_label_aware_smoothing():
    epsilon = losses.smoothing(GIVEN, 0.4, 0.1)
    assert epsilon.tolist() == pytest.approx([0.4, 0.1 + 0.3 * math.sin(math.pi / 2 * 10 / 75), 0.1])
    log_p = np.log([1 / 8, 2 / 8, 5 / 8])
    expected = -(0.6 * log_p[0] + 0.2 * log_p[1] + 0.2 * log_p[2])
    assert losses.smoothed_cross_entropy(HALF, label(0), epsilon).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("variant", "first"),
    [("smooth", math.log(101 / 81) + 1), ("raw", math.log(100 / 80)), ("relative", math.log(20 / 80))],
)
def test_inverse_image_frequency(variant, first):
    assert losses.inverse_image_frequency(GIVEN, variant)[0].item() == pytest.approx(first)
    weight, bias = iif(GIVEN, None, {"variant": variant})
    assert (weight[0] / GIVEN.weight[0]).tolist() == pytest.approx([first, first])
    assert (bias[0] / GIVEN.bias[0]).item() == pytest.approx(first)


def test_norms():
    assert GIVEN.norms.tolist() == [5, 1, 2]
    assert losses.norm_threshold(GIVEN) == pytest.approx(1 + 0.1 * 4)
    weight, bias = tau_norm(GIVEN, None, {"tau": 1.0, "bias": "dropped"})
    assert weight.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert bias.tolist() == [0, 0, 0]
    weight, bias = tau_norm(GIVEN, None, {"tau": 0.5, "bias": "kept"})
    assert weight[0].tolist() == pytest.approx([3 / math.sqrt(5), 4 / math.sqrt(5)])
    assert bias.tolist() == GIVEN.bias.tolist()


def test_logit_adjustment():
    weight, bias = logit_adjust(GIVEN, None, {"tau": 2.0, "form": "additive"})
    assert weight.equal(GIVEN.weight)
    assert bias[1].item() == pytest.approx(0 - 2 * math.log(0.15))
    weight, bias = logit_adjust(GIVEN, None, {"tau": 0.5, "form": "multiplicative"})
    assert weight[1].tolist() == pytest.approx([0.15**-0.5, 0])
    assert bias[2].item() == pytest.approx(-0.5 * 0.05**-0.5)


def test_the_nearest_mean_is_decided_by_a_linear_head():
    random = np.random.default_rng(0)
    y = torch.as_tensor(np.repeat(np.arange(3), [40, 30, 20]))
    x = torch.as_tensor(random.normal(size=(3, 2))[y] + random.normal(size=(90, 2)) + 5)
    weight, bias = nearest_mean(GIVEN, lambda: iter([(x[:50], y[:50]), (x[50:], y[50:])]), {})
    seen = (x - x.mean(0)).numpy()
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    means = np.array([seen[y == c].mean(0) for c in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    distance = ((seen[:, None] - means) ** 2).sum(-1)
    assert (x @ weight.T + bias).argmax(1).tolist() == distance.argmin(1).tolist()


def test_cosines_do_not_depend_on_lengths():
    x = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(losses.cosine(x, GIVEN.weight)[0], torch.tensor([0.6, 1, 0], dtype=torch.float64))
    assert losses.cosine(x, GIVEN.weight)[1].tolist() == [0, 0, 0]
