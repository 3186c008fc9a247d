"""Gaussian discriminants with one covariance for all classes: closed form, every shrinkage from one eigendecomposition.

    W = M·S⁻¹,    b = −½·diag(M S⁻¹ Mᵀ) + t·ln π,    S ← (1−a)·S + a·(tr S / D)·I

on standardised features, M the class means (Friedman, JASA 1989; Wang et al., ICLR 2024, on frozen features). S is pooled over
images, or over classes so that small ones have the same say.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.linear.moments import Moments

SHRINKAGE = (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8)
PRIOR = (0.0, 0.25, 0.5)  # t: 0 takes every class as equally likely, 1 as often as in training
SMALLEST = 1e-6  # share of the mean variance below which a direction carries nothing


def gaussian_discriminants(
    moments: Moments, *, shrinkages: Sequence[float] = SHRINKAGE, by_class: bool = False
) -> tuple[Tensor, Tensor]:
    """Return weight (A, C, D) and bias (A, C) in float64 of every shrinkage, at t = 0; `with_prior` adds t·ln π.

    Arguments:
        moments: of the training features.
        shrinkages: a in 0…1.
        by_class: pool the covariance over classes rather than images.
    """
    scale, mean = moments.scale, moments.mean
    covariance = (moments.within_by_class if by_class else moments.within) / scale / scale[:, None]
    variance, axes = torch.linalg.eigh(covariance)
    centre = variance.clamp_min(0).mean().clamp_min(torch.finfo(variance.dtype).tiny)
    a = variance.new_tensor(shrinkages)[:, None]
    shrunk = ((1 - a) * variance.clamp_min(0) + a * centre).clamp_min(SMALLEST * centre)
    means = ((moments.means - mean) / scale) @ axes
    weight = means / shrunk[:, None]
    bias = -(weight * means).sum(2) / 2
    weight = weight @ axes.T / scale
    return weight, bias - weight @ mean


def with_prior(bias: Tensor, counts: Tensor, strength: float) -> Tensor:
    """Return bias (…, C) + t·ln π."""
    return bias + strength * (counts.double() / counts.sum()).log()
