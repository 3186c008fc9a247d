"""What is fitted: one head's loss and penalty, and the schedule that all heads of a job share."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pipeline.longtail import class_balanced_weights, log_prior
from pipeline.rebalance.engine.formulation import CBLoss, Penalty
from pipeline.rebalance.engine.target import number_coefficient

ALONE = Penalty(kl_weight=0.0)


@dataclass(frozen=True)
class Form:
    """What heads must share to advance together; penalty.kl_weight counts only as being `batch` or not."""

    cb: CBLoss
    penalty: Penalty

    @property
    def moving_target(self) -> bool:
        """Whether gradient passes through P into the class vectors."""
        return not self.penalty.detach_target and self.penalty.hardness != "none"

    @property
    def needs_every_target(self) -> bool:
        """Whether P of every sample is needed, not only its mean over the batch."""
        return self.moving_target or (self.penalty.divergence == "kl" and self.penalty.direction == "target-to-norms")


@dataclass(frozen=True)
class Head:
    """One head to fit: its classification loss, λ and penalty. ALONE is the loss without a penalty.

    tau: the loss sees z + τ·ln π, the head that comes out is z: the logit-adjusted loss [Menon et al., ICLR 2021, Eq. 10],
    with `ce` and τ = 1 balanced softmax [Ren et al., NeurIPS 2020]. The penalty sees no difference.
    """

    loss: Literal["ce", "cb-softmax", "cb-bce"]
    lam: float = 0.0
    penalty: Penalty = ALONE
    beta: float = 0.9999
    tau: float = 0.0

    @property
    def penalised(self) -> bool:
        return self.penalty.kl_weight != 0

    @property
    def form(self) -> Form:
        """What decides with which other heads this one can advance; the rest is a number of each head's own."""
        mode: float | Literal["batch"] = "batch" if self.penalty.kl_weight == "batch" else 1.0
        rule = replace(self.penalty, kl_weight=mode, log_base="2", number=True)
        return Form("bce" if self.loss == "cb-bce" else "softmax", rule)

    @property
    def weighting(self) -> tuple[str, float]:
        """Heads that agree in this give every sample the same loss weight."""
        return (self.loss, 0.0 if self.loss == "ce" else self.beta)

    @property
    def kl_weight(self) -> float:
        """The factor beside the batch size, where that is one too."""
        return 1.0 if self.penalty.kl_weight == "batch" else float(self.penalty.kl_weight)

    def prior(self, counts: Tensor) -> Tensor:
        """τ·ln π (C,): it goes into the bias before training and out of it afterwards."""
        return self.tau * log_prior(counts)

    def half_target(self, counts: Tensor) -> Tensor:
        """λ·NC/2 (C,), which makes P with 1 − cosine."""
        rule = self.penalty
        nc = number_coefficient(counts, log_base=rule.log_base) if rule.number else torch.ones_like(counts)
        return self.lam * nc / 2


def class_weights(counts: Tensor, loss: str, beta: float) -> Tensor:
    """Loss weight of a sample by its class (C,), of a head's `weighting`."""
    return torch.ones_like(counts) if loss == "ce" else class_balanced_weights(counts, beta=beta)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: SGD with momentum, the learning rate on a cosine to 0, one value an epoch."""

    epochs: int = 10
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    augmented: bool = True

    def lr_of(self, epoch: int) -> float:
        return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
