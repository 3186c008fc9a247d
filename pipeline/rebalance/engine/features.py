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
class FeatureSplit:
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
        check_head_and_labels(self.labels, self.counts, self.weight, self.bias)
        shape = self.views[0].shape if len(self.views) else "no view"
        expected = len(self.labels), self.weight.shape[1]
        if shape != expected:
            raise DataError(f"training features are {shape}, expected {expected} from labels and head")

    def view_of_epoch(self, epoch: int, *, augmented: bool) -> int:
        """Return the view that an epoch sees: the augmented ones in turn, or the clean one where there is no other."""
        return 1 + epoch % (len(self.views) - 1) if augmented and len(self.views) > 1 else 0


def check_head_and_labels(labels: np.ndarray, counts: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> None:
    """Raise DataError where all but the features do not fit together, or the head is not finite; shapes as in Features."""
    classes = len(weight)
    if len(counts) != classes or len(bias) != classes:
        raise DataError(f"{classes} class vectors but {len(counts)} counts and {len(bias)} biases")
    absent = np.flatnonzero(np.asarray(counts) < 1)
    if len(absent):
        raise DataError(f"no training image in {_class_list(absent)}: leave such classes out or add images")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        reach = f"{labels.min()} to {labels.max()}"
        raise DataError(f"labels reach from {reach}, but there are {classes} classes")
    numbers = np.bincount(labels, minlength=classes)
    if not np.array_equal(numbers, counts):
        c = int(np.flatnonzero(numbers != counts)[0])
        raise DataError(f"class {c} has {numbers[c]} training labels but a count of {counts[c]}")
    check_finite(weight, "the stage-1 class vectors")
    check_finite(bias, "the stage-1 bias")


def check_finite(array: np.ndarray, name: str) -> None:
    """Raise DataError naming the array and its first row that holds NaN or infinity."""
    good = np.isfinite(array).reshape(len(array), -1).all(1)
    if not good.all():
        bad = np.flatnonzero(~good)
        raise DataError(f"{name}: {len(bad)} of {len(array)} rows hold NaN or infinity, first row {bad[0]}")


def _class_list(classes: np.ndarray, most: int = 8) -> str:
    names = ", ".join(map(str, classes[:most])) + (f" and {len(classes) - most} more" if len(classes) > most else "")
    return f"class {names}" if len(classes) == 1 else f"classes {names}"
