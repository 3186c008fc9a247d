"""Reading a sealed store: whole chunks straight into the caller's array, each checked against the manifest."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache.chunks import Torn
from cache.layout import CacheError, Chunk
from cache.locate import locate
from cache.numbers import NUMBERS, decode
from cache.place import Place
from cache.root import Root, read_root
from cache.stream import Block, stream, stream_order, stream_window
from cache.verify import checked_read, damaged_metadata, padding_bytes, unfinished, wrong_sizes


def open_cache(path: Path | str) -> "Cache":
    """Return the sealed store at a path or URL, for reading.

    Raises CacheError, naming path, field and what to do, where it is missing, no feature store, not sealed, of another
    format version, or its metadata is damaged.
    """
    place = locate(path)
    root = read_root(place)
    if not root.sealed:
        raise CacheError(unfinished(place, root))
    for damage in (*damaged_metadata(place, root), *wrong_sizes(place, root)):
        raise CacheError(f"{place}: {damage}; {_repair(place)}")
    return Cache(place, root)


class Cache:
    """A sealed feature store. Numbers are read when asked for, never before; nothing is written."""

    def __init__(self, place: Place, root: Root):
        self._place = place
        self._root = root

    @property
    def path(self) -> Path | str:
        """The folder, or the URL as text."""
        return self._place.location

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self._root.layout.splits)

    @property
    def width(self) -> int:
        return self._root.layout.width

    @property
    def dtype(self) -> str:
        """float16, float32 or bfloat16, as stored."""
        return self._root.layout.dtype

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._root.class_names

    @property
    def counts(self) -> NDArray[np.int64]:
        """Training samples per class, (C,), without those that were skipped."""
        counts, skipped = np.array(self._root.counts, np.int64), self.skipped("train")
        if not len(skipped):
            return counts
        return counts - np.bincount(self.labels("train")[skipped], minlength=len(counts))

    @property
    def fingerprint(self) -> dict[str, Any]:
        return dict(self._root.fingerprint)

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self._root.provenance)

    @property
    def digest(self) -> str:
        """sha256 of the content; equal content has an equal digest."""
        return self._root.digest

    def views(self, split: str) -> int:
        return self._root.layout.views(split)

    def rows(self, split: str) -> int:
        return self._root.layout.rows(split)

    def chunks(self, split: str, view: int = 0) -> list[Chunk]:
        """Return the chunks of one view in row order, for `read_chunk`."""
        if not 0 <= view < self.views(split):
            raise CacheError(f"{self._place}: no view {view} of {split}; it has views 0 to {self.views(split) - 1}")
        return list(self._root.layout.chunks_of(split, view))

    def read(self, split: str, view: int = 0, out: NDArray | None = None) -> NDArray:
        """Return features (N, D) of one view: float16 or float32 as stored, bfloat16 as float32; NaN in skipped rows.

        out: receives them and is returned; of the stored type (uint16 takes the bits of bfloat16) or of a float type
        that holds it.
        Raises CacheError naming the rows where a chunk is missing or damaged.
        """
        chunks, shape = self.chunks(split, view), (self.rows(split), self.width)
        if out is None:
            out = np.empty(shape, NUMBERS[self.dtype])
        if out.shape != shape:
            raise ValueError(f"out has shape {out.shape}, the features of {split} have {shape}")
        with ThreadPoolExecutor(self._place.streams, "read") as pool:
            for _ in pool.map(lambda chunk: self.read_chunk(chunk, out[chunk.start : chunk.stop]), chunks):
                pass
        return out

    def read_bits(self, split: str, view: int = 0) -> NDArray:
        """Return features (N, D) with the bits as stored: uint16 for bfloat16, otherwise what `read` gives."""
        return self.read(split, view, np.empty((self.rows(split), self.width), self._stored(split)))

    def read_chunk(self, chunk: Chunk, out: NDArray | None = None) -> NDArray:
        """Return features (rows, D) of one chunk, as `read` gives them."""
        stored = self._stored(chunk.split)
        if out is not None and out.dtype == stored and out.flags.c_contiguous:
            self._load(chunk, out)
            return out
        rows = np.empty((chunk.rows, self.width), stored)
        self._load(chunk, rows)
        return decode(rows, self.dtype, out)

    def read_rows(self, split: str, rows: ArrayLike, view: int = 0) -> NDArray:
        """Return features (len(rows), D) of the rows asked for, in that order, as `read` gives them.

        Chunks that hold any of them are read whole, one at a time. Raises IndexError for a row that is not there.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows(split):
            raise IndexError(f"rows reach from {rows.min()} to {rows.max()}; {split} has {self.rows(split)} rows")
        out = np.empty((len(rows), self.width), NUMBERS[self.dtype])
        for chunk in self.chunks(split, view):
            inside = np.flatnonzero((chunk.start <= rows) & (rows < chunk.stop))
            if len(inside):
                out[inside] = self.read_chunk(chunk)[rows[inside] - chunk.start]
        return out

    def stream(
        self,
        split: str,
        *,
        views: int | Sequence[int] = 0,
        seed: int,
        epoch: int,
        memory_bytes: int,
        multiple_of: int = 1,
        rows: ArrayLike | None = None,
    ) -> Iterator[Block]:
        """Yield blocks (rows (n,) int64, features (n, D) as `read` gives them) of one epoch, in shuffled order.

        Every row that has features comes exactly once. views: the epoch sees views[epoch % len(views)]. rows: those that
        come, None for all. n is a multiple of multiple_of in every block but the last, so batches can be cut from
        blocks as they come. The order is that of `stream_order`: a function of seed, epoch, the store's layout and
        memory_bytes, within which it is the better mixed the larger they are (cache/stream.py says how well).
        At most memory_bytes are held, the block given out included, and twice multiple_of rows.
        Raises CacheError where memory_bytes is too small for a pool of chunks (it names the least), or as `read` does.
        """
        window = stream_window(self._root.layout, split, memory_bytes=memory_bytes)
        sequence = np.atleast_1d(views)
        return stream(
            self.read_chunk, self.chunks(split, int(sequence[epoch % len(sequence)])), width=self.width, dtype=self.dtype,
            window=window, seed=seed, epoch=epoch, multiple_of=multiple_of, only=self._selection(split, rows),
        )  # fmt: skip

    def stream_order(
        self, split: str, *, seed: int, epoch: int, memory_bytes: int, rows: ArrayLike | None = None
    ) -> NDArray[np.int64]:
        """Return the rows (N,) in the order in which `stream` with the same arguments gives them; no features are read."""
        layout = self._root.layout
        window = stream_window(layout, split, memory_bytes=memory_bytes)
        per_chunk, only = layout.features(split).chunk[1], self._selection(split, rows)
        return stream_order(self.rows(split), per_chunk, window=window, seed=seed, epoch=epoch, only=only)

    def _selection(self, split: str, rows: ArrayLike | None) -> NDArray[np.bool_] | None:
        """Return (N,) True for those of the rows (None: all) that have features; None where that is every row."""
        if rows is None:
            return self.valid(split) if len(self.skipped(split)) else None
        only = np.zeros(self.rows(split), bool)
        only[np.asarray(rows, np.int64)] = True
        return only & self.valid(split)

    def skipped(self, split: str) -> NDArray[np.int64]:
        """Rows, ascending, of the samples that have no features because their images could not be read."""
        self.rows(split)
        return np.array(self._root.skipped.get(split, []), np.int64)

    def valid(self, split: str) -> NDArray[np.bool_]:
        """(N,) whether a sample has features; `read` returns NaN for the others."""
        valid = np.ones(self.rows(split), bool)
        valid[self.skipped(split)] = False
        return valid

    def labels(self, split: str) -> NDArray[np.int64]:
        """(N,) class of each sample."""
        labels = self._small(f"{split}/labels")
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            reach = f"labels from {labels.min()} to {labels.max()} for {len(self.class_names)} classes"
            raise CacheError(f"{self._place}: {split}/labels: {reach}; {_repair(self._place)}")
        return labels

    def ids(self, split: str) -> NDArray[np.int64]:
        """(N,) the dataset's own number of each sample."""
        return self._small(f"{split}/ids")

    @property
    def classifier(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Stage-1 weight (C, D) and bias (C,), float32."""
        weight, bias = self._small("classifier/weight"), self._small("classifier/bias")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise CacheError(f"{self._place}: classifier: holds numbers that are none; {_repair(self._place)}")
        return weight, bias

    def _stored(self, split: str) -> np.dtype:
        return np.dtype(self._root.layout.features(split).stored)

    def _load(self, chunk: Chunk, into: NDArray) -> None:
        array = self._root.layout.features(chunk.split)
        padding = padding_bytes(array, chunk.rows)
        self._checked(array.name, chunk.key, into, padding, f" ({chunk.where})")

    def _small(self, name: str) -> NDArray:
        array = next((a for a in self._root.layout.small() if a.name == name), None)
        if array is None:
            raise CacheError(f"{self._place}: no array {name}; the splits are {', '.join(self.splits)}")
        into = np.empty(array.shape, array.stored)
        for key in array.keys:
            self._checked(array.name, key, into, 0, "")
        return into

    def _checked(self, array: str, key: str, into: NDArray, padding: int, rows: str) -> None:
        try:
            checked_read(self._place, self._root.manifest, array, key, into, padding=padding)
        except Torn as torn:
            raise CacheError(f"{self._place}: {array}/{key}{rows} {torn}; {_repair(self._place)}") from torn


def _repair(place: Place) -> str:
    return f"repair it: run the pipeline dump-features … --out {place} that made it again"
