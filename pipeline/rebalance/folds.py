"""Validation without a validation split: folds of the cached training features."""

import numpy as np

from pipeline.seeds import derive

CAVEAT = (
    "chosen over folds of the training features: encoder and stage-1 head have seen these images, so the scores are "
    "optimistic, more so for rows that keep that head: they may rank the λ of one method, not methods"
)


def stratified_folds(labels: np.ndarray, *, folds: int = 5) -> np.ndarray:
    """The fold (N,) of each sample; −1 for the sample of a class that has only one, which is never held out.

    Every class is spread over the folds as evenly as can be, each class beginning at another fold. A function of the
    labels alone.
    """
    fold = np.full(len(labels), -1)
    for c in np.unique(labels):
        mine = np.flatnonzero(labels == c)
        if len(mine) > 1:
            shuffled = np.random.default_rng(derive(0, "fold", int(c))).permutation(mine)
            fold[shuffled] = (np.arange(len(mine)) + c) % folds
    return fold
