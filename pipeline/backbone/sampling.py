"""The order of the training images, and their shares by rank: pure functions, so that resuming is skipping."""

import math
from typing import NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.seeds import derive, uniform

GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples fill the unit interval most evenly


def steps_of(rows: int, batch_size: int) -> int:
    """Return the optimiser steps an epoch: all images, in batches of equal size (±1), none dropped."""
    return max(1, math.ceil(rows / batch_size))


def epoch_order(labels: np.ndarray, *, seed: int, epoch: int, sampler: str = "instance") -> np.ndarray:
    """Return (N,) positions of the training images in the order in which an epoch sees them.

    instance: every image once. class-balanced: each class as often as any other; square-root: in proportion to √N_c.
    [samplers: Kang et al., ICLR 2020, Eq. 1 with q = 1, 0, 1/2] These two give each class its `quotas`, and its images in
    rounds that go on from epoch to epoch: all of the class once, in random order, before any of them again.
    """
    shuffled = np.random.default_rng(derive(seed, "order", epoch)).permutation(len(labels))
    if sampler == "instance":
        return shuffled
    epoch_quotas = quotas(np.bincount(labels), sampler=sampler, seed=seed, epochs=epoch + 1)
    return _from_rounds(labels, first=epoch_quotas[:-1].sum(0), many=epoch_quotas[-1], seed=seed)[shuffled]


class TrainingBatch(NamedTuple):
    """A global batch.

    Arguments:
        rows: positions of all its training images.
        parts: this rank's share of them, in the parts whose gradients are added up.
        draws: shaped like `parts`, how often each image was drawn before in the epoch.
    """

    rows: np.ndarray
    parts: list[np.ndarray]
    draws: list[np.ndarray]


def epoch_batches(
    labels: np.ndarray,
    *,
    seed: int,
    epoch: int,
    sampler: str,
    steps: int,
    rank: int,
    world: int,
    parts: int,
    group: int,
) -> list[TrainingBatch]:
    """Return the global batches of an epoch, one a step, with the share of a rank in each.

    Arguments:
        labels: (N,) of the training images.
        seed, epoch: give the order, the same on every rank.
        sampler: instance, class-balanced or square-root.
        parts: in which a rank computes its share of a batch.
        group: images of a batch that are mixed among themselves; no part divides one.
    """
    order = epoch_order(labels, seed=seed, epoch=epoch, sampler=sampler)
    batches, draws = (np.array_split(array, steps) for array in (order, nth_draw(order)))
    return [
        TrainingBatch(rows, *(shares(array, world=world, parts=parts, group=group)[rank] for array in (rows, nth)))
        for rows, nth in zip(batches, draws, strict=True)
    ]


def quotas(counts: np.ndarray, *, sampler: str, seed: int, epochs: int) -> np.ndarray:
    """Return (epochs, C) draws of each class in the first epochs, N in each epoch, from counts (C,) of images.

    A class whose share of N is no whole number gets the next one below or above (systematic sampling), in turns: its
    total stays within two of its share.
    """
    sizes = {"instance": counts, "class-balanced": counts > 0, "square-root": np.sqrt(counts)}[sampler].astype(float)
    total = counts.sum()
    edges = np.cumsum(sizes) * (total / sizes.sum())
    edges[-1] = total
    start = uniform(derive(seed, "quotas"), [0], 1)[0, 0]
    turns = (start + GOLDEN * np.arange(epochs)) % 1
    return np.diff(np.floor(edges + turns[:, None]).astype(np.int64), prepend=0)


def nth_draw(order: np.ndarray) -> np.ndarray:
    """Return (N,) how often each position of an order occurred before: 0 everywhere if none is drawn twice."""
    by = np.argsort(order, kind="stable")
    place = np.arange(len(order))
    new = np.r_[True, order[by][1:] != order[by][:-1]] if len(order) else np.zeros(0, bool)
    draws = np.empty(len(order), np.int64)
    draws[by] = place - np.maximum.accumulate(np.where(new, place, 0))
    return draws


def shares(batch: np.ndarray, *, world: int, parts: int = 1, group: int = 1) -> list[list[np.ndarray]]:
    """Return the parts of a global batch by rank: `parts` arrays for each of `world` ranks, equal in size (±group).

    Arguments:
        group: so many consecutive rows stay together; the last group of a batch may be smaller.
    """
    groups = np.array_split(np.arange(math.ceil(len(batch) / group)), world * parts)
    pieces = [batch[g[0] * group : (g[-1] + 1) * group] if len(g) else batch[:0] for g in groups]
    return [pieces[rank * parts : (rank + 1) * parts] for rank in range(world)]


def rank_batches(rows: np.ndarray, *, rank: int, world: int, size: int = 256) -> list[np.ndarray]:
    """Return a rank's share of the rows, which is evaluated in batches of at most `size`, every row on one rank."""
    share = np.array_split(rows, world)[rank]
    return np.array_split(share, math.ceil(len(share) / size)) if len(share) else []


def refuse_empty_shares(batch: int, world: int, parts: int, *, group: int) -> None:
    """Raise ConfigError where a rank or part would get none of the `batch` images of the smallest global batch."""
    if math.ceil(batch / group) >= world * parts:
        return
    several = f" in backbone.accumulate={parts} parts each" if parts > 1 else ""
    together = (
        f" of whole groups of {group} images that are mixed among themselves (backbone.weaken.group)"
        if group > 1
        else ""
    )
    raise ConfigError(
        f"backbone.batch_size: batches, equal over an epoch, have {batch} images: too few for {world} rank(s){several}"
        f"{together}; take batches of {world * parts * group} or more"
        f"{f', backbone.weaken.group={batch // (world * parts)} or less' * (batch >= world * parts)} or fewer ranks"
    )


def _from_rounds(labels: np.ndarray, *, first: np.ndarray, many: np.ndarray, seed: int) -> np.ndarray:
    """Return positions first … first + many − 1 (C,) of each class's endless sequence of rounds, class by class."""
    counts = np.maximum(np.bincount(labels), 1)
    start = first // counts
    rounds = np.where(many > 0, (first + many - 1) // counts - start + 1, 0)
    repeats = rounds[labels]
    position = np.repeat(np.arange(len(labels)), repeats)
    of_round = np.arange(len(position)) - np.repeat(np.cumsum(repeats) - repeats, repeats) + start[labels][position]
    key = uniform(derive(seed, "rounds"), position + len(labels) * of_round, 1)[:, 0]
    by = np.lexsort((key, of_round, labels[position]))
    of_class = labels[position[by]]
    begins = np.cumsum(rounds * counts) - rounds * counts
    place = np.arange(len(by)) - begins[of_class] + (start * counts)[of_class]
    return position[by][(place >= first[of_class]) & (place < (first + many)[of_class])]
