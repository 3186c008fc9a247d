"""The average of a training's weights over its steps."""

import copy

import torch
from torch import Tensor

from pipeline.backbone.image_classifier import ImageClassifier


class WeightAverage:
    """A classifier of its own whose weights are the exponential moving average of another's. [Polyak averaging; the decay's
    warm-up as in Abadi et al., TensorFlow's ExponentialMovingAverage with num_updates]

    Batch statistics are averaged like parameters, not copied: those of a step belong to the weights of that step, so their
    average belongs to the averaged weights. Whole numbers (how many batches there were) are copied.
    """

    def __init__(self, classifier: ImageClassifier, *, decay: float):
        self.decay = decay
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self._pairs: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update(self, classifier: ImageClassifier, *, step: int) -> None:
        """Moves the average towards the weights after optimiser step `step`, counted from 0 over all epochs."""
        if self._pairs is None:  # not before: converted modules keep parameters, but are made after this object
            mine, theirs = ([*of.parameters(), *of.buffers()] for of in (self.classifier, classifier))
            moving = [t.is_floating_point() for t in mine]
            self._pairs = tuple(  # type: ignore[assignment]
                [t for t, moves in zip(of, moving, strict=True) if moves is wanted]
                for wanted in (True, False)
                for of in (mine, theirs)
            )
        averaged, live, counted, counts = self._pairs  # type: ignore[misc]
        torch._foreach_lerp_(averaged, live, 1 - decay_at(step, self.decay))
        if counted:
            torch._foreach_copy_(counted, counts)


def decay_at(step: int, decay: float) -> float:
    """The share of the old average that a step keeps: min(decay, (1 + step)/(10 + step)), so that the start is forgotten."""
    return min(decay, (1 + step) / (10 + step))
