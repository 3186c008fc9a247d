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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache.layout import STORED, CacheError, Chunk, Layout
from cache.numbers import NUMBERS, decode

if TYPE_CHECKING:
    from cache.reader import Cache

SMALLEST = 2  # chunks in a pool; from 8 on neighbours in the store are hardly neighbours in the stream
SLOT = 48  # bytes of row numbers and draws that go with each row in the pool

Block = tuple[NDArray[np.int64], NDArray]


def stream_order(
    rows: int, chunk_rows: int, *, window: int, seed: int, epoch: int, only: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The order (N,) in which a stream gives the rows of a view cut into chunks of chunk_rows, with window in its pool.

    A function of its arguments alone. only (N,): which rows are wanted, None for all. A window of the whole view gives
    a uniformly random permutation.
    """
    wanted = _wanted(rows, chunk_rows, only)
    held = np.empty(_slots(rows, chunk_rows, window), np.int64)
    order = [np.empty(0, np.int64)]
    for step in _steps(wanted, -(-rows // chunk_rows), slots=len(held), seed=seed, epoch=epoch):
        held[step.into] = step.rows
        order.append(held[step.leaving])
    return np.concatenate(order)


def stream_window(layout: Layout, split: str, *, memory_bytes: int) -> int:
    """How many chunks of a split the pool of a stream may hold within memory_bytes; CacheError where it is too few.

    Beside the pool there are a chunk being read and, each a quarter of it: rows being copied, the block that the caller
    has, and the next one.
    """
    array = layout.features(split)
    stored, number = np.dtype(array.stored).itemsize, np.dtype(NUMBERS[array.dtype]).itemsize
    rows, width = array.chunk[1:]
    pooled, beside = (
        rows * (width * stored + SLOT),
        rows * width * stored + _piece(rows) * width * (stored + 2 * number),
    )
    window = (memory_bytes - beside) // pooled
    if window < SMALLEST:
        needed = beside + SMALLEST * pooled
        raise CacheError(
            f"streaming {split} within {memory_bytes:,} bytes: a pool of {SMALLEST} chunks of {rows:,} rows needs "
            f"{needed:,} bytes ({needed / 2**20:.1f} MiB); give it at least that, better {beside + 8 * pooled:,}"
        )
    return window


def stream(
    cache: "Cache",
    split: str,
    *,
    view: int,
    window: int,
    seed: int,
    epoch: int,
    multiple_of: int = 1,
    rows: ArrayLike | None = None,
) -> Iterator[Block]:
    """What `Cache.stream` says, of one view and with a pool of window chunks."""
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; it must be 1 or more")
    chunks = cache.chunks(split, view)
    n, per_chunk = cache.rows(split), max((chunk.rows for chunk in chunks), default=1)
    slots, wanted = _slots(n, per_chunk, window), _wanted(n, per_chunk, wanted_rows(cache, split, rows))
    return _blocks(cache, chunks, _steps(wanted, len(chunks), slots=slots, seed=seed, epoch=epoch), slots, multiple_of)


def wanted_rows(cache: "Cache", split: str, rows: ArrayLike | None) -> NDArray[np.bool_] | None:
    """(N,) which rows a stream gives: those asked for, None for all, that have features; None where that is every row."""
    if rows is None and not len(cache.skipped(split)):
        return None
    valid = cache.valid(split)
    if rows is None:
        return valid
    only = np.zeros(len(valid), bool)
    only[np.asarray(rows)] = True
    return only & valid


class _Step(NamedTuple):
    """Read a chunk; put these rows of it into these slots; then the rows in the slots `leaving` go out, in this order."""

    chunk: int
    rows: NDArray[np.int64]
    into: NDArray[np.int64]
    leaving: NDArray[np.int64]


def _steps(
    wanted: Callable[[int], NDArray[np.int64]], chunks: int, *, slots: int, seed: int, epoch: int
) -> Iterator[_Step]:
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(chunks).tolist()
    used = np.zeros(slots, bool)
    for chunk, following in itertools.zip_longest(order, order[1:]):
        rows = wanted(chunk)
        into = np.flatnonzero(~used)[: len(rows)]
        used[into] = True
        full = np.flatnonzero(used)
        if following is None:
            leaving = rng.permutation(full)
        else:
            too_many = len(full) + len(wanted(following)) - slots
            leaving = rng.choice(full, too_many, replace=False) if too_many > 0 else full[:0]
        used[leaving] = False
        yield _Step(chunk, rows, into, leaving)


def _blocks(
    cache: "Cache", chunks: Sequence[Chunk], steps: Iterator[_Step], slots: int, multiple_of: int
) -> Iterator[Block]:
    """Does what the steps say; a thread reads the next chunk while the caller works on a block."""
    per_chunk = max((chunk.rows for chunk in chunks), default=0)
    held, pool = np.empty(slots, np.int64), np.empty((slots, cache.width), STORED[cache.dtype])
    staged = np.empty((per_chunk, cache.width), pool.dtype)
    piece = _piece(per_chunk)
    block = _Carried(cache.width, cache.dtype, multiple_of)

    def read(step: _Step) -> NDArray:
        chunk = chunks[step.chunk]
        return cache.read_chunk(chunk, staged[: chunk.rows])

    with ThreadPoolExecutor(1, "stream") as reader:
        step = next(steps, None)
        reading = reader.submit(read, step) if step else None
        while step and reading:
            got = reading.result()
            held[step.into] = step.rows
            for part in _parts(len(step.rows), piece):
                pool[step.into[part]] = got[step.rows[part] - chunks[step.chunk].start]
            following = next(steps, None)
            reading = reader.submit(read, following) if following else None
            for part in _parts(len(step.leaving), piece):
                leaving = step.leaving[part]
                yield from block.add(held[leaving], pool, leaving)
            step = following
    yield from block.rest()


class _Carried:
    """Cuts what leaves the pool at multiples of a number of rows and carries the remainder into the next block."""

    def __init__(self, width: int, dtype: str, multiple_of: int):
        self.dtype, self.multiple_of = dtype, multiple_of
        self.rows = np.empty(0, np.int64)
        self.features = np.empty((0, width), NUMBERS[dtype])

    def add(self, rows: NDArray[np.int64], pool: NDArray, slots: NDArray[np.int64]) -> Iterator[Block]:
        before = len(self.rows)
        rows = np.concatenate([self.rows, rows])
        features = np.empty((len(rows), pool.shape[1]), self.features.dtype)
        features[:before] = self.features
        if self.dtype == "bfloat16":
            decode(pool[slots], self.dtype, features[before:])
        else:
            np.take(pool, slots, axis=0, out=features[before:], mode="clip")  # any other mode copies through a buffer
        whole = len(rows) // self.multiple_of * self.multiple_of
        self.rows, self.features = rows[whole:], features[whole:].copy()
        if whole:
            yield rows[:whole], features[:whole]

    def rest(self) -> Iterator[Block]:
        if len(self.rows):
            yield self.rows, self.features


def _wanted(rows: int, chunk_rows: int, only: NDArray[np.bool_] | None) -> Callable[[int], NDArray[np.int64]]:
    """Chunk number → the rows of it that are wanted."""

    def of(chunk: int) -> NDArray[np.int64]:
        start, stop = chunk * chunk_rows, min(rows, (chunk + 1) * chunk_rows)
        return np.arange(start, stop) if only is None else start + np.flatnonzero(only[start:stop])

    return of


def _piece(chunk_rows: int) -> int:
    """Rows that are copied, and given out, at a time."""
    return -(-chunk_rows // 4)


def _parts(n: int, piece: int) -> Iterator[slice]:
    return (slice(start, min(start + piece, n)) for start in range(0, n, piece))


def _slots(rows: int, chunk_rows: int, window: int) -> int:
    return min(rows, window * chunk_rows)
