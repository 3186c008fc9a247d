"""An ensemble of linear heads, folded into one linear layer.

Each member's logits are divided by its temperature and centred over classes, which changes no probability, and averaged:
W̄ = Σ_m a_m·W_m/T_m. The mean of linear layers is one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PSEUDO_SAMPLES = 3.0  # of 3, 10, 30, 100 the best by two-fold comparison of validation images over six stores
Layer = tuple[Tensor, Tensor]  # weight (C, D), bias (C,)


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Return the weight (M,) of each sample that gives every class among them the same say; they sum to 1."""
    number = torch.bincount(labels, minlength=classes).double()
    return 1 / (number[labels] * (number > 0).sum())


def balanced_nll(logits: Tensor, labels: Tensor, inverse_temperature: float = 1.0) -> float:
    """Return the mean over classes of −ln of the probability of the true class, for logits (M, C)."""
    z = inverse_temperature * logits.double()
    loss = z.logsumexp(1) - z.gather(1, labels[:, None]).squeeze(1)
    return float((class_shares(labels, logits.shape[1]) * loss).sum())


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Return T > 0 with the smallest balanced NLL of logits / T (Guo et al., ICML 2017), within 0.001…1000.

    The loss is convex in 1/T, so the root of its derivative is found by Newton's method, kept inside a bracket.
    """
    share = class_shares(labels, logits.shape[1]).to(logits)
    centred = logits - logits.gather(1, labels[:, None])  # less the true class: softmax does not see it
    low, high, inverse = 1e-3, 1e3, 1.0
    for _ in range(40):
        probability = (inverse * centred).softmax(1)
        mean = (probability * centred).sum(1)
        slope = float((share * mean).sum())
        curvature = float((share * ((probability * centred.square()).sum(1) - mean.square())).sum())
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - inverse) <= 1e-5 * inverse:
            break
        inverse = following
    return 1 / inverse


def fold(members: Sequence[Layer], temperatures: Sequence[float], shares: Sequence[float] | None = None) -> Layer:
    """Return Σ a_m·(W_m, b_m)/T_m centred over classes, in float64.

    Arguments:
        shares: a_m, equal by default; they are scaled to sum to 1.
    """
    a = (
        torch.ones(len(members), dtype=torch.float64)
        if shares is None
        else torch.as_tensor(shares, dtype=torch.float64)
    )
    factors = a / a.sum() / torch.as_tensor(temperatures, dtype=torch.float64)
    weight = sum(float(f) * w.double() for f, (w, _) in zip(factors, members, strict=True))
    bias = sum(float(f) * b.double() for f, (_, b) in zip(factors, members, strict=True))
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return weight - weight.mean(0), bias - bias.mean()


def stacking_shares(logits: Tensor, labels: Tensor, *, pseudo_samples: float = PSEUDO_SAMPLES) -> Tensor:
    """Return the shares a (K,) of members that minimise the balanced NLL of s·Σ a_m z_m, held towards equal ones.

    The loss adds κ/M·KL(equal ‖ a), as if κ of the M samples asked for equal shares; the scale s > 0 is free. It is minimised
    over θ = ln(s·a) by Newton's method with backtracking.

    Arguments:
        logits: (K, M, C) of the members, each divided by its temperature.
        labels: (M,).
        pseudo_samples: κ.
    """
    members, number, classes = logits.shape
    z = (logits - logits.gather(2, labels.expand(members, -1)[..., None])).double()  # less the true class
    weight, prior = class_shares(labels, classes), pseudo_samples / number
    theta = torch.full((members,), -math.log(members), dtype=torch.float64, device=z.device)

    def loss(theta: Tensor) -> Tensor:
        mixed = torch.einsum("k,kmc->mc", theta.exp(), z)
        return weight @ mixed.logsumexp(1) - prior * theta.log_softmax(0).mean()

    value = loss(theta)
    for _ in range(50):
        scale, share = theta.exp(), theta.softmax(0)
        probability = torch.einsum("k,kmc->mc", scale, z).softmax(1)
        expected = (probability * z).sum(2)
        slope = scale * (expected @ weight)
        weighted = (weight[:, None] * probability).flatten()
        square = (z.flatten(1) * weighted) @ z.flatten(1).T - (expected * weight) @ expected.T
        gradient = slope + prior * (share - 1 / members)
        curvature = scale[:, None] * square * scale + torch.diag(slope.clamp_min(0) + 1e-9)
        curvature += prior * (torch.diag(share) - share[:, None] * share)
        step = torch.linalg.solve(curvature, gradient).clamp(-2, 2)
        length = 1.0
        while length > 1e-6 and (new := loss(theta - length * step)) > value - 1e-4 * length * gradient @ step:
            length /= 2
        if length <= 1e-6 or value - new < 1e-9:
            break
        theta, value = theta - length * step, new
    return theta.softmax(0)
