"""Long-tailed and step subsets and held-out samples: pure functions of labels and a seed."""

import numpy as np

SHARE, HELD_OUT, SMALLEST_SPLIT = (
    0.15,
    (2, 50),
    5,
)  # of a class: share held out, its limits, smallest class that is split
SUBSET_SPLIT = 20  # validation and test images of a class beside a subset, where nothing else is asked for


def class_sizes(*, classes: int, largest: int, imbalance: float, shape: str) -> np.ndarray:
    """(classes,) int64 images to keep of each class, class order = label order.

    exponential: int(largest · imbalance^(−c/(C−1))) (Cui et al., CVPR 2019); step: the first half keeps `largest`, the
    second largest / imbalance (Buda et al., 2018); none: all `largest`. Never less than one.
    """
    c = np.arange(classes)
    if shape == "exponential":
        sizes = [int(largest * imbalance ** (-k / max(classes - 1, 1))) for k in c]
    elif shape == "step":
        sizes = [largest if k < classes // 2 else int(largest / imbalance) for k in c]
    else:
        sizes = [largest] * classes
    return np.maximum(np.array(sizes, dtype=np.int64), 1)


def long_tail(labels: np.ndarray, sizes: np.ndarray, *, val_per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the subset, positions of a validation set from what is left over), both in class order.

    RandomState(seed), classes in order, shuffle the class's positions, keep the first sizes[c], validate on the next
    val_per_class: the public CIFAR-LT recipe. A class with fewer left over gives what it has.
    """
    random = np.random.RandomState(seed)
    selected, left = [], []
    for size, order in zip(sizes, of_each_class(labels, len(sizes)), strict=True):
        random.shuffle(order)
        selected.append(order[:size])
        left.append(order[size : size + val_per_class])
    return np.concatenate(selected), np.concatenate(left)


def held_out_sizes(counts: np.ndarray, per_class: int | None) -> np.ndarray:
    """Return how many images (C,) of classes of the given sizes (C,) are held out for one split.

    Arguments:
        per_class: min(per_class, N_c // 5) of each class, none of classes under 5; None for 15 %, at least 2 and at most 50,
            none of classes under 5.
    """
    if per_class is not None:
        return np.minimum(per_class, counts // 5)
    return np.where(counts < SMALLEST_SPLIT, 0, np.clip(np.round(SHARE * counts), *HELD_OUT)).astype(np.int64)


def hold_out(labels: np.ndarray, sizes: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (positions that stay, positions held out), sizes[c] of class c at random."""
    random = np.random.RandomState(seed)
    held_out = []
    for size, order in zip(sizes, of_each_class(labels, len(sizes)), strict=True):
        random.shuffle(order)
        held_out.append(order[:size])
    out = np.zeros(len(labels), bool)
    out[np.concatenate(held_out)] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def of_each_class(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """The positions of each class's samples, ascending: one sort for all, however many classes."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, classes)))
