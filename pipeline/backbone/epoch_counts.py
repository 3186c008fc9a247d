"""What an epoch's batches come to: right guesses and images by class, and the sum of the loss."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.distributed import Ranks


class Tally:
    """Counts of one rank since the epoch began, on its device."""

    def __init__(self, classes: int, *, device: torch.device):
        # right, seen; the last column takes what could not be read
        self._classes = torch.zeros(2, classes + 1, dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, terms: Tensor) -> None:
        """Counts a part of a batch: logits (B, C), labels (B,), negative if unreadable, terms (B,) of the loss."""
        seen = torch.where(labels < 0, len(self._classes[0]) - 1, labels)
        right = torch.stack([(logits.argmax(1) == labels).double(), torch.ones_like(seen, dtype=torch.float64)])
        self._classes.index_add_(1, seen, right)
        self._loss += terms.sum()

    def total(self, ranks: Ranks) -> tuple[np.ndarray, np.ndarray, float]:
        """(right (C,), seen (C,), sum of the loss) of all ranks."""
        right, seen = ranks.total(self._classes.cpu().numpy())[:, :-1]
        return right, seen, float(ranks.total(self._loss.cpu().numpy()))

    def clear(self) -> None:
        """Begins anew."""
        self._classes.zero_()
        self._loss.zero_()

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """What a checkpoint keeps of it: the sums of all ranks."""
        sums = (ranks.total(of.cpu().numpy()) for of in (self._classes, self._loss))
        return dict(zip(("tally", "loss_sum"), (of.tolist() for of in sums), strict=True))

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` kept, on one rank; nothing where a checkpoint of an earlier version has none."""
        if "tally" in state:
            self._classes.copy_(torch.tensor(state["tally"], dtype=torch.float64))
            self._loss.fill_(state["loss_sum"])
