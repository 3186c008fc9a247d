"""Counts over the batches of an epoch: correct predictions and images by class, and the sum of the loss."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.distributed import Ranks


class EpochCounts:
    """Counts of one rank since the epoch began, on its device."""

    def __init__(self, classes: int, *, device: torch.device):
        # correct, seen; the last column takes what could not be read
        self._classes = torch.zeros(2, classes + 1, dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, terms: Tensor) -> None:
        """Count a part of a batch: logits (B, C), labels (B,), negative if unreadable, terms (B,) of the loss."""
        columns = torch.where(labels < 0, len(self._classes[0]) - 1, labels)
        correct = torch.stack([(logits.argmax(1) == labels).double(), torch.ones_like(columns, dtype=torch.float64)])
        self._classes.index_add_(1, columns, correct)
        self._loss += terms.sum()

    def total(self, ranks: Ranks) -> tuple[np.ndarray, np.ndarray, float]:
        """Return (correct (C,), seen (C,), sum of the loss) of all ranks."""
        correct, readable = ranks.total(self._classes.cpu().numpy())[:, :-1]
        return correct, readable, float(ranks.total(self._loss.cpu().numpy()))

    def clear(self) -> None:
        self._classes.zero_()
        self._loss.zero_()

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """Return the sums of all ranks as a checkpoint keeps them."""
        return {
            "tally": ranks.total(self._classes.cpu().numpy()).tolist(),
            "loss_sum": ranks.total(self._loss.cpu().numpy()).tolist(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load what `state` returned, on one rank; checkpoints before 0.1 hold none."""
        if "tally" in state:
            self._classes.copy_(torch.tensor(state["tally"], dtype=torch.float64))
            self._loss.fill_(state["loss_sum"])


def hits_by_class(predicted: np.ndarray, labels: np.ndarray, *, classes: int) -> np.ndarray:
    """Return (2, C) correct predictions and samples of each class; negative labels do not count."""
    predicted, labels = predicted[labels >= 0], labels[labels >= 0]
    return np.stack([np.bincount(rows, minlength=classes) for rows in (labels[predicted == labels], labels)])
