"""Which image is seen when, and by which rank: pure functions, so that resuming is skipping."""

import math

import numpy as np

from pipeline.seeds import derive


def steps_of(rows: int, batch_size: int) -> int:
    """Optimiser steps an epoch: every image once, in batches of equal size (±1), none dropped."""
    return max(1, math.ceil(rows / batch_size))


def epoch_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """(N,) positions of the training images in the order in which an epoch sees them."""
    return np.random.default_rng(derive(seed, "order", epoch)).permutation(len(labels))


def shares(batch: np.ndarray, *, world: int, parts: int = 1, group: int = 1) -> list[list[np.ndarray]]:
    """The parts of a global batch by rank: `parts` arrays for each of `world` ranks, sizes equal (±group), order kept.

    group: so many consecutive rows stay together, the last ones of a batch being fewer.
    """
    groups = np.array_split(np.arange(math.ceil(len(batch) / group)), world * parts)
    pieces = [batch[g[0] * group : (g[-1] + 1) * group] if len(g) else batch[:0] for g in groups]
    return [pieces[rank * parts : (rank + 1) * parts] for rank in range(world)]
