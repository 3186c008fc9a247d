"""One head to fit: its loss and penalty, and the schedule that all heads of a job share."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pipeline.longtail import class_balanced_weights, log_prior
from pipeline.rebalance.engine.objective import CBLoss, Penalty, number_coefficient
from pipeline.schedule import learning_rate

NO_PENALTY = Penalty(kl_weight=0.0)


@dataclass(frozen=True)
class Form:
    """The kind of loss and penalty that heads share to advance together; of kl_weight only `batch` or not counts."""

    cb: CBLoss
    penalty: Penalty

    @property
    def moving_target(self) -> bool:
        """True where gradient passes through P into the class vectors."""
        return self.penalty.moving_target

    @property
    def needs_every_target(self) -> bool:
        """True where P of every sample is needed, not only its mean over the batch."""
        return self.penalty.needs_every_target


@dataclass(frozen=True)
class Head:
    """One head to fit.

    Arguments:
        lam: λ, the scale of the target P.
        beta: β of the class-balanced losses.
        tau: the loss is taken of z + τ·ln π, and the fitted head is z; the penalty does not depend on it.
    Source: tau: logit-adjusted loss, Menon et al., ICLR 2021, Eq. 10; with `ce` and τ = 1 balanced softmax, Ren et al.,
        NeurIPS 2020.
    """

    loss: Literal["ce", "cb-softmax", "cb-bce"]
    lam: float = 0.0
    penalty: Penalty = NO_PENALTY
    beta: float = 0.9999
    tau: float = 0.0

    @property
    def penalised(self) -> bool:
        return self.penalty.kl_weight != 0

    @property
    def form(self) -> Form:
        """The form that heads share to advance together; all else is a number of the single head."""
        mode: float | Literal["batch"] = "batch" if self.penalty.kl_weight == "batch" else 1.0
        rule = replace(self.penalty, kl_weight=mode, log_base="2", number=True)
        return Form("bce" if self.loss == "cb-bce" else "softmax", rule)

    @property
    def weighting(self) -> tuple[str, float]:
        """The key of the loss weights of samples."""
        return (self.loss, 0.0 if self.loss == "ce" else self.beta)

    @property
    def kl_weight(self) -> float:
        """The factor of the penalty, without the batch size of `batch`."""
        return 1.0 if self.penalty.kl_weight == "batch" else float(self.penalty.kl_weight)

    def prior(self, counts: Tensor) -> Tensor:
        """Return τ·ln π (C,), which is in the bias while the head is fitted."""
        return self.tau * log_prior(counts)

    def half_target(self, counts: Tensor) -> Tensor:
        """Return λ·NC/2 (C,), which times (1 − cosine) is P."""
        rule = self.penalty
        nc = number_coefficient(counts, log_base=rule.log_base) if rule.number else torch.ones_like(counts)
        return self.lam * nc / 2


def class_weights(counts: Tensor, loss: str, beta: float) -> Tensor:
    """Return the loss weight (C,) of a sample by its class, for a head's `weighting`."""
    return torch.ones_like(counts) if loss == "ce" else class_balanced_weights(counts, beta=beta)


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum; the learning rate falls on a cosine to 0, one value per epoch.

    Arguments:
        batch_size: features per step.
        augmented: fit on the augmented views in turn; else on the clean view.
    """

    epochs: int = 10
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    augmented: bool = True

    def lr_of(self, epoch: int) -> float:
        return learning_rate(epoch, peak=self.lr, epochs=self.epochs)
