"""Validation without a validation split: folds of the cached training features."""

import numpy as np

from pipeline.seeds import derive

CAVEAT = (
    "chosen over folds of the training features: encoder and stage-1 head have seen these images, so the scores are "
    "optimistic, more so for rows that keep that head: they may rank the λ of one method, not methods"
)


REFITTED = (
    "chosen over folds of the training features: every head, the linear probe included, was fitted without the samples it is "
    "scored on"
)


def stratified_folds(labels: np.ndarray, *, folds: int = 5) -> np.ndarray:
    """Return the fold (N,) of each sample, a function of the labels alone; −1 for the only sample of a class.

    Every class is spread evenly over the folds, beginning at another fold than the class before. A fold of −1 is never
    held out.
    """
    fold = np.full(len(labels), -1)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        if len(rows) > 1:
            shuffled = np.random.default_rng(derive(0, "fold", int(c))).permutation(rows)
            fold[shuffled] = (np.arange(len(rows)) + c) % folds
    return fold
