"""From a sealed feature store to arrays; nothing is read before it is needed, skipped rows are left out of all of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import Cache, CacheError, open_cache
from pipeline.config import RebalanceConfig
from pipeline.errors import DataError
from pipeline.rebalance.engine.features import Features, Split, check_finite
from pipeline.rebalance.engine.streamed import StreamedViews


class StoredViews(Sequence[np.ndarray]):
    """The training views (N, D) of a store, without skipped rows, read and checked for NaN when first asked for.

    Where memory_bytes do not hold all of them, one is kept at a time.
    """

    def __init__(self, store: Cache, views: int, *, memory_bytes: int):
        self.store, self.views, self.memory_bytes = store, views, memory_bytes
        self.seconds = 0.0  # spent on reading
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.views

    def __getitem__(self, view):
        if view not in self._kept:
            started = time.perf_counter()
            if self.views * view_bytes(self.store) > self.memory_bytes:
                self._kept.clear()
            try:
                features = _read(self.store, "train", view)
            except CacheError as error:
                raise DataError(str(error)) from error
            check_finite(features, f"{self.store.path}: train features, view {view}")
            self._kept[view] = features
            self.seconds += time.perf_counter() - started
        return self._kept[view]


@dataclass(frozen=True)
class Loaded:
    """A store as stage 2 uses it; val is None where the store has none. The test split is read when asked for.

    notes: what a person should know of it.
    """

    store: Cache
    features: Features
    views: StoredViews | StreamedViews
    val: Split | None
    notes: tuple[str, ...] = ()

    def test(self) -> Split:
        return read_split(self.store, "test")


def load(store: Cache | Path | str, *, augmented: bool, memory_bytes: int | None = None) -> Loaded:
    """The features of a store, its head and its validation split.

    augmented: whether views beyond the clean one will be asked for. memory_bytes: what training features may take (8 GiB);
    views that do not fit together are read again when their epoch comes, a view that does not fit is streamed.
    Raises DataError for what cannot be fitted on.
    """
    memory = memory_bytes or RebalanceConfig().memory_bytes
    try:
        store = store if isinstance(store, Cache) else open_cache(store)
        if "test" not in store.splits:
            raise DataError(
                f"{store.path}: no test split, without which nothing is measured; make it again from data that has one"
            )
        weight, bias = store.classifier
        number = store.views("train") if augmented else 1
        fits = view_bytes(store) <= memory
        views = (StoredViews if fits else StreamedViews)(store, number, memory_bytes=memory)
        features = Features(views, _labels(store, "train"), _counts(store), weight, bias)
        has_val = "val" in store.splits and store.valid("val").any()
        return Loaded(store, features, views, read_split(store, "val") if has_val else None, left_out(store))
    except CacheError as error:
        raise DataError(str(error)) from error


def view_bytes(store: Cache) -> int:
    """What one training view takes in memory."""
    return store.rows("train") * store.width * (2 if store.dtype == "float16" else 4)


def read_split(store: Cache, name: str) -> Split:
    """The clean features and labels of a split, without skipped rows; DataError where they are damaged or not finite."""
    try:
        split = Split(_read(store, name, 0), _labels(store, name))
    except CacheError as error:
        raise DataError(str(error)) from error
    if not len(split.labels):
        why = "not one of its images could be read" if store.rows(name) else "make it again from data that has one"
        raise DataError(f"{store.path}: the {name} split is empty: {why}")
    check_finite(split.features, f"{store.path}: {name} features")
    return split


def left_out(store: Cache) -> tuple[str, ...]:
    """What to say of samples that have no features; nothing where all have some."""
    skipped = {split: len(store.skipped(split)) for split in store.splits}
    listed = ", ".join(f"{n} of {store.rows(split)} {split}" for split, n in skipped.items() if n)
    return (f"left out, because their images could not be read: {listed} samples",) if listed else ()


def _counts(store: Cache) -> np.ndarray:
    counts = store.counts
    lost = np.flatnonzero((counts == 0) & (np.bincount(store.labels("train"), minlength=len(counts)) > 0))
    if len(lost):
        names = ", ".join(store.class_names[c] for c in lost[:5])
        raise DataError(
            f"{store.path}: not one training image of {len(lost)} class(es) could be read: {names}; mend some and run the "
            "same pipeline dump-features again, or take the classes away"
        )
    return counts


def _read(store: Cache, split: str, view: int) -> np.ndarray:
    features, valid = store.read(split, view), store.valid(split)
    return features if valid.all() else features[valid]


def _labels(store: Cache, split: str) -> np.ndarray:
    return store.labels(split)[store.valid(split)]
