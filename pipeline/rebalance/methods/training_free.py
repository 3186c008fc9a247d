"""Methods without training: the stage-1 head, or the class means, rewritten.

They may have as many trials as they like: a trial costs one evaluation, and there is no learning rate to get wrong.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.rebalance.methods.api import Free, Given, Own, Samples
from pipeline.rebalance.methods.losses import inverse_image_frequency

UP_TO_2 = tuple(round(0.05 * i, 2) for i in range(41))


def tau_norm(given: Given, samples: Samples, own: Own) -> tuple[Tensor, Tensor]:
    """W_c / |W_c|^τ; the bias is dropped, as in the paper, or kept. [Kang et al., ICLR 2020]"""
    return given.weight / given.norms[:, None] ** own["tau"], given.bias * (own["bias"] == "kept")


def nearest_mean(given: Given, samples: Samples, own: Own) -> tuple[Tensor, Tensor]:
    """The class whose mean is nearest in cosine, after taking out the mean feature and scaling to length 1; a class
    without a sample keeps a zero vector. [Kang et al.]

    Lengths of x do not change which cosine is largest, so W_c = μ̂_c and b_c = −μ̂_c·m decide exactly alike, and a linear
    layer can carry it; its probabilities mean nothing.
    """
    total, number = torch.zeros_like(given.weight[0]), 0
    for x, _ in samples():
        total, number = total + x.sum(0), number + len(x)
    middle, sums = total / number, torch.zeros_like(given.weight)
    for x, y in samples():
        sums.index_add_(0, y, torch.nn.functional.normalize(x - middle, dim=1))
    means = torch.nn.functional.normalize(sums, dim=1)
    return means, -(means @ middle)


def logit_adjust(given: Given, samples: Samples, own: Own) -> tuple[Tensor, Tensor]:
    """z_c − τ·ln π_c [Menon et al., ICLR 2021, Eq. 9]; multiplicative: z_c·π_c^(−τ) [Kim and Kim, IEEE Access 2020]."""
    shift = own["tau"] * given.log_prior
    if own["form"] == "additive":
        return given.weight, given.bias - shift
    return given.weight * (-shift).exp()[:, None], given.bias * (-shift).exp()


def iif(given: Given, samples: Samples, own: Own) -> tuple[Tensor, Tensor]:
    """Stage-1 logits times the inverse image frequency."""
    factor = inverse_image_frequency(given, own["variant"])
    return given.weight * factor[:, None], given.bias * factor


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
)
