"""Convex and closed-form heads as methods: logistic regression, Gaussian discriminants, adjustment with class means.

Each solves all points of its grid together: logistic regression advances them in one matrix product, the discriminants share
one pass over the features and one eigendecomposition.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from pipeline.backbone.arithmetic import computes_bfloat16
from pipeline.linear.logistic import L2, RHO, TOLERANCE, LogisticHeads, logistic_regression
from pipeline.linear.moments import class_moments
from pipeline.rebalance.methods.adjustment import SHARE, adjusted, mean_directions, with_directions
from pipeline.rebalance.methods.api import Free, Samples, Stage1, Values
from pipeline.rebalance.methods.discriminant import PRIOR, SHRINKAGE, gaussian_discriminants, with_prior

Layers = list[tuple[Tensor, Tensor]]
RESIDENT_BYTES = 4 << 30  # standardised features that stay in memory between the passes of logistic regression
LOGISTIC_TAU = (0.5, 0.75, 1.0, 1.25, 1.5)
MEANS_TAU = tuple(round(0.25 * i, 2) for i in range(11))


def logistic(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return logistic regression with class weights N_c^(−ρ), the rest of the prior inside the loss. [Menon et al., ICLR 2021]"""
    rhos, l2s = sorted({v["rho"] for v in grid}), sorted({v["l2"] for v in grid}, reverse=True)
    heads = _regression(stage1, samples, rhos, l2s)
    at = [(rhos.index(v["rho"]), l2s.index(v["l2"])) for v in grid]
    return [(heads.weight[i, j], heads.bias[i, j]) for i, j in at]


def logistic_adjusted(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return plain logistic regression whose logits are then reduced by τ·ln π. [Menon et al., ICLR 2021, Eq. 9]"""
    l2s = sorted({v["l2"] for v in grid}, reverse=True)
    heads = _regression(stage1, samples, (0.0,), l2s, prior=False)
    weight, bias = heads.weight[0], heads.bias[0]
    at = [(l2s.index(v["l2"]), v["tau"]) for v in grid]
    return [(weight[j], adjusted(bias[j], stage1.counts, tau)) for j, tau in at]


def discriminants(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return Gaussian discriminants with one covariance for all classes. [Friedman, JASA 1989]"""
    moments = class_moments(samples, stage1.counts, stage1.weight.shape[1])
    shrinkages = sorted({v["shrinkage"] for v in grid})
    heads = {
        pooled: gaussian_discriminants(moments, shrinkages=shrinkages, by_class=pooled == "classes")
        for pooled in dict.fromkeys(v["pooled"] for v in grid)
    }
    layers: Layers = []
    for values in grid:
        weight, bias = (part[shrinkages.index(values["shrinkage"])] for part in heads[values["pooled"]])
        layers.append((weight, with_prior(bias, stage1.counts, values["prior"])))
    return layers


def adjust_means(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return the stage-1 head after logit adjustment, with a share of the nearest-class-mean classifier added."""
    moments = class_moments(samples, stage1.counts, stage1.weight.shape[1])
    directions = mean_directions(samples, moments)
    return [
        with_directions(stage1.weight, adjusted(stage1.bias, stage1.counts, v["tau"]), directions, v["means"])
        for v in grid
    ]


def _regression(
    stage1: Stage1, samples: Samples, rhos: Sequence[float], l2s: Sequence[float], *, prior: bool = True
) -> LogisticHeads:
    width = stage1.weight.shape[1]
    return logistic_regression(
        samples,
        stage1.counts,
        width,
        rhos=rhos,
        l2s=l2s,
        prior=prior,
        tolerance=TOLERANCE,
        product_dtype=torch.bfloat16 if computes_bfloat16(stage1.counts.device) else torch.float32,
        resident=float(stage1.counts.sum()) * width * 4 <= RESIDENT_BYTES,
    )


LINEAR_FAMILIES = (
    Free("logistic", solve_grid=logistic, grid=tuple({"rho": rho, "l2": l2} for rho, l2 in product(RHO, L2))),
    Free(
        "logistic-adjusted",
        solve_grid=logistic_adjusted,
        grid=tuple({"l2": l2, "tau": tau} for l2, tau in product(L2, LOGISTIC_TAU)),
    ),
    Free(
        "gda",
        solve_grid=discriminants,
        grid=tuple(
            {"shrinkage": a, "pooled": pooled, "prior": prior}
            for a, pooled, prior in product(SHRINKAGE, ("images", "classes"), PRIOR)
        ),
    ),
    Free(
        "adjust-means",
        solve_grid=adjust_means,
        grid=tuple({"tau": tau, "means": share} for tau, share in product(MEANS_TAU, SHARE)),
    ),
)
