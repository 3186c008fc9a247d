"""The spread of the features of a class around its mean, from sums of directions: one pass, whatever the number of rows."""

from dataclasses import dataclass

import numpy as np

from cache import Cache

PASS_FOR_A_FIGURE = 2**30  # numbers, seconds to read; a figure is not worth more


@dataclass(frozen=True, eq=False)
class Directions:
    """Sums (C, D) of the features of every class, each scaled to length 1, and how many (C,) were summed."""

    sums: np.ndarray
    number: np.ndarray

    @property
    def plain(self) -> np.ndarray:
        """(C,) one less the mean cosine of a class's features to their mean: 1 − R, R the length of the mean direction.

        nan for a class without a feature. A mean lies nearer to few features than to many: `dispersion` corrects it.
        """
        length = np.linalg.norm(self.sums, axis=1)
        return np.where(self.number > 0, 1 - length / np.maximum(self.number, 1), np.nan)

    @property
    def alike(self) -> np.ndarray:
        """(C,) mean cosine of two different features of a class, (‖Σu‖² − n) / (n (n − 1)); nan for fewer than two."""
        n = self.number.astype(np.float64)
        pairs = (np.square(self.sums).sum(1) - n) / np.maximum(n * (n - 1), 1)
        return np.where(n > 1, pairs, np.nan)

    @property
    def dispersion(self) -> np.ndarray:
        """(C,) one less the mean cosine to the class mean as infinitely many such features would have it: 1 − √alike.

        0 where all point one way, 1 where they point anywhere, or half of them the opposite way; nan for fewer than two.
        """
        return 1 - np.sqrt(np.maximum(self.alike, 0))

    def around(self, reference: "Directions") -> np.ndarray:
        """(C,) one less the mean cosine of these features to the class mean of the others, that one free of its noise.

        nan where there is no feature, or where the others are fewer than two or point anywhere.
        """
        across = np.einsum("cd,cd->c", self.sums, reference.sums) / np.maximum(self.number * reference.number, 1)
        defined = (self.number > 0) & (np.nan_to_num(reference.alike) > 0)
        return np.where(defined, 1 - across / np.sqrt(np.where(defined, reference.alike, 1)), np.nan)


def directions(features: np.ndarray, labels: np.ndarray, classes: int) -> Directions:
    """Return the class sums of unit features (n, D) with labels (n,).

    A feature that is all zeros has no direction and is left out.
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(np.where(lengths[:, 0] > 0, labels, classes), kind="stable")[: int((lengths > 0).sum())]
    unit, sorted_labels = features[order] / lengths[order], labels[order]
    present, starts = np.unique(sorted_labels, return_index=True)
    sums = np.zeros((classes, features.shape[1]))
    if len(present):
        sums[present] = np.add.reduceat(unit, starts, axis=0, dtype=np.float64)
    return Directions(sums, np.bincount(sorted_labels, minlength=classes))


def read_directions(store: Cache, split: str) -> Directions | None:
    """Return the directions of the clean view of a split, read in whole chunks.

    None where the store has no such split, or where reading would take minutes.
    """
    if split not in store.splits or store.rows(split) * store.width > PASS_FOR_A_FIGURE:
        return None
    labels, valid, classes = store.labels(split), store.valid(split), len(store.counts)
    sums, number = np.zeros((classes, store.width)), np.zeros(classes, np.int64)
    for chunk in store.chunks(split):
        rows = slice(chunk.start, chunk.stop)
        usable = valid[rows]
        part = directions(store.read_chunk(chunk)[usable].astype(np.float32), labels[rows][usable], classes)
        sums += part.sums
        number += part.number
    return Directions(sums, number) if number.any() else None
