"""The target P of inverse weight-balancing: the norm that every class vector should have (METHODS §1).

All functions are pure, keep the dtype of their tensors and can be differentiated.
"""

from typing import Literal

import torch
from torch import Tensor

Hardness = Literal["vector", "scalar", "none"]
LogBase = Literal["2", "e"]


def number_coefficient(counts: Tensor, *, log_base: LogBase = "2") -> Tensor:
    """Return NC (C,) = log(N / (N_c + 1)), large for classes with few images.

    Arguments:
        counts: (C,) training images of each class.
    Source: IWB paper, Eq. 3; base e: its released code.
    """
    ratio = counts.sum() / (counts + 1)
    return torch.log2(ratio) if log_base == "2" else torch.log(ratio)


def cosines(weight: Tensor, features: Tensor) -> Tensor:
    """Return the cosine (B, C) between every feature (B, D) and every class vector (C, D), without the bias.

    A feature or class vector of zeros has cosine 0.

    Source: IWB paper, Eq. 5.
    """
    tiny = torch.finfo(weight.dtype).tiny
    unit = features / features.norm(dim=1, keepdim=True).clamp_min(tiny)
    return unit @ weight.T / weight.norm(dim=1).clamp_min(tiny)


def hardness_coefficient(weight: Tensor, features: Tensor, labels: Tensor, *, hardness: Hardness = "vector") -> Tensor:
    """Return HC = (1 − cosine) / 2 in [0, 1], large where a feature is far from a class vector.

    Arguments:
        weight: (C, D).
        features: (B, D).
        labels: (B,).
    Returns: vector: (B, C), for every class. scalar: (B, 1), for the true class. none: (1, 1), a one.
    Source: IWB paper, Eq. 6; scalar: Eq. 4.
    """
    if hardness == "none":
        return weight.new_ones(1, 1)
    cosine = cosines(weight, features)
    if hardness == "scalar":
        cosine = cosine.gather(1, labels[:, None])
    return (1 - cosine) / 2


def target(number: Tensor, hardness: Tensor, lam: float | Tensor) -> Tensor:
    """Return P = λ · NC · HC, (B, C), or (1, C) where HC is the same for all samples. [IWB paper, Eq. 7]"""
    return lam * number * hardness
