"""Successive halving: many settings are compared on few training rows, and ever fewer of them on ever more rows.

[Jamieson and Talwalkar, AISTATS 2016] A rung has three times the rows of the one before, and the better third of its settings.
The rows of a rung are stratified by class, and no class loses images below KEPT: few-shot classes keep all of theirs.
"""

from collections.abc import Callable

import numpy as np

from pipeline.seeds import derive

RATIO = 3
SHARES = (1.0, 1 / 3, 1 / 9, 1 / 27)  # of the training rows, on which the first rung may be
KEPT = 20  # images: a class that has fewer is few-shot


def rungs(settings: int, share: float) -> list[tuple[int, float]]:
    """Return (settings, share of the rows) of every rung from a share up to all rows; one setting at least."""
    above = [s for s in reversed(SHARES) if s >= share]
    return [(max(1, -(-settings // RATIO**i)), s) for i, s in enumerate(above)]


def class_sizes(counts: np.ndarray, share: float) -> np.ndarray:
    """Return how many rows (C,) of each class stand in a share of all rows; counts (C,)."""
    return np.maximum(np.minimum(counts, KEPT), np.ceil(share * np.asarray(counts)).astype(np.int64))


def subset_rows(labels: np.ndarray, counts: np.ndarray, share: float) -> np.ndarray:
    """Return the rows (M,) of a share, ascending; a larger share contains them.

    Arguments:
        labels: (N,) of all rows.
        counts: (C,) of them.
    """
    sizes = class_sizes(counts, share)
    parts = [
        np.random.default_rng(derive(0, "subset", c)).permutation(np.flatnonzero(labels == c))[: sizes[c]]
        for c in range(len(counts))
    ]
    return np.sort(np.concatenate(parts))


def share_within(budget: float, seconds: Callable[[float], float]) -> float:
    """Return the largest share whose estimate is within the budget, that of the least estimate where none is.

    Arguments:
        seconds: returns the estimate at a share of the first rung.
    """
    return next((share for share in SHARES if seconds(share) <= budget), min(SHARES, key=seconds))


class SubsetViews:
    """Some rows (M,) of the views of training features, one view in memory at a time."""

    def __init__(self, views, rows: np.ndarray):
        self.views, self.rows = views, rows
        self._number, self._view = -1, np.empty(0)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, view: int) -> np.ndarray:
        if view != self._number:
            self._number, self._view = view, np.asarray(self.views[view][self.rows])
        return self._view
