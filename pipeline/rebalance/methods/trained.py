"""Methods with training: their losses, starts and deployed heads, and the grid that is tried."""

import numpy as np
import torch
from torch import Tensor

from pipeline.longtail import class_balanced_weights, inverse_prior_weights, ldam_margins
from pipeline.rebalance.methods import losses
from pipeline.rebalance.methods.api import HeadTensors, Params, Stage1, Trained, Values
from pipeline.rebalance.methods.training_free import VARIANTS

SCALE = 30.0  # of the cosine heads
BETA = 0.9999  # of the class-balanced weights
GATE = 0.1  # standard deviation of the gate's start in DisAlign's public code
SLOWER = 0.2**0.5  # las trains a layer / SLOWER, which gives the layer 0.2 times the learning rate of the scale
RHO = tuple({"rho": rho} for rho in (1.2, 0.8, 1.6, 2.0))


def logits_of(params: Params, x: Tensor) -> Tensor:
    return losses.linear(x, params["weight"], params["bias"])


def ce_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    return losses.cross_entropy(logits_of(params, x), y)


def focal_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    return losses.focal(logits_of(params, x), y, values["gamma"])


def balanced_softmax_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    return losses.cross_entropy(losses.with_prior(logits_of(params, x), stage1, values["tau"]), y)


def rho_weight(stage1: Stage1, values: Values, progress: float) -> Tensor:
    return inverse_prior_weights(stage1.counts, values["rho"])


def cb_weight(stage1: Stage1, values: Values, progress: float) -> Tensor:
    return class_balanced_weights(stage1.counts, beta=BETA)[None]


# crt: a new linear layer, as torch.nn.Linear begins


def new_layer(stage1: Stage1, random: np.random.Generator) -> Params:
    bound = stage1.weight.shape[1] ** -0.5
    return {
        name: torch.as_tensor(random.uniform(-bound, bound, like.shape)).to(like)
        for name, like in (("weight", stage1.weight), ("bias", stage1.bias))
    }


# lws: f_c·(W_c·x + b_c)


def ones(stage1: Stage1, random: np.random.Generator) -> Params:
    return {"scale": torch.ones_like(stage1.bias)}


def scaled_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    return losses.cross_entropy(params["scale"][..., None, :] * losses.linear(x, stage1.weight, stage1.bias), y)


def scaled_head(params: Params, stage1: Stage1, values: Values) -> HeadTensors:
    return params["scale"][..., None] * stage1.weight, params["scale"] * stage1.bias


# las: the same scale, the layer trained with it


def scaled_layer(stage1: Stage1, random: np.random.Generator) -> Params:
    return {"weight": stage1.weight / SLOWER, "bias": stage1.bias / SLOWER} | ones(stage1, random)


def las_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    epsilon = losses.smoothing(stage1, values["head"], values["tail"])
    return losses.smoothed_cross_entropy(SLOWER * params["scale"][..., None, :] * logits_of(params, x), y, epsilon)


def las_head(params: Params, stage1: Stage1, values: Values) -> HeadTensors:
    scale = SLOWER * params["scale"]
    return scale[..., None] * params["weight"], scale * params["bias"]


# cosine heads: s·cos(W_c, x) is decided alike by a linear layer of unit class vectors


def class_vectors(stage1: Stage1, random: np.random.Generator) -> Params:
    return {"weight": stage1.weight}


def cosine_head(params: Params, stage1: Stage1, values: Values) -> HeadTensors:
    """Return a linear layer that decides as the cosines do; its probabilities are those of a feature of mean length."""
    weight = torch.nn.functional.normalize(params["weight"], dim=-1) * (SCALE / stage1.length)
    return weight, weight.new_zeros(weight.shape[:-1])


def ldam_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    return losses.ldam(losses.cosine(x, params["weight"]), y, ldam_margins(stage1.counts, values["margin"]), SCALE)


def deferred_weight(stage1: Stage1, values: Values, progress: float) -> Tensor:
    """Return class-balanced weights in the last part of training, ones before: (T, C)."""
    deferred = torch.as_tensor(values["defer"] <= progress, device=stage1.counts.device)
    return torch.where(deferred, cb_weight(stage1, values, progress), torch.ones_like(stage1.counts))


def ala_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    return losses.adaptive_adjustment(losses.cosine(x, params["weight"]), y, stage1, SCALE)


# maxnorm


def maxnorm_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    """Return cross-entropy, or as the authors' code has it, binary cross-entropy averaged over the classes."""
    z = logits_of(params, x)
    return losses.cross_entropy(z, y) if values["form"] == "softmax" else losses.binary_cross_entropy(z, y)


