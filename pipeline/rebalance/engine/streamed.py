"""The training views of a store that memory cannot hold: batches come from the disk, an epoch at a time."""

import time
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from cache import Cache, CacheError
from pipeline.errors import DataError
from pipeline.rebalance.engine.features import check_finite
from pipeline.seeds import derive


class StreamedViews:
    """V views (N, D) of the samples that have features; `blocks` gives an epoch of one, `order` its rows beforehand.

    memory_bytes: what all streams together may hold. seconds: spent waiting for the disk.
    """

    def __init__(self, store: Cache, views: int, *, memory_bytes: int):
        self.store, self.views, self.memory_bytes = store, views, memory_bytes
        self.shape = int(store.valid("train").sum()), store.width
        self.seconds = 0.0
        self._rows = np.flatnonzero(store.valid("train"))  # of the store, by their number here
        self._number = np.cumsum(store.valid("train")) - 1

    def __len__(self) -> int:
        return self.views

    def __getitem__(self, view: int) -> "StreamedView":
        return StreamedView(self, range(self.views)[view])

    def blocks(
        self,
        epoch: int,
        seed: int,
        batch_size: int,
        *,
        augmented: bool = True,
        rows: np.ndarray | None = None,
        streams: int = 1,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows (n,), features (n, D)) in the order of `order`; n is a multiple of batch_size in all but the last.

        augmented: whether the epoch sees its augmented view, as Features.view_of_epoch says. rows: the training rows
        wanted, None for all. streams: how many are read at the same time, which then share the memory; a block is to be
        dropped before the next one is asked for.
        Raises DataError where the memory is too small, or a chunk damaged or not finite.
        """
        views = range(1, self.views) if augmented and self.views > 1 else (0,)
        what = f"{self.store.path}: train features, view {views[epoch % len(views)]}"
        started = time.perf_counter()
        try:
            found = self.store.stream(
                "train", views=views, multiple_of=batch_size, **self._stream(epoch, seed, rows, streams)
            )
            for stored, features in found:
                check_finite(features, what)
                self.seconds += time.perf_counter() - started
                yield self._number[stored], features
                started = time.perf_counter()
        except CacheError as error:
            raise DataError(f"{error}: --set rebalance.memory=SIZE") from error

    def order(self, epoch: int, seed: int, *, rows: np.ndarray | None = None, streams: int = 1) -> np.ndarray:
        """The rows in the order in which `blocks` gives them: all that training from memory in the same order needs."""
        try:
            return self._number[self.store.stream_order("train", **self._stream(epoch, seed, rows, streams))]
        except CacheError as error:
            raise DataError(f"{error}: --set rebalance.memory=SIZE") from error

    def _stream(self, epoch: int, seed: int, rows: np.ndarray | None, streams: int) -> dict:
        return {
            "seed": derive(seed, "batch-order"),
            "epoch": epoch,
            "memory_bytes": self.memory_bytes // streams,
            "rows": None if rows is None else self._rows[rows],
        }


class StreamedView:
    """One of the views: rows (M, D) of it by their numbers, but never the whole of it."""

    def __init__(self, of: StreamedViews, view: int):
        self._of, self._view, self.shape = of, view, of.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        if not isinstance(rows, np.ndarray):
            self._refuse(self.shape[0])
        store = self._of.store
        if len(rows) * store.width * 4 > self._of.memory_bytes:
            self._refuse(len(rows))
        try:
            features = store.read_rows("train", self._of._rows[rows], self._view)
        except CacheError as error:
            raise DataError(str(error)) from error
        check_finite(features, f"{store.path}: train features, view {self._view}")
        return features

    def __len__(self) -> NoReturn:
        self._refuse(self.shape[0])  # who asks is about to copy it, as torch.as_tensor does

    def __array__(self, dtype=None, copy=None) -> NoReturn:
        self._refuse(self.shape[0])

    def _refuse(self, rows: int) -> NoReturn:
        needed, given = (size / 2**30 for size in (rows * self.shape[1] * 4, self._of.memory_bytes))
        raise DataError(
            f"{self._of.store.path}: {rows:,} rows of features at once take up to {needed:.3g} GiB, {given:.3g} GiB are "
            f"given; allow more with --set rebalance.memory={int(needed) + 1}GiB"
        )
