"""mixup (Zhang et al., ICLR 2018): training on convex combinations of two images and of their losses."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.weakening import partners
from pipeline.data.copies import on_device
from pipeline.seeds import derive, uniform


@dataclass(frozen=True)
class Mixture:
    """The mixture λ·x_i + (1 − λ)·x_j(i) of a part of a batch; with no partner it stays as it is."""

    lam: float = 1.0
    partner: Tensor | None = None

    def images(self, pixels: Tensor) -> Tensor:
        """Return the mixed images (B, 3, H, W)."""
        return pixels if self.partner is None else torch.lerp(pixels, pixels[self.partner], 1 - self.lam)

    def terms(self, losses: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
        """Return (B,) λ·l(y_i) + (1 − λ)·l(y_j(i)), where `losses` gives the per-sample losses l of any labels (B,)."""
        if self.partner is None:
            return losses(labels)
        return self.lam * losses(labels) + (1 - self.lam) * losses(labels[self.partner])


class Mixup:
    """The mixtures of every step of a training: a function of (seed, epoch, step, sample) alone."""

    def __init__(self, alpha: float, *, group: int, seed: int, device: torch.device):
        """alpha: 0 is off. group: rows of the global batch among which partners are drawn; they stay on one rank."""
        self.alpha, self.seed, self.device = alpha, seed, device
        self.group = group if alpha else 1

    def mixture(self, rows: np.ndarray, labels: Tensor, *, epoch: int, step: int) -> Mixture:
        """Return the mixture of a part of a batch with training positions rows (B,): one λ ~ Beta(α, α) for all of the step.

        labels: (B,), negative for an image that could not be read; nobody is mixed with it.
        """
        if not self.alpha:
            return Mixture()
        key = derive(self.seed, "mixup", epoch, step)
        lam = float(np.random.default_rng(key).beta(self.alpha, self.alpha))
        partner = on_device(partners(uniform(key, rows, 1)[:, 0], group=self.group), self.device)
        itself = torch.arange(len(rows), device=self.device)
        return Mixture(lam, torch.where(labels[partner] < 0, itself, partner))
