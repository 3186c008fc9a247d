"""The batches that a network is trained and validated on."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.arithmetic import Arithmetic
from pipeline.backbone.losses import UNREADABLE
from pipeline.data.copies import on_device
from pipeline.data.dataset import Split
from pipeline.data.transform import Loader, Transform


class LabelledImages:
    """The images of a split with their labels, on a device.

    Arguments:
        skip: whether an image that cannot be read is black with the label UNREADABLE; else it raises DataError.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        arithmetic: Arithmetic,
        *,
        device: torch.device,
        workers: int,
        skip: bool,
    ):
        self.labels, self.arithmetic, self.device, self.skip = split.labels, arithmetic, device, skip
        self._loader = Loader(split, transform, device=device, workers=workers)

    def batches(
        self, rows: Sequence[np.ndarray], *, key: int | None = None, draws: Sequence[np.ndarray] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (pixels (B, 3, H, W), labels (B,)) of each array of positions.

        Arguments:
            key: of the augmentation; None for the evaluation transform.
            draws: shaped like `rows`, how often each position was drawn before; every draw is augmented another way.
        """
        unreadable: list[int] = []
        note = unreadable.append if self.skip else None
        images = self._loader.batches(rows, key=key, draws=draws, unreadable=note)
        for positions, pixels in zip(rows, images, strict=True):
            labels = self.labels[positions]
            if unreadable:
                labels = np.where(np.isin(positions, unreadable), UNREADABLE, labels)
            unreadable.clear()
            yield self.arithmetic.arrange(pixels), on_device(labels, self.device)
