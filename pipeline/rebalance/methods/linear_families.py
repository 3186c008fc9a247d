"""Convex and closed-form heads as methods: logistic regression, Gaussian discriminants, adjustment with class means.

Each solves all points of its grid together: logistic regression advances them in one matrix product, the discriminants share
one pass over the features and one eigendecomposition.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.arithmetic import computes_bfloat16
from pipeline.linear.logistic import L2, RHO, TOLERANCE, logistic_regression
from pipeline.linear.moments import Moments, class_moments
from pipeline.rebalance.methods.adjustment import SHARE, adjusted, mean_directions, with_directions
from pipeline.rebalance.methods.api import Free, Samples, Stage1, Values
from pipeline.rebalance.methods.discriminant import PRIOR, SHRINKAGE, gaussian_discriminants, with_prior

Layers = list[tuple[Tensor, Tensor]]
RESIDENT_BYTES = 4 << 30  # standardised features that stay in memory between the passes of logistic regression
LOGISTIC_TAU = (0.5, 0.75, 1.0, 1.25, 1.5)
MEANS_TAU = tuple(round(0.25 * i, 2) for i in range(11))


def logistic(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return logistic regression with class weights N_c^(−ρ), the rest of the prior inside the loss. [Menon et al., ICLR 2021]"""
    return regressions(stage1, samples, [(v["rho"], v["l2"]) for v in grid])


def logistic_balanced(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return logistic regression with class weights 1/N_c, as `LogisticRegression(class_weight="balanced")` fits it."""
    return regressions(stage1, samples, [(1.0, v["l2"]) for v in grid])


def regressions(stage1: Stage1, samples: Samples, settings: Sequence[tuple[float, float]]) -> Layers:
    """Return the logistic regression of every (ρ, l2); those that another method had from the same samples are taken over."""
    solved: dict[tuple[float, float], tuple[Tensor, Tensor]] = shared(samples, "logistic regressions", dict)
    if new := [setting for setting in settings if setting not in solved]:
        rhos, l2s = sorted({rho for rho, _ in new}), sorted({l2 for _, l2 in new}, reverse=True)
        rows, width = float(stage1.counts.sum()), stage1.weight.shape[1]
        heads = logistic_regression(
            samples,
            stage1.counts,
            width,
            rhos=rhos,
            l2s=l2s,
            tolerance=TOLERANCE,
            product_dtype=torch.bfloat16 if computes_bfloat16(stage1.counts.device) else torch.float32,
            resident=not getattr(samples, "streamed", False) and rows * width * 4 <= RESIDENT_BYTES,
            moments=_moments(stage1, samples),
        )
        for (i, rho), (j, l2) in product(enumerate(rhos), enumerate(l2s)):
            solved[rho, l2] = heads.weight[i, j], heads.bias[i, j]
    return [solved[setting] for setting in settings]


def shared(samples: Samples, name: str, compute: Callable[[], Any]) -> Any:
    """Return what was computed from the samples under this name, or compute it where they do not keep such results."""
    results = getattr(samples, "shared", {})
    if name not in results:
        results[name] = compute()
    return results[name]


def logistic_adjusted(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return plain logistic regression whose logits are then reduced by τ·ln π. [Menon et al., ICLR 2021, Eq. 9]"""
    layers = regressions(stage1, samples, [(0.0, v["l2"]) for v in grid])  # whose bias holds −ln π already
    return [
        (weight, adjusted(bias, stage1.counts, v["tau"] - 1)) for (weight, bias), v in zip(layers, grid, strict=True)
    ]


def discriminants(stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> Layers:
    """Return Gaussian discriminants with one covariance for all classes. [Friedman, JASA 1989]"""
    moments = _moments(stage1, samples)
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
    moments = _moments(stage1, samples)
    directions = mean_directions(samples, moments)
    return [
        with_directions(stage1.weight, adjusted(stage1.bias, stage1.counts, v["tau"]), directions, v["means"])
        for v in grid
    ]


def _moments(stage1: Stage1, samples: Samples) -> Moments:
    width = stage1.weight.shape[1]
    return shared(samples, "moments", lambda: class_moments(samples, stage1.counts, width))


LINEAR_FAMILIES = (
    Free("logistic", solve_grid=logistic, grid=tuple({"rho": rho, "l2": l2} for rho, l2 in product(RHO, L2))),
    Free("logistic-balanced", solve_grid=logistic_balanced, grid=tuple({"l2": l2} for l2 in L2)),
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
