"""Training views of a store that do not fit into memory: batches are read from the disk, an epoch at a time."""

import time
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from cache import Cache, CacheError
from pipeline.errors import DataError
from pipeline.rebalance.engine.features import check_finite
from pipeline.seeds import derive


class StreamedViews:
    """V views (N, D) of the samples that have features.

    `blocks` yields an epoch of one view, `order` returns the rows of that epoch beforehand; `seconds` counts the time
    spent waiting for the disk.

    Arguments:
        memory_bytes: most bytes that all streams together hold.
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
        """Yield (rows (n,), features (n, D)) in the order of `order`; n is a multiple of batch_size in all but the last.

        Drop a block before you ask for the next one.

        Arguments:
            augmented: let the epoch see its augmented view, as in Features.view_of_epoch.
            rows: training rows to read, None for all.
            streams: number of streams that are read at the same time and share the memory.
        Raises: DataError: the memory is too small, or a chunk is damaged or not finite.
        """
        views = range(1, self.views) if augmented and self.views > 1 else (0,)
        name = f"{self.store.path}: train features, view {views[epoch % len(views)]}"
        started = time.perf_counter()
        try:
            blocks = self.store.stream(
                "train", views=views, multiple_of=batch_size, **self._stream(epoch, seed, rows, streams)
            )
            for stored, features in blocks:
                check_finite(features, name)
                self.seconds += time.perf_counter() - started
                yield self._number[stored], features
                started = time.perf_counter()
        except CacheError as error:
            raise DataError(f"{error}: --set rebalance.memory=SIZE") from error

    def order(self, epoch: int, seed: int, *, rows: np.ndarray | None = None, streams: int = 1) -> np.ndarray:
        """Return the rows (N,) in the order in which `blocks` yields them."""
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
    """One view, of which any rows (M, D) can be read, but never all."""

    def __init__(self, views: StreamedViews, view: int):
        self._views, self._view, self.shape = views, view, views.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        if not isinstance(rows, np.ndarray):
            self._refuse(self.shape[0])
        store = self._views.store
        if len(rows) * store.width * 4 > self._views.memory_bytes:
            self._refuse(len(rows))
        try:
            features = store.read_rows("train", self._views._rows[rows], self._view)
        except CacheError as error:
            raise DataError(str(error)) from error
        check_finite(features, f"{store.path}: train features, view {self._view}")
        return features

    def __len__(self) -> NoReturn:
        self._refuse(self.shape[0])  # torch.as_tensor asks for it before it copies everything

    def __array__(self, dtype=None, copy=None) -> NoReturn:
        self._refuse(self.shape[0])

    def _refuse(self, rows: int) -> NoReturn:
        needed, memory = (size / 2**30 for size in (rows * self.shape[1] * 4, self._views.memory_bytes))
        raise DataError(
            f"{self._views.store.path}: {rows:,} rows of features at once take up to {needed:.3g} GiB, "
            f"rebalance.memory allows {memory:.3g} GiB; allow more with --set rebalance.memory={int(needed) + 1}GiB"
        )
