"""The readable objective against values and gradients derived by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.longtail import class_balanced_weights
from pipeline.rebalance.engine.objective import (
    Penalty,
    hardness_coefficient,
    iwb_objective,
    norm_penalty,
    number_coefficient,
    penalty,
)

WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)  # norms 5, 2, 1
BIAS = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
FEATURES = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])
COUNTS = torch.tensor([7.0, 5.0, 3.0], dtype=torch.float64)  # N = 15
PAPER = Penalty()


def softmax(values):
    e = np.exp(values)
    return e / e.sum(-1, keepdims=True)


def by_hand(lam, rule):
    """(P, s, q) with cosines worked out on paper: x₀ is W₀'s direction, x₁ is −W₁'s."""
    cosine = np.array([[1, 0.8, -0.6], [-0.8, -1, 0]])
    hc = {"vector": (1 - cosine) / 2, "scalar": np.array([[0.0], [0.5]]), "none": np.ones((2, 1))}[rule.hardness]
    nc = np.log([15 / 8, 15 / 6, 15 / 4]) / (math.log(2) if rule.log_base == "2" else 1)
    p = lam * (nc if rule.number else np.ones(3)) * hc
    return p, softmax(np.array([5.0, 2, 1])), softmax(p)


@pytest.mark.parametrize("hardness", ["vector", "scalar", "none"])
@pytest.mark.parametrize("number", [True, False])
@pytest.mark.parametrize("log_base", ["2", "e"])
def test_divergences_by_hand(hardness, number, log_base):
    rule = Penalty(hardness=hardness, number=number, log_base=log_base)
    p, s, q = by_hand(0.7, rule)
    value = norm_penalty(WEIGHT, FEATURES, LABELS, COUNTS, 0.7, rule)
    assert float(value) == pytest.approx((s * np.log(s / q)).sum(1).mean(), rel=1e-13)
    turned = penalty("paper", hardness=hardness, number=number, log_base=log_base, direction="target-to-norms")
    value = norm_penalty(WEIGHT, FEATURES, LABELS, COUNTS, 0.7, turned)
    assert float(value) == pytest.approx((q * np.log(q / s)).sum(1).mean(), rel=1e-13)
    raw = penalty("paper", hardness=hardness, number=number, log_base=log_base, divergence="mse")
    value = norm_penalty(WEIGHT, FEATURES, LABELS, COUNTS, 0.7, raw)
    assert float(value) == pytest.approx(((np.array([5, 2, 1]) - p) ** 2).mean(), rel=1e-13)


def gradient_of_norms(weight, lam, rule):
    """∂penalty/∂n_c: the part of the gradient along each class vector."""
    weight = weight.clone().requires_grad_()
    norm_penalty(weight, FEATURES, LABELS, COUNTS, lam, rule).backward()
    return (weight.grad * weight.detach() / weight.detach().norm(dim=1, keepdim=True)).sum(1).numpy()


def test_gradient_of_the_norms_in_both_directions():
    _, s, q = by_hand(0.7, PAPER)
    kl = (s * np.log(s / q)).sum(1, keepdims=True)
    expected = (s * (np.log(s) - np.log(q) - kl)).mean(0)
    np.testing.assert_allclose(gradient_of_norms(WEIGHT, 0.7, PAPER), expected, rtol=1e-12)
    turned = Penalty(direction="target-to-norms")
    np.testing.assert_allclose(gradient_of_norms(WEIGHT, 0.7, turned), (s - q).mean(0), rtol=1e-12)


def test_at_the_optimum_norms_differ_as_the_mean_target_does():
    unit = WEIGHT / WEIGHT.norm(dim=1, keepdim=True)
    p, _, q = by_hand(0.7, PAPER)  # cosines do not depend on the lengths
    paper = unit * torch.tensor(p.mean(0) + 2)[:, None]
    np.testing.assert_allclose(gradient_of_norms(paper, 0.7, PAPER), 0, atol=1e-15)
    code = unit * torch.tensor(np.log(q.mean(0)) + 4)[:, None]
    np.testing.assert_allclose(gradient_of_norms(code, 0.7, Penalty(direction="target-to-norms")), 0, atol=1e-15)
    assert np.abs(gradient_of_norms(paper, 0.5, PAPER)).max() > 1e-3


def test_the_gradient_through_the_target():
    """∂P_ic/∂W_c = −λ·NC_c/2·(x̂_i − g_ic·Ŵ_c)/n_c comes in when the target is not detached, and ∂KL/∂P = (q − s)/B."""
    live = Penalty(detach_target=False)
    grads = []
    for rule in (PAPER, live):
        weight = WEIGHT.clone().requires_grad_()
        norm_penalty(weight, FEATURES, LABELS, COUNTS, 0.7, rule).backward()
        grads.append(weight.grad.numpy())
    _, s, q = by_hand(0.7, live)
    nc = np.log2([15 / 8, 15 / 6, 15 / 4])
    x = np.array([[0.6, 0.8], [0, -1]])
    w = np.array([[0.6, 0.8], [0, 1], [-1, 0]])
    g, n = x @ w.T, np.array([5.0, 2, 1])
    through = -0.7 * nc / 2 * (q - s) / 2 / n
    expected = np.einsum("ic,id->cd", through, x) - np.einsum("ic,ic,cd->cd", through, g, w)
    np.testing.assert_allclose(grads[1] - grads[0], expected, rtol=1e-11, atol=1e-14)


def objective(**switches):
    lam = switches.pop("lam", 0.0)
    return iwb_objective(WEIGHT, BIAS, FEATURES, LABELS, COUNTS, lam, **switches)


def test_classification_losses_by_hand():
    z = np.array([[25.1, 7.8, -2.7], [-7.9, -4.2, 0.3]])
    p = softmax(z)
    ce = -np.log([p[0, 0], p[1, 2]])
    v = class_balanced_weights(COUNTS, beta=0.9).numpy()[[0, 2]]
    assert objective(cb=None, kl_weight=0.0).item() == pytest.approx(ce.mean(), rel=1e-9)
    assert objective(cb="softmax", kl_weight=0.0, beta=0.9).item() == pytest.approx((v * ce).sum() / v.sum(), rel=1e-9)
    others = np.array([np.log(1 - p[0, [1, 2]]).sum(), np.log(1 - p[1, [0, 1]]).sum()])
    bce = (v * (ce - others)).sum() / 2
    assert objective(cb="bce", kl_weight=0.0, beta=0.9).item() == pytest.approx(bce, rel=1e-9)


def test_the_kl_term_is_weighed_and_summed_over_the_batch():
    without = objective(kl_weight=0.0, lam=0.4)
    term = norm_penalty(WEIGHT, FEATURES, LABELS, COUNTS, 0.4, PAPER)
    assert objective(lam=0.4).item() == pytest.approx((without + term).item(), rel=1e-14)
    assert objective(lam=0.4, kl_weight=0.25).item() == pytest.approx((without + 0.25 * term).item(), rel=1e-14)
    assert objective(lam=0.4, kl_weight="batch").item() == pytest.approx((without + 2 * term).item(), rel=1e-14)


def test_formulations_are_presets_of_the_switches():
    spelled = {"log_base": "e", "direction": "target-to-norms", "kl_weight": "batch", "detach_target": False}
    assert objective(lam=0.4, formulation="code", cb="bce").item() == objective(lam=0.4, cb="bce", **spelled).item()
    assert objective(lam=0.4, formulation="code").item() != objective(lam=0.4).item()
    assert penalty("code", kl_weight=1.0).kl_weight == 1.0


def test_base_two_is_base_e_with_lambda_divided_by_ln_2():
    assert objective(lam=0.15).item() == pytest.approx(
        objective(lam=0.15 / math.log(2), log_base="e").item(), rel=1e-14
    )


def test_lambda_zero_is_a_uniform_target_not_the_loss_alone():
    _, s, _ = by_hand(0.0, PAPER)
    uniform = math.log(3) + (s * np.log(s)).sum()
    assert (objective() - objective(kl_weight=0.0)).item() == pytest.approx(uniform, rel=1e-12)


def test_double_in_double_out_and_single_in_single_out():
    assert objective().dtype == torch.float64
    singles = [t.float() for t in (WEIGHT, BIAS, FEATURES)]
    assert iwb_objective(*singles, LABELS, COUNTS.numpy(), 0.1).dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 10**6))
def test_divergences_are_never_negative_and_ignore_the_length_of_features(classes, batch, lam, seed):
    random = np.random.default_rng(seed)
    weight = torch.tensor(random.normal(size=(classes, 4)))
    features = torch.tensor(random.normal(size=(batch, 4)))
    labels = torch.tensor(random.integers(0, classes, batch))
    counts = torch.tensor(random.integers(1, 500, classes), dtype=torch.float64)
    for rule in (
        Penalty(),
        Penalty(direction="target-to-norms"),
        Penalty(hardness="scalar"),
        Penalty(divergence="mse"),
    ):
        value = norm_penalty(weight, features, labels, counts, lam, rule)
        assert value >= -1e-12
        longer = norm_penalty(weight, features * 7, labels, counts, lam, rule)
        assert float(longer) == pytest.approx(float(value), rel=1e-9, abs=1e-12)
    hc = hardness_coefficient(weight, features, labels)
    assert ((hc >= -1e-12) & (hc <= 1 + 1e-12)).all()
    assert (number_coefficient(counts).argsort() == (-counts).argsort()).all() or len(set(counts.tolist())) < classes


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"formulation": "papr"}, "did you mean paper"),
        ({"hardness": "matrix"}, "hardness 'matrix'"),
        ({"kl_weight": -1.0}, "kl_weight -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight nan"),
        ({"cb": "focal"}, "cb 'focal'"),
        ({"direction": "up"}, "direction 'up'"),
    ],
)
def test_unknown_switches_are_named(switches, said):
    with pytest.raises(ConfigError, match=said):
        objective(**switches)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="do not fit together"):
        iwb_objective(WEIGHT, BIAS, FEATURES[:, :1], LABELS, COUNTS, 0.1)
    with pytest.raises(ConfigError, match="2 counts"):
        iwb_objective(WEIGHT, BIAS, FEATURES, LABELS, COUNTS[:2], 0.1)
