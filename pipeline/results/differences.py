"""Paired differences of test accuracy between rows on the same samples, with bootstrap intervals."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.longtail import GROUPS, group_index
from pipeline.results.documents import HeadEntry, checked
from pipeline.results.files import header, tensor_file
from pipeline.results.head_id import HeadId
from pipeline.seeds import derive

RESAMPLES, LEVEL = 2000, 0.95
Column = dict[str, float] | None


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    counts: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Column]:
    """all, many, medium, few: {difference, low, high} of balanced accuracy in points, first less second.

    first, second (M,): how often, of 0…1, each is right on a sample; labels (M,); counts (C,) training images decide the
    groups. low and high bound the middle 95 % of a bootstrap over samples: each class is drawn anew from its own samples,
    the same draw for both, and the spread is that of other images, n/(n − 1) times the variance of the draws. None for a
    group without a sample. A class with a single sample adds nothing to the spread: `metrics.scarce` names them.
    """
    values, code = np.unique(np.round(first - second, 12), return_inverse=True)
    classes = len(counts)
    table = np.bincount(labels * len(values) + code, minlength=classes * len(values)).reshape(classes, -1)
    sampled = table.sum(1) > 0
    group = group_index(counts)
    # classes with equal sizes and equal values are drawn together: the sum of their draws is one larger draw
    kinds, alike = np.unique(np.column_stack([group, table])[sampled], axis=0, return_counts=True)
    random = np.random.default_rng(derive(seed, "bootstrap"))
    point, resampled, sizes = np.zeros(len(GROUPS)), np.zeros((len(GROUPS), resamples)), np.zeros(len(GROUPS))
    for (g, *row), number in zip(kinds, alike, strict=True):
        present = np.flatnonzero(row)
        share = np.array(row)[present] / np.sum(row)
        point[g] += number * (share @ values[present])
        images, expected = int(np.sum(row)), number * (share @ values[present])
        drawn = random.multinomial(number * images, share, size=resamples) @ values[present] / images
        # a bootstrap of n images spreads √((n − 1)/n) as wide as other images would
        resampled[g] += expected + (drawn - expected) * np.sqrt(images / max(images - 1, 1))
        sizes[g] += number
    columns = {"all": _column(point.sum(), resampled.sum(0), sizes.sum())}
    return columns | {name: _column(point[g], resampled[g], sizes[g]) for g, name in enumerate(GROUPS)}


def _column(point: float, resampled: np.ndarray, classes: float) -> Column:
    if not classes:
        return None
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {name: float(100 * v / classes) for name, v in (("difference", point), ("low", low), ("high", high))}


@dataclass(frozen=True, eq=False)
class Hits:
    """The test samples that each head classifies correctly.

    Arguments:
        heads: H entries with method, loss, lam, … and seed.
        hit: (H, M) bool.
        labels: (M,) true classes.
        counts: (C,) training samples.
    """

    heads: Sequence[Mapping[str, Any]]
    hit: np.ndarray
    labels: np.ndarray
    counts: np.ndarray

    def rate(self, facts: Mapping[str, Any]) -> np.ndarray:
        """(M,) share of a setting's seeds that are right on each sample."""
        rows = [i for i, head in enumerate(self.heads) if HeadId.of_row(facts).matches(head)]
        return self.hit[rows].mean(0)

    def to_bytes(self) -> bytes:
        """A safetensors file, a bit for each sample and head."""
        bits, labels = np.packbits(self.hit, axis=1), self.labels.astype(np.int32)
        summary = {"test images": f"{len(labels):,}", "heads": len(self.heads)}
        metadata = {"header": json.dumps(header("hits", summary)), "heads": json.dumps(list(self.heads))}
        return tensor_file({"hit": bits, "labels": labels, "counts": np.asarray(self.counts)}, metadata)


def read_hits(path: Path) -> Hits:
    """Read a file of Hits.to_bytes; DataError where it is missing or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            entries, labels = json.loads((file.metadata() or {})["heads"]), file.get_tensor("labels")
            heads = checked(path, entries, list[HeadEntry], "run `pipeline rebalance` again")
            hit = np.unpackbits(file.get_tensor("hit"), axis=1, count=len(labels)).astype(bool)
            return Hits(heads, hit, labels, file.get_tensor("counts"))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); run `pipeline rebalance` again") from error


def differences(
    selected: Mapping[str, Any],
    references: Mapping[str, Mapping[str, Any] | None],
    hits: Sequence[Hits],
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] = (),
) -> dict[str, Any]:
    """The selected row less each of the others, by their roles, over the test samples of all backbones.

    pairs: other rows that are compared with each other, the first less the second.
    hits: one a backbone, of the same test samples; a row's rate is its mean over seeds, then over backbones. A role
    without a row, or with the selected one, is left out.
    """

    def rate(facts: Mapping[str, Any]) -> np.ndarray:
        return np.mean([backbone_hits.rate(facts) for backbone_hits in hits], axis=0)

    first = hits[0]
    if any(not np.array_equal(backbone_hits.labels, first.labels) for backbone_hits in hits[1:]):
        raise DataError("the backbones were tested on different samples: train them with the same data settings")
    rows = [
        {"against": role, **facts, **paired_difference(rate(selected), rate(facts), first.labels, first.counts)}
        for role, facts in references.items()
        if facts is not None and facts != selected
    ]
    compared = [
        {"first": dict(a), "second": dict(b), **paired_difference(rate(a), rate(b), first.labels, first.counts)}
        for a, b in pairs
    ]
    return {"resamples": RESAMPLES, "level": LEVEL, "samples": len(first.labels), "rows": rows, "pairs": compared}
