"""Features in a shuffled order from a store that is larger than memory.

Chunks are read whole, in a shuffled order, into a pool that holds `window` of them. Whenever the next chunk has no room,
as many rows as it needs leave the pool, drawn at random; the last chunk in, the rest leaves in random order. So every
row comes exactly once, each block is drawn from all that is in the pool, and a row waits on average for as many chunks
as the pool holds, some much longer: there are no borders between windows.

How good is that? Where classes lie evenly over the rows, a batch is as good as one of a full shuffle. Where rows are sorted
by class, as those of image folders are, a batch knows only the classes that are in the pool. Measured on 1,000 classes of
1,280 … 5 rows, sorted, 29 chunks: the class shares of batches of 512 are as far from the true ones as those of fully
shuffled batches of 100, 230, 380 and 480 with a tenth, a quarter, a half and two thirds of the view in the pool (windows
shuffled one after the other, in the same memory: 16, 45, 85 and 130). So give it memory: the whole view is a full shuffle.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.layout import STORED, CacheError, Chunk, Layout
from cache.numbers import NUMBERS, decode

SMALLEST = 2  # chunks in a pool; from 8 on neighbours in the store are hardly neighbours in the stream
SLOT = 48  # bytes of row numbers and draws that go with each row in the pool

Block = tuple[NDArray[np.int64], NDArray]


def stream_order(
    rows: int, chunk_rows: int, *, window: int, seed: int, epoch: int, only: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Return the order (N,) in which a stream gives the rows of a view, a function of its arguments alone.

    Arguments:
        rows, chunk_rows: of the view, and of its chunks.
        window: rows in the pool that a row is drawn from; that of the whole view gives a uniformly random permutation.
        seed, epoch: of the order; each epoch has its own.
        only: (N,) True for the rows that come, None for all.
    """
    rows_of = _rows_by_chunk(rows, chunk_rows, only)
    pool = np.empty(_slots(rows, chunk_rows, window), np.int64)
    order = [np.empty(0, np.int64)]
    for step in _steps(rows_of, -(-rows // chunk_rows), slots=len(pool), seed=seed, epoch=epoch):
        pool[step.into] = step.rows
        order.append(pool[step.leaving])
    return np.concatenate(order)


def stream_window(layout: Layout, split: str, *, memory_bytes: int) -> int:
    """Return the number of chunks of a split that the pool of a stream may hold within memory_bytes.

    Memory also holds a chunk being read and, each a quarter of it: rows being copied, the block that the caller has, and the
    next one. Raises CacheError where fewer than SMALLEST fit.
    """
    array = layout.features(split)
    stored, number = np.dtype(array.stored).itemsize, np.dtype(NUMBERS[array.dtype]).itemsize
    rows, width = array.chunk[1:]
    pooled = rows * (width * stored + SLOT)
    extra = rows * width * stored + _piece(rows) * width * (stored + 2 * number)
    window = (memory_bytes - extra) // pooled
    if window < SMALLEST:
        needed = extra + SMALLEST * pooled
        raise CacheError(
            f"streaming {split} within {memory_bytes:,} bytes: a pool of {SMALLEST} chunks of {rows:,} rows needs "
            f"{needed:,} bytes ({needed / 2**20:.1f} MiB); give it at least that, better {extra + 8 * pooled:,}"
        )
    return window


def stream(
    read: Callable[[Chunk, NDArray], NDArray],
    chunks: Sequence[Chunk],
    *,
    width: int,
    dtype: str,
    window: int,
    seed: int,
    epoch: int,
    multiple_of: int = 1,
    only: NDArray[np.bool_] | None = None,
) -> Iterator[Block]:
    """Yield the blocks of `Cache.stream` for one view.

    Arguments:
        read: fills an array (n, D) with a chunk as stored and returns it.
        chunks: all of the view, in row order.
        dtype: of the store, a key of STORED.
        window: chunks that the pool holds.
        only: (N,) True for the rows that come; None for all.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; it must be 1 or more")
    rows, chunk_rows = sum(chunk.rows for chunk in chunks), max((chunk.rows for chunk in chunks), default=1)
    slots = _slots(rows, chunk_rows, window)
    steps = _steps(_rows_by_chunk(rows, chunk_rows, only), len(chunks), slots=slots, seed=seed, epoch=epoch)
    return _blocks(read, chunks, steps, slots=slots, block=_Carried(width, dtype, multiple_of))


class _Step(NamedTuple):
    """Read a chunk; put these rows of it into these slots; then the rows in the slots `leaving` go out, in this order."""

    chunk: int
    rows: NDArray[np.int64]
    into: NDArray[np.int64]
    leaving: NDArray[np.int64]


def _steps(
    rows_of: Callable[[int], NDArray[np.int64]], chunks: int, *, slots: int, seed: int, epoch: int
) -> Iterator[_Step]:
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(chunks).tolist()
    occupied = np.zeros(slots, bool)
    for chunk, following in itertools.zip_longest(order, order[1:]):
        rows = rows_of(chunk)
        into = np.flatnonzero(~occupied)[: len(rows)]
        occupied[into] = True
        full = np.flatnonzero(occupied)
        if following is None:
            leaving = rng.permutation(full)
        else:
            too_many = len(full) + len(rows_of(following)) - slots
            leaving = rng.choice(full, too_many, replace=False) if too_many > 0 else full[:0]
        occupied[leaving] = False
        yield _Step(chunk, rows, into, leaving)


def _blocks(
    read: Callable[[Chunk, NDArray], NDArray],
    chunks: Sequence[Chunk],
    steps: Iterator[_Step],
    *,
    slots: int,
    block: "_Carried",
) -> Iterator[Block]:
    """Carry out the steps; a thread reads the next chunk while the caller works on a block."""
    chunk_rows = max((chunk.rows for chunk in chunks), default=0)
    width = block.features.shape[1]
    numbers, pool = np.empty(slots, np.int64), np.empty((slots, width), STORED[block.dtype])
    staging = np.empty((chunk_rows, width), pool.dtype)
    piece = _piece(chunk_rows)

    def read_step(step: _Step) -> NDArray:
        chunk = chunks[step.chunk]
        return read(chunk, staging[: chunk.rows])

    with ThreadPoolExecutor(1, "stream") as reader:
        step = next(steps, None)
        reading = reader.submit(read_step, step) if step else None
        while step and reading:
            features = reading.result()
            numbers[step.into] = step.rows
            for part in _parts(len(step.rows), piece):
                pool[step.into[part]] = features[step.rows[part] - chunks[step.chunk].start]
            following = next(steps, None)
            reading = reader.submit(read_step, following) if following else None
            for part in _parts(len(step.leaving), piece):
                leaving = step.leaving[part]
                yield from block.add(numbers[leaving], pool, leaving)
            step = following
    yield from block.rest()


class _Carried:
    """Cuts what leaves the pool at multiples of a number of rows and carries the remainder into the next block."""

    def __init__(self, width: int, dtype: str, multiple_of: int):
        self.dtype, self.multiple_of = dtype, multiple_of
        self.rows = np.empty(0, np.int64)
        self.features = np.empty((0, width), NUMBERS[dtype])

    def add(self, rows: NDArray[np.int64], pool: NDArray, slots: NDArray[np.int64]) -> Iterator[Block]:
        carried = len(self.rows)
        rows = np.concatenate([self.rows, rows])
        features = np.empty((len(rows), pool.shape[1]), self.features.dtype)
        features[:carried] = self.features
        if self.dtype == "bfloat16":
            decode(pool[slots], self.dtype, features[carried:])
        else:
            np.take(pool, slots, axis=0, out=features[carried:], mode="clip")  # any other mode copies through a buffer
        size = len(rows) // self.multiple_of * self.multiple_of
        self.rows, self.features = rows[size:], features[size:].copy()
        if size:
            yield rows[:size], features[:size]

    def rest(self) -> Iterator[Block]:
        if len(self.rows):
            yield self.rows, self.features


def _rows_by_chunk(rows: int, chunk_rows: int, only: NDArray[np.bool_] | None) -> Callable[[int], NDArray[np.int64]]:
    """Return a function of a chunk's number that gives its rows that come."""

    def rows_of(chunk: int) -> NDArray[np.int64]:
        start, stop = chunk * chunk_rows, min(rows, (chunk + 1) * chunk_rows)
        return np.arange(start, stop) if only is None else start + np.flatnonzero(only[start:stop])

    return rows_of


def _piece(chunk_rows: int) -> int:
    """Rows that are copied, and given out, at a time."""
    return -(-chunk_rows // 4)


def _parts(n: int, piece: int) -> Iterator[slice]:
    return (slice(start, min(start + piece, n)) for start in range(0, n, piece))


def _slots(rows: int, chunk_rows: int, window: int) -> int:
    return min(rows, window * chunk_rows)
