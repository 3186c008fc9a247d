"""The average of a training's weights over its steps."""

import copy

import torch
from torch import Tensor

from pipeline.backbone.image_classifier import ImageClassifier


class WeightAverage:
    """A copy of a classifier whose weights are the exponential moving average of the original's.

    Batch statistics are averaged like parameters, not copied: those of a step belong to the weights of that step, so their
    average belongs to the averaged weights. Integers (the number of batches) are copied.

    Source: Polyak averaging; the warm-up of the decay as in TensorFlow's ExponentialMovingAverage with num_updates.
    """

    def __init__(self, classifier: ImageClassifier, *, decay: float):
        self.decay = decay
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self._pairs: list[list[list[Tensor]]] | None = (
            None  # (average, original) of floating-point tensors, of integers
        )

    @torch.no_grad()
    def update(self, classifier: ImageClassifier, *, step: int) -> None:
        """Move the average towards the weights after optimiser step `step`, counted from 0 over all epochs."""
        if self._pairs is None:  # not before: converted modules keep parameters, but are made after this object
            pairs = [
                pair
                for kind in ("parameters", "buffers")
                for pair in zip(getattr(self.classifier, kind)(), getattr(classifier, kind)(), strict=True)
            ]
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            integers = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._pairs = [
                list(map(list, zip(*some, strict=True))) if some else [[], []] for some in (floats, integers)
            ]
        (averaged, live), (averaged_counts, counts) = self._pairs
        torch._foreach_lerp_(averaged, live, 1 - decay_at(step, self.decay))
        if counts:
            torch._foreach_copy_(averaged_counts, counts)


def decay_at(step: int, decay: float) -> float:
    """Return the share of the old average that a step keeps: min(decay, (1 + step)/(10 + step)), which forgets the start."""
    return min(decay, (1 + step) / (10 + step))
