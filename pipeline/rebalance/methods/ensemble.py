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

    The loss is convex in 1/T, so the root of its derivative is found by bisection of ln T.
    """
    logits, share = logits.double(), class_shares(labels, logits.shape[1])
    true_logit = logits.gather(1, labels[:, None]).squeeze(1)
    low, high = -6.9, 6.9
    for _ in range(40):
        middle = (low + high) / 2
        expected = ((logits * math.exp(-middle)).softmax(1) * logits).sum(1)
        # a positive derivative in 1/T says that 1/T is too large
        low, high = (middle, high) if float((share * (expected - true_logit)).sum()) > 0 else (low, middle)
    return float(math.exp((low + high) / 2))


def balanced_accuracy(correct: Tensor, labels: Tensor, classes: int) -> tuple[float, float]:
    """Return the mean over classes of their accuracy in 0…1, and its standard error √(Σ p(1−p)/(n−1)) / C.

    A class with one sample has no variance to estimate; it takes the mean of the others.

    Arguments:
        correct: (M,) booleans.
    """
    number = torch.bincount(labels, minlength=classes).double()
    hits = torch.bincount(labels, weights=correct.double(), minlength=classes)
    present = number > 0
    p, n = hits[present] / number[present], number[present]
    repeated = n > 1
    variance = torch.where(repeated, p * (1 - p) / (n - 1).clamp_min(1), 0.0)
    if repeated.any():
        variance = torch.where(repeated, variance, (p * (1 - p))[repeated].mean())
    return float(p.mean()), float(variance.sum().sqrt() / present.sum())


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


def within_one_error(accuracies: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Return the members whose accuracy is at most one standard error of the best below it, the best first."""
    order = sorted(range(len(accuracies)), key=lambda i: -accuracies[i])
    return [i for i in order if accuracies[i] >= accuracies[order[0]] - errors[order[0]]]


def stacking_shares(logits: Tensor, labels: Tensor, *, pseudo_samples: float = PSEUDO_SAMPLES) -> Tensor:
    """Return the shares a (K,) of members that minimise the balanced NLL of s·Σ a_m z_m, held towards equal ones.

    The loss adds κ/M·KL(equal ‖ a), as if κ of the M samples asked for equal shares; the scale s > 0 is free.

    Arguments:
        logits: (K, M, C) of the members, each divided by its temperature.
        labels: (M,).
        pseudo_samples: κ.
    """
    logits = logits.double()
    share = class_shares(labels, logits.shape[2])
    log_share = torch.zeros(len(logits), dtype=torch.float64, device=logits.device, requires_grad=True)
    log_scale = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    solver = torch.optim.LBFGS([log_share, log_scale], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        mixed = torch.einsum("k,kmc->mc", log_share.softmax(0), logits) * log_scale.exp()
        fit = (share * (mixed.logsumexp(1) - mixed.gather(1, labels[:, None]).squeeze(1))).sum()
        loss = fit - pseudo_samples / len(labels) * log_share.log_softmax(0).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return log_share.detach().softmax(0)
