"""From a sealed feature store to arrays. Nothing is read before it is needed; skipped samples are left out everywhere."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import Cache, CacheError, open_cache
from pipeline.config import RebalanceConfig
from pipeline.errors import DataError
from pipeline.rebalance.engine.features import Features, FeatureSplit, check_finite, check_head_and_labels
from pipeline.rebalance.engine.streamed import StreamedViews

CHECKED_ROWS = 4096  # a feature that varies among them need not be looked at further


class StoredViews:
    """The training views (N, D) of a store, each read and checked for NaN when it is first asked for.

    `seconds` counts the time spent on reading.

    Arguments:
        memory_bytes: where it does not hold all views, one is in memory at a time.
    """

    def __init__(self, store: Cache, views: int, *, memory_bytes: int):
        self.store, self.views, self.memory_bytes = store, views, memory_bytes
        self.seconds = 0.0
        self._in_memory: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.views

    def __getitem__(self, view: int) -> np.ndarray:
        if view not in self._in_memory:
            started = time.perf_counter()
            if self.views * view_bytes(self.store) > self.memory_bytes:
                self._in_memory.clear()
            try:
                features = _read(self.store, "train", view)
            except CacheError as error:
                raise DataError(str(error)) from error
            check_finite(features, f"{self.store.path}: train features, view {view}")
            self._in_memory[view] = features
            self.seconds += time.perf_counter() - started
        return self._in_memory[view]


@dataclass(frozen=True)
class Loaded:
    """A store as stage 2 uses it; the test split is read when it is asked for.

    Arguments:
        val: the validation split, None where the store has none.
        notes: on features that carry nothing.
    """

    store: Cache
    features: Features
    views: StoredViews | StreamedViews
    val: FeatureSplit | None
    notes: tuple[str, ...] = ()

    def test(self) -> FeatureSplit:
        return read_split(self.store, "test")


def open_store(store: Cache | Path | str) -> tuple[Cache, tuple[str, ...]]:
    """Return a store that stage 2 can use, and notes on it; its features are not read.

    Raises: DataError: no store, or one that cannot be fitted on.
    """
    try:
        store = store if isinstance(store, Cache) else open_cache(store)
        if "test" not in store.splits:
            raise DataError(
                f"{store.path}: no test split, without which nothing is measured; make it again from data that has one"
            )
        refuse_empty(store, "test")
        check_head_and_labels(_labels(store, "train"), _counts(store), *store.classifier)
        return store, unreadable_notes(store)
    except CacheError as error:
        raise DataError(str(error)) from error


def load(store: Cache | Path | str, *, augmented: bool, memory_bytes: int | None = None) -> Loaded:
    """Return the features of a store, its head and its validation split.

    Arguments:
        augmented: give access to the views beyond the clean one.
        memory_bytes: most bytes of training features, 8 GiB by default. Views that do not fit together are read again
            when their epoch comes; a view that does not fit is streamed.
    Raises: DataError: the store cannot be fitted on.
    """
    memory = memory_bytes or RebalanceConfig().memory_bytes
    store, _ = open_store(store)
    number = store.views("train") if augmented else 1
    fits = view_bytes(store) <= memory
    views = (StoredViews if fits else StreamedViews)(store, number, memory_bytes=memory)
    features = Features(views, _labels(store, "train"), _counts(store), *store.classifier)
    notes = constant_notes(np.asarray(views[0]), str(store.path)) if fits else ()
    return Loaded(store, features, views, read_split(store, "val") if has_validation(store) else None, notes)


def constant_notes(features: np.ndarray, name: str) -> tuple[str, ...]:
    """Return a note where many of the features (N, D) are the same number for every sample.

    Raises: DataError: all of them are.
    """
    constant = (features[:CHECKED_ROWS] == features[0]).all(0)
    if constant.any():
        constant[constant] = (features[:, constant] == features[0, constant]).all(0)
    number, width = int(constant.sum()), features.shape[1]
    if number == width and len(features) > 1:
        raise DataError(
            f"{name}: all {len(features):,} training samples have the same features, so that no classifier can tell them apart; "
            "look at the images and at the encoder, then dump again: pipeline dump-features … --overwrite"
        )
    if number > width / 2:
        return (f"{number:,} of {width:,} features are the same number for every training image and carry nothing",)
    return ()


def has_validation(store: Cache) -> bool:
    """Return true where a store has validation samples to choose on."""
    return "val" in store.splits and bool(store.valid("val").any())


def view_bytes(store: Cache) -> int:
    """Return the bytes of one training view in memory."""
    return store.rows("train") * store.width * (2 if store.dtype == "float16" else 4)


def read_split(store: Cache, name: str) -> FeatureSplit:
    """Return the clean features and labels of a split; raise DataError where they are damaged, not finite or empty."""
    refuse_empty(store, name)
    try:
        split = FeatureSplit(_read(store, name, 0), _labels(store, name))
    except CacheError as error:
        raise DataError(str(error)) from error
    check_finite(split.features, f"{store.path}: {name} features")
    return split


def refuse_empty(store: Cache, name: str) -> None:
    """Raise DataError where a split has no sample with features."""
    if not store.valid(name).any():
        reason = "not one of its images could be read" if store.rows(name) else "make it again from data that has one"
        raise DataError(f"{store.path}: the {name} split is empty: {reason}")


def unreadable_notes(store: Cache) -> tuple[str, ...]:
    """Return a note on the samples that have no features, or nothing where all have some."""
    skipped = {split: len(store.skipped(split)) for split in store.splits}
    parts = ", ".join(f"{n} of {store.rows(split)} {split}" for split, n in skipped.items() if n)
    return (f"left out, because their images could not be read: {parts} samples",) if parts else ()


def _counts(store: Cache) -> np.ndarray:
    counts = store.counts
    unreadable = np.flatnonzero((counts == 0) & (np.bincount(store.labels("train"), minlength=len(counts)) > 0))
    if len(unreadable):
        names = ", ".join(store.class_names[c] for c in unreadable[:5])
        raise DataError(
            f"{store.path}: not one training image of {len(unreadable)} class(es) could be read: {names}; mend some and run "
            "the same pipeline dump-features again, or take the classes away"
        )
    return counts


def _read(store: Cache, split: str, view: int) -> np.ndarray:
    features, valid = store.read(split, view), store.valid(split)
    return features if valid.all() else features[valid]


def _labels(store: Cache, split: str) -> np.ndarray:
    return store.labels(split)[store.valid(split)]
