"""The layout of a feature store: names, shapes and chunks. Pure arithmetic, no files."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FORMAT = 1
CHUNK_BYTES = 16 * 2**20
CHECKSUM_BYTES = 4  # behind the numbers of each chunk
CHUNK_ROWS = 8192  # narrow features: no more rows than this are encoded again when a chunk is lost

# zarr has no bfloat16: its bits are stored as uint16, named in the array's attributes
STORED = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int64": "<i8"}
LARGEST = {"float16": 65504.0, "float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38}


class CacheError(Exception):
    """A store is missing, damaged or not the one asked for; the message names the path and the next thing to type."""

    exit_code = 3


class Refused(CacheError):
    """The disk did not do what it was asked to: full, no permission, no locks. The store itself is as good as before."""

    exit_code = 1


class Otherwise(CacheError):
    """The store that is there was made from something else."""


class Unlockable(Refused):
    """The file system has no locks."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of features that is encoded, written, checked and repaired whole.

    Arguments:
        split, view: of its rows.
        index: its number in the view.
        start, stop: the first row and the one behind the last.
    """

    split: str
    view: int
    index: int
    start: int
    stop: int

    @property
    def array(self) -> str:
        return f"{self.split}/features"

    @property
    def key(self) -> str:
        return f"c/{self.view}/{self.index}/0"

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def where(self) -> str:
        return f"view {self.view}, rows {self.start}–{self.stop - 1}"

    def __str__(self) -> str:
        return f"{self.split} {self.where}"


@dataclass(frozen=True, slots=True)
class Array:
    """One zarr array of a store.

    Arguments:
        shape, chunk: of the array and of its chunks.
        dtype: a key of STORED.
    """

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str

    @property
    def keys(self) -> list[str]:
        """Chunk keys in row-major order; every array but the features has one chunk, or none where it is empty."""
        keys = ["c"]
        for size, step in zip(self.shape, self.chunk, strict=True):
            keys = [f"{key}/{i}" for key in keys for i in range(-(-size // step))]
        return keys

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the numbers in one chunk."""
        return math.prod(self.chunk) * int(self.stored[-1])

    @property
    def stored(self) -> str:
        """The numpy type of the bytes on disk, little-endian."""
        return STORED[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """The shapes of all arrays of a store.

    Arguments:
        splits: (name, views, rows) in the order in which they are written.
        width: D.
        classes: C.
        dtype: of the features.
        rows_per_chunk: upper limit R, as `chunk_rows` returns it.
    """

    splits: tuple[tuple[str, int, int], ...]
    width: int
    classes: int
    dtype: str
    rows_per_chunk: int

    def features(self, split: str) -> Array:
        views, rows = self.views(split), self.rows(split)
        per_chunk = max(1, min(rows, self.rows_per_chunk))
        return Array(f"{split}/features", (views, rows, self.width), (1, per_chunk, self.width), self.dtype)

    def classifier(self) -> list[Array]:
        """Weight and bias of the classifier that stage 2 starts from."""
        c, d = self.classes, self.width
        return [
            Array("classifier/weight", (c, d), (c, d), "float32"),
            Array("classifier/bias", (c,), (c,), "float32"),
        ]

    def small(self) -> list[Array]:
        """Labels and ids of each split and the classifier: one chunk each, mostly known when the store is made."""
        per_row = [
            Array(f"{split}/{name}", (rows,), (max(1, rows),), "int64")
            for split, _, rows in self.splits
            for name in ("labels", "ids")
        ]
        return per_row + self.classifier()

    @property
    def arrays(self) -> list[Array]:
        return [self.features(split) for split, _, _ in self.splits] + self.small()

    @property
    def bytes(self) -> int:
        """Return the bytes of all chunks on disk: whole ones, though the last may be partly filled, each with its checksum."""
        return sum(len(array.keys) * (array.chunk_bytes + CHECKSUM_BYTES) for array in self.arrays)

    @property
    def groups(self) -> list[str]:
        return [split for split, _, _ in self.splits] + ["classifier"]

    def chunks(self) -> list[Chunk]:
        """Every chunk of features, by split, view and row."""
        return [c for split, views, _ in self.splits for view in range(views) for c in self.chunks_of(split, view)]

    def chunks_of(self, split: str, view: int) -> Iterator[Chunk]:
        rows, step = self.rows(split), self.features(split).chunk[1]
        for index, start in enumerate(range(0, rows, step)):
            yield Chunk(split, view, index, start, min(start + step, rows))

    def views(self, split: str) -> int:
        return self._split(split)[1]

    def rows(self, split: str) -> int:
        return self._split(split)[2]

    def _split(self, name: str) -> tuple[str, int, int]:
        for split in self.splits:
            if split[0] == name:
                return split
        raise CacheError(f"no split {name}; this store has {', '.join(s for s, _, _ in self.splits)}")

    def to_json(self) -> dict[str, Any]:
        return {
            "splits": [list(split) for split in self.splits],
            "width": self.width,
            "classes": self.classes,
            "dtype": self.dtype,
            "rows_per_chunk": self.rows_per_chunk,
        }


def chunk_rows(*, width: int, itemsize: int) -> int:
    """Return the rows of a chunk of about 16 MiB; at least 1, at most CHUNK_ROWS.

    Arguments:
        width: numbers in a row.
        itemsize: bytes of a number.
    """
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // (width * itemsize)))


def owned_chunks(*, chunks: int, rank: int, world: int) -> range:
    """Return the chunk numbers this rank writes: contiguous, whole, every chunk owned once.

    Arguments:
        chunks: in all.
        rank, world: the number of this process, and of all.
    """
    return range(chunks * rank // world, chunks * (rank + 1) // world)


def canonical(tree: Any) -> bytes:
    """Return a JSON tree as the bytes that hashes and checksums are taken of."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
