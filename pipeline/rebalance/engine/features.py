"""The features that stage 2 fits on, as arrays; the engine knows nothing of stores."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.errors import DataError


class Views(Protocol):
    """V views (N, D) of the training samples, by number; view 0 is the clean one.

    A list of arrays, views that are read from a store when they are asked for, or StreamedViews.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, view: int, /) -> Any: ...


@dataclass(frozen=True)
class Split:
    """Features (M, D) of the evaluation transform with their labels (M,)."""

    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Features:
    """Training features and the stage-1 head.

    Arguments:
        views: V views (N, D).
        labels: (N,).
        counts: (C,) training images of each class.
        weight: (C, D) class vectors of stage 1.
        bias: (C,).
    Raises: DataError: they do not fit together, or the head is not finite.
    """

    views: Views
    labels: np.ndarray
    counts: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def __post_init__(self):
        classes, width = self.weight.shape
        if len(self.counts) != classes or len(self.bias) != classes:
            raise DataError(f"{classes} class vectors but {len(self.counts)} counts and {len(self.bias)} biases")
        absent = np.flatnonzero(np.asarray(self.counts) < 1)
        if len(absent):
            raise DataError(f"no training image in {_class_list(absent)}: leave such classes out or add images")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < classes:
            reach = f"{self.labels.min()} to {self.labels.max()}"
            raise DataError(f"labels reach from {reach}, but there are {classes} classes")
        numbers = np.bincount(self.labels, minlength=classes)
        if not np.array_equal(numbers, self.counts):
            c = int(np.flatnonzero(numbers != self.counts)[0])
            raise DataError(f"class {c} has {numbers[c]} training labels but a count of {self.counts[c]}")
        shape = self.views[0].shape if len(self.views) else "no view"
        if shape != (len(self.labels), width):
            raise DataError(f"training features are {shape}, expected {(len(self.labels), width)} from labels and head")
        check_finite(self.weight, "the stage-1 class vectors")
        check_finite(self.bias, "the stage-1 bias")

    def view_of_epoch(self, epoch: int, *, augmented: bool) -> int:
        """Return the view that an epoch sees: the augmented ones in turn, or the clean one where there is no other."""
        return 1 + epoch % (len(self.views) - 1) if augmented and len(self.views) > 1 else 0


def check_finite(array: np.ndarray, name: str) -> None:
    """Raise DataError naming the array and its first row that holds NaN or infinity."""
    good = np.isfinite(array).reshape(len(array), -1).all(1)
    if not good.all():
        bad = np.flatnonzero(~good)
        raise DataError(f"{name}: {len(bad)} of {len(array)} rows hold NaN or infinity, first row {bad[0]}")


def _class_list(classes: np.ndarray, most: int = 8) -> str:
    names = ", ".join(map(str, classes[:most])) + (f" and {len(classes) - most} more" if len(classes) > most else "")
    return f"class {names}" if len(classes) == 1 else f"classes {names}"
