"""The objective of stage 2 as the paper writes it: its switches and their presets, the target P, the loss of a batch.

The engine computes the same gradients by hand. All functions of tensors are pure and keep their dtype.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import nearest
from pipeline.errors import ConfigError
from pipeline.longtail import class_balanced_weights

Hardness = Literal["vector", "scalar", "none"]
LogBase = Literal["2", "e"]
Direction = Literal["norms-to-target", "target-to-norms"]
Divergence = Literal["kl", "mse"]
CBLoss = Literal["softmax", "bce"]


@dataclass(frozen=True)
class Penalty:
    """The divergence of the norms of the class vectors from the target P, and its weight beside the classification loss.

    Arguments:
        log_base: base of the logarithm in NC.
        direction: norms-to-target is KL(softmax n ‖ softmax P).
        kl_weight: factor on the batch mean; `batch` makes it the sum over the batch.
        detach_target: let no gradient pass through P into the class vectors.
        hardness: HC by class (vector), by the true class (scalar), or 1 (none).
        number: False replaces NC by 1.
    Source: IWB, AAAI 2024, Eq. 3–8.
    """

    log_base: LogBase = "2"
    direction: Direction = "norms-to-target"
    kl_weight: float | Literal["batch"] = 1.0
    detach_target: bool = True
    hardness: Hardness = "vector"
    number: bool = True
    divergence: Divergence = "kl"

    @property
    def moving_target(self) -> bool:
        """True where gradient passes through P into the class vectors."""
        return not self.detach_target and self.hardness != "none"

    @property
    def needs_every_target(self) -> bool:
        """True where P of every sample is needed, not only its mean over the batch."""
        return self.moving_target or (self.divergence == "kl" and self.direction == "target-to-norms")

    @property
    def codes(self) -> list[int]:
        """The numbers of the C kernel for the switches KERNEL_SWITCHES, as its enums count them."""
        return [_VALUES[name].index(getattr(self, name)) for name in KERNEL_SWITCHES]


KERNEL_SWITCHES = ("divergence", "direction", "hardness")  # in the order of `struct head` in csrc/kernel.h
PRESETS: dict[str, tuple[Penalty, CBLoss]] = {
    "mixed": (Penalty(), "bce"),  # penalty of the text, loss of the code: see docs/results.md
    "paper": (Penalty(), "softmax"),
    "code": (Penalty(log_base="e", direction="target-to-norms", kl_weight="batch", detach_target=False), "bce"),
}
_VALUES: dict[str, tuple] = {
    "log_base": ("2", "e"),
    "direction": ("norms-to-target", "target-to-norms"),
    "hardness": ("vector", "scalar", "none"),
    "divergence": ("kl", "mse"),
    "detach_target": (True, False),
    "number": (True, False),
}


def penalty(formulation: str = "paper", **switches: Any) -> Penalty:
    """Return the penalty of a preset, changed by the switches that are not None.

    Raises: ConfigError: unknown formulation or value.
    """
    return replace(_preset(formulation)[0], **{k: _checked(k, v) for k, v in switches.items() if v is not None})


def preset_cb(formulation: str) -> CBLoss:
    """Return the form of the class-balanced loss of a formulation."""
    return _preset(formulation)[1]


def _preset(formulation: str) -> tuple[Penalty, CBLoss]:
    if formulation not in PRESETS:
        raise ConfigError(f"no formulation {formulation!r}; known: {', '.join(PRESETS)}{nearest(formulation, PRESETS)}")
    return PRESETS[formulation]


def _checked(name: str, value: Any) -> Any:
    if name == "kl_weight":
        if value == "batch" or (isinstance(value, int | float) and 0 <= value < float("inf")):
            return value
        raise ConfigError(f"kl_weight {value!r}: expected a number of 0 or more, or 'batch'")
    if value not in _VALUES[name]:
        raise ConfigError(f"{name} {value!r}: expected one of {', '.join(map(str, _VALUES[name]))}")
    return value


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
