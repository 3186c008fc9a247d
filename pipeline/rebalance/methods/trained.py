"""Methods with training, each as its loss, its start, its deployed head and the values that are tried."""

import numpy as np
import torch
from torch import Tensor

from pipeline.longtail import class_balanced_weights, inverse_prior_weights, ldam_margins
from pipeline.rebalance.methods import losses
from pipeline.rebalance.methods.api import Given, Head, Own, Params, Trained, from_stage_1
from pipeline.rebalance.methods.training_free import VARIANTS

SCALE = 30.0  # of the cosine heads
BETA = 0.9999  # of the class-balanced weights
RHO = tuple({"rho": rho} for rho in (1.2, 0.8, 1.6, 2.0))


def logits_of(params: Params, x: Tensor) -> Tensor:
    return losses.linear(x, params["weight"], params["bias"])


def ce_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    return losses.cross_entropy(logits_of(params, x), y)


def focal_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    return losses.focal(logits_of(params, x), y, own["gamma"])


def balanced_softmax_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    return losses.cross_entropy(losses.with_prior(logits_of(params, x), given, own["tau"]), y)


def rho_weight(given: Given, own: Own, progress: float) -> Tensor:
    return inverse_prior_weights(given.counts, own["rho"])


def cb_weight(given: Given, own: Own, progress: float) -> Tensor:
    return class_balanced_weights(given.counts, beta=BETA)[None]


# crt: a new linear layer, as torch.nn.Linear begins


def new_layer(given: Given, random: np.random.Generator) -> Params:
    bound = given.weight.shape[1] ** -0.5
    return {
        name: torch.as_tensor(random.uniform(-bound, bound, like.shape)).to(like)
        for name, like in (("weight", given.weight), ("bias", given.bias))
    }


# lws: f_c·(W_c·x + b_c)


def ones(given: Given, random: np.random.Generator) -> Params:
    return {"scale": torch.ones_like(given.bias)}


def scaled_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    return losses.cross_entropy(params["scale"][..., None, :] * losses.linear(x, given.weight, given.bias), y)


def scaled_head(params: Params, given: Given, own: Own) -> Head:
    return params["scale"][..., None] * given.weight, params["scale"] * given.bias


# las: the same scale, the layer trained with it


def scaled_layer(given: Given, random: np.random.Generator) -> Params:
    return from_stage_1(given, random) | ones(given, random)


def las_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    epsilon = losses.smoothing(given, own["head"], own["tail"])
    return losses.smoothed_cross_entropy(params["scale"][..., None, :] * logits_of(params, x), y, epsilon)


def las_head(params: Params, given: Given, own: Own) -> Head:
    return params["scale"][..., None] * params["weight"], params["scale"] * params["bias"]


# cosine heads: s·cos(W_c, x) is decided alike by a linear layer of unit class vectors


def class_vectors(given: Given, random: np.random.Generator) -> Params:
    return {"weight": given.weight}


def cosine_head(params: Params, given: Given, own: Own) -> Head:
    """Decides as the cosines do; its probabilities are those of a feature of mean length."""
    weight = torch.nn.functional.normalize(params["weight"], dim=-1) * (SCALE / given.length)
    return weight, weight.new_zeros(weight.shape[:-1])


def ldam_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    return losses.ldam(losses.cosine(x, params["weight"]), y, ldam_margins(given.counts, own["margin"]), SCALE)


def deferred_weight(given: Given, own: Own, progress: float) -> Tensor:
    """Class-balanced weights once the deferred part has begun, ones before: (T, C)."""
    begun = torch.as_tensor(own["defer"] <= progress, device=given.counts.device)
    return torch.where(begun, cb_weight(given, own, progress), torch.ones_like(given.counts))


def ala_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    return losses.adaptive_adjustment(losses.cosine(x, params["weight"]), y, given, SCALE)


# maxnorm


@torch.no_grad()
def hold_norms(params: Params, given: Given, own: Own) -> None:
    """Class vectors longer than the threshold are shortened to it."""
    weight = params["weight"]
    length = weight.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    weight.mul_((losses.norm_threshold(given) / length).clamp_max(1))


