"""A data set in memory or where it is stored: labels, ids, class names, counts, fingerprint."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from pipeline.data.names import class_names_from
from pipeline.errors import DataError

CONTENT_LIMIT = 1 << 30  # bytes of image files up to which the fingerprint reads their contents


class Stored(Protocol):
    """Images that are read when they are needed: `reader(stored[i])` is image i, in whichever process."""

    @property
    def reader(self) -> Callable[[Any], Image.Image]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Any: ...
    def name_of(self, i: int) -> str: ...
    def take(self, rows: np.ndarray) -> Self: ...
    def feed(self, sha: Any, without: Collection[int], limit: int) -> str: ...


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of one split; their images are in memory or stored in files.

    Arguments:
        labels: (n,) int64.
        ids: (n,) int64, numbers of the samples in the source.
        images: (n, H, W, 3) uint8, None where they are stored.
        stored: the files, None where images are in memory.
    """

    labels: np.ndarray
    ids: np.ndarray
    images: np.ndarray | None = None
    stored: Stored | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        """The samples at the given positions, in that order."""
        return replace(
            self,
            labels=self.labels[rows],
            ids=self.ids[rows],
            images=None if self.images is None else self.images[rows],
            stored=None if self.stored is None else self.stored.take(rows),
        )

    def name_of(self, row: int) -> str:
        """Return the name of sample `row` for people: its file, else its number in the source."""
        return f"image {self.ids[row]}" if self.stored is None else self.stored.name_of(row)

    def read(self, row: int) -> Image.Image:
        """Stored image `row` as RGB; DataError names one that cannot be read."""
        assert self.stored is not None
        return self.stored.reader(self.stored[row])

    def digest(self, without: Collection[int] = ()) -> tuple[str, str]:
        """(sha256 over labels, ids and images in order; what of the images went into it).

        without: rows whose stored images may be anything. One that cannot be opened counts as one without content.
        """
        sha = hashlib.sha256()
        for array in (self.labels, self.ids):
            sha.update(np.ascontiguousarray(array, dtype="<i8").data)
        if self.stored is not None:
            covers = self.stored.feed(sha, without, CONTENT_LIMIT)
            return sha.hexdigest(), covers
        assert self.images is not None
        sha.update(repr(self.images.shape).encode())
        sha.update(np.ascontiguousarray(self.images).data)
        return sha.hexdigest(), "pixels"


@dataclass(frozen=True, eq=False)
class Dataset:
    """The images of an experiment.

    Arguments:
        class_names: (C,) names; labels are places in them.
        val, test: None where there are none.
        notes: sentences for a person.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split | None = None
    test: Split | None = None
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Split]:
        by_name = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in by_name.items() if split is not None and len(split)}

    @cached_property
    def counts(self) -> np.ndarray:
        """(C,) int64: training images per class."""
        return np.bincount(self.train.labels, minlength=len(self.class_names))

    @cached_property
    def _digests(self) -> dict[str, tuple[str, str]]:
        return {name: split.digest() for name, split in self.splits.items()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over class names and every split's labels, ids and images."""
        return self.fingerprint_without({})

    @cached_property
    def training_fingerprint(self) -> str:
        """The same of what a training sees: test images may change without making it another training."""
        digests = sorted((name, digest) for name, (digest, _) in self._digests.items() if name != "test")
        return hashlib.sha256(repr([self.class_names, digests]).encode()).hexdigest()

    def fingerprint_without(self, rows: Mapping[str, Collection[int]]) -> str:
        """The fingerprint of what is left when the files of some rows of the splits may hold anything."""
        digests = {name: digest for name, (digest, _) in self._digests.items()}
        digests |= {name: self.splits[name].digest(unread)[0] for name, unread in rows.items() if unread}
        return hashlib.sha256(repr([self.class_names, sorted(digests.items())]).encode()).hexdigest()

    @property
    def fingerprint_covers(self) -> str:
        """Return the part of the images in the fingerprint: pixels, file contents, or file names and sizes."""
        return ", ".join(sorted({covers for _, covers in self._digests.values()}))

    def summary(self) -> dict:
        """JSON-ready facts: sizes, counts per class, fingerprint."""
        return {
            "name": self.name,
            "classes": len(self.class_names),
            **{name: len(split) for name, split in self.splits.items()},
            "counts": self.counts.tolist(),
            "imbalance_factor": round(float(self.counts.max() / self.counts[self.counts > 0].min()), 2),
            "fingerprint": self.fingerprint,
            "fingerprint_covers": self.fingerprint_covers,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class DataSource:
    """The splits that a source has.

    Arguments:
        train: the pool from which a subset and missing splits are drawn.
        val, test: None where the source has no such split.
        notes: sentences for a person.
    """

    class_names: tuple[str, ...]
    train: Split
    val: Split | None = None
    test: Split | None = None
    notes: tuple[str, ...] = ()


def listed_names(path: Path) -> tuple[str, ...]:
    """The class names in a file, one a line; DataError where it cannot be read, or a name is of no use."""
    try:
        lines = (
            path.expanduser().read_text(encoding="utf-8").rstrip().split("\n")
        )  # splitlines takes more for line ends
        return class_names_from(lines, str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); one class name a line") from error


def check_labels(labels: np.ndarray, classes: int, origin: str) -> np.ndarray:
    """The labels as int64, each in 0 … classes−1; DataError names the first that is not."""
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # a column
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        one_hot = labels.ndim == 2 and labels.shape[1] == classes
        remedy = "labels.argmax(1)" if one_hot else "labels.astype('int64')"
        raise DataError(
            f"{origin}: labels must be whole numbers of shape (N,), got {labels.dtype} {labels.shape}; save {remedy}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{origin}: label {labels[wrong[0]]} of sample {wrong[0]} is outside 0…{classes - 1} "
            f"({len(wrong)} such); labels count from 0 and class_names must name every class"
        )
    return labels.astype(np.int64)


def numbered_names(labels: np.ndarray, origin: str) -> tuple[str, ...]:
    """The numbers 0 … largest label as class names; DataError where there are more classes than samples."""
    top = int(labels.max(initial=0)) if np.issubdtype(labels.dtype, np.integer) else 0
    if top >= max(labels.size, 1):
        raise DataError(
            f"{origin}: label {top} of sample {int(labels.argmax())} needs {top + 1} classes, and there are {labels.size} "
            "samples; labels count from 0 without gaps"
        )
    return tuple(map(str, range(top + 1)))


def check_classes(dataset: Dataset) -> Dataset:
    """The data set, if every class has a training image; single-image classes become a note. DataError otherwise."""
    counts = dataset.counts
    empty = np.flatnonzero(counts == 0)
    if len(dataset.class_names) < 2:
        raise DataError(f"{dataset.name}: only one class ({dataset.class_names[0]}); a classifier needs at least two")
    if len(empty):
        names = ", ".join(dataset.class_names[c] for c in empty[:5])
        raise DataError(
            f"{dataset.name}: {len(empty)} class(es) without a training image: {names}; "
            "add images to them or take the class away"
        )
    single = [dataset.class_names[c] for c in np.flatnonzero(counts == 1)]
    if not single:
        return dataset
    note = f"{len(single)} class(es) with a single training image: {', '.join(single[:5])}"
    return replace(dataset, notes=(*dataset.notes, note))
