"""The objective of stage 2 as the paper writes it; the engine computes the same gradients by hand."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.longtail import class_balanced_weights
from pipeline.rebalance.engine.formulation import CBLoss, Direction, Divergence, Penalty, penalty
from pipeline.rebalance.engine.target import (
    Hardness,
    LogBase,
    hardness_coefficient,
    number_coefficient,
    target,
)


def iwb_objective(
    weight: Tensor,
    bias: Tensor,
    features: Tensor,
    labels: Tensor,
    counts: Tensor | np.ndarray,
    lam: float,
    *,
    formulation: str = "paper",
    cb: CBLoss | None = "softmax",
    hardness: Hardness = "vector",
    kl_weight: float | str | None = None,
    log_base: LogBase | None = None,
    direction: Direction | None = None,
    divergence: Divergence = "kl",
    detach_target: bool | None = None,
    number: bool = True,
    beta: float = 0.9999,
) -> Tensor:
    """Return the scalar loss of one batch: classification loss plus weighted penalty on the norms.

    All is computed in the dtype of weight: float64 in, float64 out.

    Arguments:
        weight: (C, D).
        bias: (C,).
        features: (B, D).
        labels: (B,) integers.
        counts: (C,) training images of each class.
        lam: λ, the scale of the target P.
        cb: class-balanced `softmax` or `bce`, None for cross-entropy; formulation does not change it (the released code
            uses `bce`).
        beta: β of the class-balanced loss.
        formulation, and the other switches, which override it where they are not None: see Penalty.
    Raises: ConfigError: unknown switch, or shapes that do not fit together.
    Source: IWB paper, Eq. 10.
    """
    classes, width = weight.shape
    if features.shape[1:] != (width,) or labels.shape != features.shape[:1] or len(counts) != classes:
        raise ConfigError(
            f"weight {tuple(weight.shape)}, features {tuple(features.shape)}, labels {tuple(labels.shape)} and "
            f"{len(counts)} counts do not fit together; expected (C, D), (B, D), (B,) and C"
        )
    rule = penalty(
        formulation,
        log_base=log_base,
        direction=direction,
        kl_weight=kl_weight,
        detach_target=detach_target,
        hardness=hardness,
        number=number,
        divergence=divergence,
    )
    sizes = torch.as_tensor(counts, device=weight.device).to(weight.dtype)
    logits = features @ weight.T + bias
    loss = classification_loss(logits, labels, sizes, cb=cb, beta=beta)
    scale = float(len(labels)) if rule.kl_weight == "batch" else float(rule.kl_weight)
    return loss + scale * norm_penalty(weight, features, labels, sizes, lam, rule)


def classification_loss(logits: Tensor, labels: Tensor, counts: Tensor, *, cb: CBLoss | None, beta: float) -> Tensor:
    """Return the loss of one batch from its logits (B, C); the two class-balanced losses also reduce differently.

    softmax: Σ v_y·CE / Σ v_y. bce: Σ v_y·(binary cross-entropy of the softmax probabilities, summed over classes) / B.
    """
    if cb is None:
        return F.cross_entropy(logits, labels)
    v = class_balanced_weights(counts, beta=beta)
    if cb == "softmax":
        return F.cross_entropy(logits, labels, weight=v)
    if cb == "bce":
        truth = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        binary = F.binary_cross_entropy(logits.softmax(1), truth, reduction="none").sum(1)
        return (v[labels] * binary).mean()
    raise ConfigError(f"cb {cb!r}: expected 'softmax', 'bce' or None")


def norm_penalty(weight: Tensor, features: Tensor, labels: Tensor, counts: Tensor, lam: float, rule: Penalty) -> Tensor:
    """Return the batch mean of the divergence between the norms and the target. [IWB paper, Eq. 8]

    kl: KL of the two softmax distributions over classes. mse: mean over samples and classes of (n_c − P_ic)², raw.
    """
    norms = weight.norm(dim=1)
    nc = number_coefficient(counts, log_base=rule.log_base) if rule.number else torch.ones_like(counts)
    p = target(nc, hardness_coefficient(weight, features, labels, hardness=rule.hardness), lam)
    if rule.detach_target:
        p = p.detach()
    if rule.divergence == "mse":
        return (norms - p).square().mean()
    log_s, log_q = norms.log_softmax(0), p.log_softmax(1)
    if rule.direction == "norms-to-target":
        return (log_s.exp() * (log_s - log_q)).sum(1).mean()
    return (log_q.exp() * (log_q - log_s)).sum(1).mean()