@torch.no_grad()
def hold_norms(params: Params, stage1: Stage1, values: Values) -> None:
    """Shorten class vectors that are longer than the threshold."""
    weight = params["weight"]
    length = weight.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    weight.mul_((losses.norm_threshold(stage1) / length).clamp_max(1))


# marc: a_c·z_c + b_c·|W_c|


def margins(stage1: Stage1, random: np.random.Generator) -> Params:
    return {"a": torch.ones_like(stage1.bias), "b": torch.zeros_like(stage1.bias)}


def marc_head(params: Params, stage1: Stage1, values: Values) -> HeadTensors:
    a, b = params["a"], params["b"]
    return a[..., None] * stage1.weight, a * stage1.bias + b * stage1.norms


def marc_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    z = losses.linear(x, stage1.weight, stage1.bias)
    moved = params["a"][..., None, :] * z + (params["b"] * stage1.norms)[..., None, :]
    return losses.cross_entropy(moved, y)


# disalign: (1 + σ(v·x + e)·s_c)·z_c + σ(v·x + e)·b_c


def alignment(stage1: Stage1, random: np.random.Generator) -> Params:
    classes, width = stage1.weight.shape
    like = stage1.weight
    return {
        "s": like.new_ones(classes),
        "b": like.new_zeros(classes),
        "v": torch.as_tensor(random.normal(0, GATE, width), dtype=like.dtype, device=like.device),
        "e": like.new_zeros(1),
    }


def disalign_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    z = losses.linear(x, stage1.weight, stage1.bias)
    gate = (x @ params["v"][..., None] + params["e"][..., None]).sigmoid()
    return losses.cross_entropy((1 + gate * params["s"][..., None, :]) * z + gate * params["b"][..., None, :], y)


def disalign_head(params: Params, stage1: Stage1, values: Values) -> HeadTensors:
    s, b = params["s"], params["b"]
    lead = s.shape[:-1]
    first = (stage1.weight.expand(*lead, *stage1.weight.shape), stage1.bias.expand(*lead, *stage1.bias.shape))
    second = (s[..., None] * stage1.weight, s * stage1.bias + b)
    return *first, *second, torch.cat([params["v"], params["e"]], -1)


# iif: cross-entropy of the logits times the inverse image frequency, which stays at test


def iif_loss(params: Params, x: Tensor, y: Tensor, stage1: Stage1, values: Values) -> Tensor:
    factor = losses.inverse_image_frequency(stage1, values["variant"])
    return losses.cross_entropy(factor * logits_of(params, x), y)


def iif_head(params: Params, stage1: Stage1, values: Values) -> HeadTensors:
    factor = losses.inverse_image_frequency(stage1, values["variant"])
    return factor[:, None] * params["weight"], factor * params["bias"]


TRAINED = (
    Trained("focal", focal_loss, grid=({"gamma": 1.0}, {"gamma": 2.0})),
    Trained("grw", ce_loss, class_weight=rho_weight, grid=RHO),
    Trained("crt", ce_loss, new_layer, sampling="class-balanced", lr=0.1, batch=512, weight_decay=5e-4),
    Trained("lws", scaled_loss, ones, scaled_head, sampling="class-balanced", lr=0.1, batch=512, weight_decay=5e-4),
    Trained(
        "balanced-softmax",
        balanced_softmax_loss,
        prior_in_loss=True,
        grid=({"tau": 1.0}, {"tau": 0.75}, {"tau": 1.25}),
    ),
    Trained(
        "ldam-drw",
        ldam_loss,
        class_vectors,
        cosine_head,
        deferred_weight,
        grid=({"margin": 0.5, "defer": 0.8},),
        lr=0.1,
    ),
    Trained(
        "maxnorm",
        maxnorm_loss,
        class_weight=cb_weight,
        project=hold_norms,
        grid=tuple({"form": form, "weight_decay": wd} for form in ("bce", "softmax") for wd in (0.1, 0.01, 0.001)),
        lr=0.01,
        batch=64,
    ),
    Trained("marc", marc_loss, margins, marc_head, rho_weight, grid=RHO, lr=0.05),
    Trained("disalign", disalign_loss, alignment, disalign_head, rho_weight, grid=RHO, lr=0.1),
    Trained("iif-trained", iif_loss, head=iif_head, prior_in_loss=True, grid=VARIANTS),
    Trained("ala", ala_loss, class_vectors, cosine_head, lr=0.005),  # of the paper 0.1, twenty times what is best here
    Trained(
        "las",
        las_loss,
        scaled_layer,
        las_head,
        sampling="class-balanced",
        grid=({"head": 0.4, "tail": 0.1}, {"head": 0.3, "tail": 0.0}),
        lr=0.1,
    ),
)