# marc: a_c·z_c + b_c·|W_c|


def margins(given: Given, random: np.random.Generator) -> Params:
    return {"a": torch.ones_like(given.bias), "b": torch.zeros_like(given.bias)}


def marc_head(params: Params, given: Given, own: Own) -> Head:
    a, b = params["a"], params["b"]
    return a[..., None] * given.weight, a * given.bias + b * given.norms


def marc_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    z = losses.linear(x, given.weight, given.bias)
    moved = params["a"][..., None, :] * z + (params["b"] * given.norms)[..., None, :]
    return losses.cross_entropy(moved, y)


# disalign: (1 + σ(v·x + e)·s_c)·z_c + σ(v·x + e)·b_c


def alignment(given: Given, random: np.random.Generator) -> Params:
    classes, width = given.weight.shape
    like = given.weight
    return {
        "s": like.new_ones(classes),
        "b": like.new_zeros(classes),
        "v": like.new_zeros(width),
        "e": like.new_zeros(1),
    }


def disalign_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    z = losses.linear(x, given.weight, given.bias)
    gate = (x @ params["v"][..., None] + params["e"][..., None]).sigmoid()
    return losses.cross_entropy((1 + gate * params["s"][..., None, :]) * z + gate * params["b"][..., None, :], y)


def disalign_head(params: Params, given: Given, own: Own) -> Head:
    s, b = params["s"], params["b"]
    lead = s.shape[:-1]
    first = (given.weight.expand(*lead, *given.weight.shape), given.bias.expand(*lead, *given.bias.shape))
    second = (s[..., None] * given.weight, s * given.bias + b)
    return *first, *second, torch.cat([params["v"], params["e"]], -1)


# iif: cross-entropy of the logits times the inverse image frequency, which stays at test


def iif_loss(params: Params, x: Tensor, y: Tensor, given: Given, own: Own) -> Tensor:
    factor = losses.inverse_image_frequency(given, own["variant"])
    return losses.cross_entropy(factor * logits_of(params, x), y)


def iif_head(params: Params, given: Given, own: Own) -> Head:
    factor = losses.inverse_image_frequency(given, own["variant"])
    return factor[:, None] * params["weight"], factor * params["bias"]


TRAINED = (
    Trained("focal", focal_loss, own=({"gamma": 1.0}, {"gamma": 2.0})),
    Trained("grw", ce_loss, class_weight=rho_weight, own=RHO),
    Trained("crt", ce_loss, new_layer, sampling="class-balanced", lr=0.1, batch=512, weight_decay=5e-4),
    Trained("lws", scaled_loss, ones, scaled_head, sampling="class-balanced", lr=0.1, batch=512, weight_decay=5e-4),
    Trained(
        "balanced-softmax",
        balanced_softmax_loss,
        prior_in_loss=True,
        own=({"tau": 1.0}, {"tau": 0.75}, {"tau": 1.25}),
    ),
    Trained(
        "ldam-drw",
        ldam_loss,
        class_vectors,
        cosine_head,
        deferred_weight,
        own=({"margin": 0.5, "defer": 0.8},),
        lr=0.1,
    ),
    Trained(
        "maxnorm",
        ce_loss,
        class_weight=cb_weight,
        project=hold_norms,
        own=tuple({"weight_decay": wd} for wd in (0.1, 0.01, 0.001)),
        lr=0.01,
        batch=64,
    ),
    Trained("marc", marc_loss, margins, marc_head, rho_weight, own=RHO, lr=0.05),
    Trained("disalign", disalign_loss, alignment, disalign_head, rho_weight, own=RHO, lr=0.1),
    Trained("iif-trained", iif_loss, head=iif_head, prior_in_loss=True, own=VARIANTS),
    Trained("ala", ala_loss, class_vectors, cosine_head, lr=0.1),
    Trained(
        "las",
        las_loss,
        scaled_layer,
        las_head,
        sampling="class-balanced",
        own=({"head": 0.4, "tail": 0.1}, {"head": 0.3, "tail": 0.0}),
        lr=0.1,
    ),
)
