"""The formulas of the trained methods as pure functions: losses of samples, class weights, cosines.

Shapes: logits (…, B, C), labels (…, B), anything per class (…, C), a hyperparameter a float or (T, 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.rebalance.methods.api import Stage1


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return logits of features (…, B, D); with trials, x is (S, 1, B, D) and weight (S, T, C, D)."""
    if weight.dim() < 4:
        return x @ weight.mT + bias[..., None, :]
    together = x.squeeze(1) @ weight.flatten(1, 2).mT  # one product for all trials of a batch order
    return together.unflatten(-1, weight.shape[1:3]).transpose(1, 2) + bias[..., None, :]


def cosine(x: Tensor, weight: Tensor) -> Tensor:
    """Return the cosines (…, B, C) between features and class vectors."""
    tiny = torch.finfo(weight.dtype).tiny
    unit = weight / weight.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return linear(x / x.norm(dim=-1, keepdim=True).clamp_min(tiny), unit, weight.new_zeros(weight.shape[:-1]))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −ln p_y of every sample."""
    return -at(logits.log_softmax(-1), labels)


def focal(logits: Tensor, labels: Tensor, gamma: float | Tensor) -> Tensor:
    """Return (1 − p_y)^γ·(−ln p_y). [Lin et al., ICCV 2017]"""
    surprise = cross_entropy(logits, labels)
    return (-torch.expm1(-surprise)).clamp_min(torch.finfo(logits.dtype).eps) ** gamma * surprise


def with_prior(logits: Tensor, stage1: Stage1, tau: float | Tensor) -> Tensor:
    """Return z_c + τ·ln π_c. [Ren et al., NeurIPS 2020; Menon et al., ICLR 2021, Eq. 10]"""
    return logits + (tau * stage1.log_prior)[..., None, :]


def ldam(cosines: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Return the cross-entropy of s·cos with s·(cos − m_y) for the true class. [Cao et al.]"""
    of_sample = margins.expand(*cosines.shape[:-2], margins.shape[-1]).gather(-1, _like(labels, cosines))
    return cross_entropy(scale * _less_at(cosines, labels, of_sample), labels)


def adaptive_adjustment(cosines: Tensor, labels: Tensor, stage1: Stage1, scale: float) -> Tensor:
    """Return the cross-entropy of s·cos with s·(cos_y − HC_y·Q_y) for the true class: HC = (1 − cos_y)/2 held fixed,
    Q_c = ln 2 / ln(N_c/N_min + 1). [Zhao et al., AAAI 2022]
    """
    quantity = math.log(2) / (stage1.counts / stage1.counts.min() + 1).log()
    difficulty = (1 - at(cosines, labels).detach()) / 2
    return cross_entropy(scale * _less_at(cosines, labels, difficulty * quantity[_like(labels, cosines)]), labels)


def smoothing(stage1: Stage1, head: float | Tensor, tail: float | Tensor) -> Tensor:
    """Return ε_c from `tail` at the smallest to `head` at the largest class, along a quarter of a sine. [Zhong et al., CVPR
    2021, the concave form]
    """
    n = stage1.counts
    share = (n - n.min()) / (n.max() - n.min()).clamp_min(1)
    return tail + (head - tail) * torch.sin(math.pi / 2 * share)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
    """Return the cross-entropy against 1 − ε_y for the true class and ε_y/(C − 1) for each other. [Zhong et al.]"""
    log_p = logits.log_softmax(-1)
    true = at(log_p, labels)
    e = epsilon.expand(*logits.shape[:-2], epsilon.shape[-1]).gather(-1, _like(labels, logits))
    return -(1 - e) * true - e / max(logits.shape[-1] - 1, 1) * (log_p.sum(-1) - true)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over classes of the binary cross-entropy of logits (…, B, C) against the true class, (…, B)."""
    return (F.softplus(logits).sum(-1) - at(logits, labels)) / logits.shape[-1]


def inverse_image_frequency(stage1: Stage1, variant: str) -> Tensor:
    """Return factors (C,) of the logits: smooth ln((N+1)/(N_c+1)) + 1, raw ln(N/N_c), relative ln((N−N_c)/N_c). [Alexandridis
    et al., IEEE TIP 2023]
    """
    n, total = stage1.counts, stage1.counts.sum()
    if variant == "smooth":
        return ((total + 1) / (n + 1)).log() + 1
    return (total / n).log() if variant == "raw" else ((total - n) / n).log()


def norm_threshold(stage1: Stage1, share: float = 0.1) -> float:
    """Return the smallest stage-1 norm + share·(largest − smallest). [Alshammari et al., CVPR 2022: what their code does]"""
    low, high = stage1.norms.min(), stage1.norms.max()
    return float(low + share * (high - low))


def at(values: Tensor, labels: Tensor) -> Tensor:
    """Return values (…, B, C) at the true class, (…, B)."""
    return values.gather(-1, _like(labels, values)[..., None]).squeeze(-1)


def _like(labels: Tensor, values: Tensor) -> Tensor:
    return labels.expand(values.shape[:-1])


def _less_at(values: Tensor, labels: Tensor, less: Tensor) -> Tensor:
    """Return values (…, B, C) less `less` (…, B) at the true class."""
    true = F.one_hot(labels, values.shape[-1])
    return values - less[..., None] * true
