"""The loss of stage 1, as per-sample terms and what their sum is divided by: the global batch decides, not the rank count."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

UNREADABLE = -100  # label of a black image that stands for one that cannot be read


class Objective:
    """What is minimised: Σ_i terms_i / denominator over the global batch."""

    def __init__(self, settings: Any, counts: np.ndarray, *, device: torch.device):
        self.settings, self.counts = settings, counts

    def terms(self, logits: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """(B,) of logits (B, C) and labels (B,); 0 where the label is UNREADABLE."""
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=UNREADABLE)

    def denominator(self, labels: np.ndarray, *, epoch: int) -> float:
        """What the sum over a global batch of these labels is divided by."""
        return len(labels)
