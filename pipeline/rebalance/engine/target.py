"""The target of inverse weight-balancing: how large the norm of every class vector should be (METHODS §1).

Everything here is a pure function of tensors and keeps their dtype; autograd passes through where the arguments ask.
"""

from typing import Literal

import torch
from torch import Tensor

Hardness = Literal["vector", "scalar", "none"]
LogBase = Literal["2", "e"]


def number_coefficient(counts: Tensor, *, log_base: LogBase = "2") -> Tensor:
    """NC (C,): log(N / (N_c + 1)), large for classes with few images.

    counts: training images of each class, (C,). [IWB paper, Eq. 3; base e is what the released code computes]
    """
    ratio = counts.sum() / (counts + 1)
    return torch.log2(ratio) if log_base == "2" else torch.log(ratio)


def cosines(weight: Tensor, features: Tensor) -> Tensor:
    """Cosine (B, C) between every feature (B, D) and every class vector (C, D); the bias plays no part. [Eq. 5]

    A feature or class vector that is all zeros has cosine 0 with everything.
    """
    tiny = torch.finfo(weight.dtype).tiny
    unit = features / features.norm(dim=1, keepdim=True).clamp_min(tiny)
    return unit @ weight.T / weight.norm(dim=1).clamp_min(tiny)


def hardness_coefficient(weight: Tensor, features: Tensor, labels: Tensor, *, hardness: Hardness = "vector") -> Tensor:
    """HC: (1 − cosine) / 2, in [0, 1], large where a feature lies far from a class vector. [Eq. 6]

    weight (C, D), features (B, D), labels (B,). vector: against every class, (B, C). scalar: against the true class
    only, (B, 1) [Eq. 4]. none: ones, (1, 1).
    """
    if hardness == "none":
        return weight.new_ones(1, 1)
    cosine = cosines(weight, features)
    if hardness == "scalar":
        cosine = cosine.gather(1, labels[:, None])
    return (1 - cosine) / 2


def target(number: Tensor, hardness: Tensor, lam: float | Tensor) -> Tensor:
    """P = λ · NC · HC, (B, C) or (1, C) where nothing depends on the sample. [Eq. 7]"""
    return lam * number * hardness
