"""Methods without training: closed-form changes of the stage-1 head, and class means.

Convex and closed-form heads are in linear_families.py. All have any number of trials: a trial costs one evaluation, and there is
no learning rate to tune.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.rebalance.methods.api import Free, Samples, Stage1, Values
from pipeline.rebalance.methods.linear_families import LINEAR_FAMILIES
from pipeline.rebalance.methods.losses import inverse_image_frequency

UP_TO_2 = tuple(round(0.05 * i, 2) for i in range(41))


def tau_norm(stage1: Stage1, samples: Samples, values: Values) -> tuple[Tensor, Tensor]:
    """Return W_c / |W_c|^τ; the bias is dropped, as in the paper, or kept. [Kang et al., ICLR 2020]"""
    return stage1.weight / stage1.norms[:, None] ** values["tau"], stage1.bias * (values["bias"] == "kept")


def nearest_mean(stage1: Stage1, samples: Samples, values: Values) -> tuple[Tensor, Tensor]:
    """Return the nearest class mean in cosine, of features less their mean and scaled to length 1.

    A class without a sample has a zero vector. Lengths of x do not change which cosine is largest, so the linear layer
    W_c = μ̂_c, b_c = −μ̂_c·m decides exactly the same; its probabilities mean nothing.

    Source: Kang et al., ICLR 2020.
    """
    total, number = torch.zeros_like(stage1.weight[0]), 0
    for x, _ in samples():
        total, number = total + x.sum(0), number + len(x)
    middle, sums = total / number, torch.zeros_like(stage1.weight)
    for x, y in samples():
        sums.index_add_(0, y, torch.nn.functional.normalize(x - middle, dim=1))
    means = torch.nn.functional.normalize(sums, dim=1)
    return means, -(means @ middle)


def logit_adjust(stage1: Stage1, samples: Samples, values: Values) -> tuple[Tensor, Tensor]:
    """Return z_c − τ·ln π_c [Menon et al., ICLR 2021, Eq. 9]; multiplicative: z_c·π_c^(−τ) [Kim and Kim, IEEE Access 2020]."""
    shift = values["tau"] * stage1.log_prior
    if values["form"] == "additive":
        return stage1.weight, stage1.bias - shift
    return stage1.weight * (-shift).exp()[:, None], stage1.bias * (-shift).exp()


def iif(stage1: Stage1, samples: Samples, values: Values) -> tuple[Tensor, Tensor]:
    """Return the stage-1 logits times the inverse image frequency."""
    factor = inverse_image_frequency(stage1, values["variant"])
    return stage1.weight * factor[:, None], stage1.bias * factor


VARIANTS: tuple[dict[str, Any], ...] = ({"variant": "smooth"}, {"variant": "raw"}, {"variant": "relative"})

FREE = (
    Free("tau-norm", tau_norm, tuple({"tau": tau, "bias": bias} for bias in ("dropped", "kept") for tau in UP_TO_2)),
    Free("ncm", nearest_mean),
    Free(
        "logit-adjust",
        logit_adjust,
        tuple({"tau": tau, "form": "additive"} for tau in UP_TO_2)
        + tuple({"tau": tau / 2, "form": "multiplicative"} for tau in UP_TO_2),
    ),
    Free("iif", iif, VARIANTS),
    *LINEAR_FAMILIES,
)
