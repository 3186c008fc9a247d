"""Finding what is damaged: one check for `verify`, for resuming an open store and for repairing a sealed one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache import store
from cache.chunks import Torn, checksum, read_chunk
from cache.layout import CHECKSUM_BYTES, Array, CacheError, Chunk
from cache.locate import locate
from cache.numbers import absent_rows
from cache.place import Place
from cache.root import Manifest, Root, read_root

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that differs from what the store recorded.

    Arguments:
        array: such as "train/features".
        chunk: its key, or "zarr.json".
        rows: the rows that it holds, in words.
        fault: the difference, in words.
    """

    array: str
    chunk: str
    rows: str
    fault: str

    def __str__(self) -> str:
        location = f" ({self.rows})" if self.rows else ""
        return f"{self.array}/{self.chunk}{location} {self.fault}"


def verify(path: Path | str) -> list[Damage]:
    """Return every damaged file of a sealed store, after reading all of it; an empty list where it is intact.

    Repair is `pipeline dump-features` with the same settings: it recomputes just these chunks.
    Raises CacheError where there is no sealed store, or its root metadata is damaged.
    """
    place = locate(path)
    root = read_root(place)
    if not root.sealed:
        raise CacheError(unfinished(place, root))
    return damages(place, root)


def unfinished(place: Place, root: Root) -> str:
    return (
        f"{place}: state is {root.state!r}: its dump did not finish; run the same pipeline dump-features command again"
    )


def damages(place: Place, root: Root) -> list[Damage]:
    """Return the damaged files among metadata, small arrays and features, in this order."""
    return survey(place, root).damages


class Survey(NamedTuple):
    """The outcome of reading a whole store.

    damages: as `verify` lists them; absent: split → rows without features in any of its views, splits that have such;
    manifest: the crc32c of every chunk that is whole.
    """

    damages: list[Damage]
    absent: dict[str, list[int]]
    manifest: Manifest


def survey(place: Place, root: Root) -> Survey:
    """Return damaged files, absent rows and the checksums of intact chunks, after reading every file of the store once."""
    manifest: Manifest = {array.name: {} for array in root.layout.arrays}
    absent: dict[str, set[int]] = {}
    faults = list(damaged_metadata(place, root)) + _damaged_small(place, root, manifest)
    for chunk, reading in inspect(place, root, root.layout.chunks()):
        faults += filter(None, [reading.damage])
        if reading.damage is None:
            manifest[chunk.array][chunk.key] = reading.crc
        if len(reading.absent):
            absent.setdefault(chunk.split, set()).update(reading.absent.tolist())
    return Survey(faults, {split: sorted(rows) for split, rows in absent.items()}, manifest)


def damaged_metadata(place: Place, root: Root) -> Iterator[Damage]:
    """Group and array metadata files other than those sealed; in an open store, than those zarr makes for its layout."""
    expected = root.metadata or metadata_checksums(root)

    def fault(name: str) -> str | None:
        try:
            intact = checksum(place.read(f"{name}/zarr.json")[0]) == expected[name]
        except OSError as error:
            return f"cannot be read: {error.strerror or 'it is missing'}"
        return None if intact else "is not as it was made"

    for name, reason in _side_by_side(place, fault, expected):
        if reason:
            yield Damage(name, "zarr.json", "", reason)


def wrong_sizes(place: Place, root: Root) -> Iterator[Damage]:
    """Files of labels that do not have a number for each row: nobody needs memory for rows that are not there."""
    arrays = [array for array in root.layout.small() if array.name.endswith("/labels") and array.keys]

    def size(array: Array) -> int:
        try:
            with place.open(f"{array.name}/{array.keys[0]}") as (_, size):
                return size
        except OSError:
            return -1

    for array, length in _side_by_side(place, size, arrays):
        expected = array.chunk_bytes + CHECKSUM_BYTES
        if length != expected:
            fault = "cannot be read" if length < 0 else f"has {length:,} bytes instead of {expected:,}"
            yield Damage(array.name, array.keys[0], "", fault)


def metadata_checksums(root: Root) -> dict[str, int]:
    """Name of each group and array below the root → crc32c of the zarr.json that zarr makes for it."""
    return {name: checksum(document) for name, document in store.metadata(root.layout).items()}


def _damaged_small(place: Place, root: Root, manifest: Manifest) -> list[Damage]:
    """Damaged labels, ids and classifier; also labels that do not give the class counts. Notes the rest in manifest."""
    faults, values_by_name = [], {}
    small = [(array, key) for array in root.layout.small() for key in array.keys]

    def read(item: tuple[Array, str]) -> tuple[NDArray, str, int]:
        array, key = item
        into = np.empty(array.shape, array.stored)
        return into, *_checked(place, root.manifest, array.name, key, into)

    for (array, key), (values, reason, crc) in _side_by_side(place, read, small):
        if reason:
            faults.append(Damage(array.name, key, "", reason))
        else:
            values_by_name[array.name], manifest[array.name][key] = values, crc
    labels = values_by_name.get("train/labels")
    if labels is not None and not counts_agree(labels, root.counts):
        faults.append(Damage("train/labels", "c/0", "", "does not give the class counts in the root metadata"))
    return faults


def counts_agree(labels: np.ndarray, counts: tuple[int, ...]) -> bool:
    """Return True where labels in [0, C) occur as often as counts says."""
    if labels.size and (labels.min() < 0 or labels.max() >= len(counts)):
        return False
    return np.array_equal(np.bincount(labels, minlength=len(counts)), counts)


class ChunkReading(NamedTuple):
    """The outcome of reading a chunk of features: its damage or None, its rows of the split that hold none, its crc32c.

    It is damaged where its own checksum differs, or the one in the manifest where that lists the chunk.
    """

    damage: Damage | None
    absent: NDArray[np.int64]
    crc: int


def inspect(place: Place, root: Root, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ChunkReading]]:
    """Yield each chunk, in order, with its reading; several are read at a time."""

    def see(chunk: Chunk) -> ChunkReading:
        array = root.layout.features(chunk.split)
        into = np.empty(array.chunk, array.stored)
        reason, crc = _checked(place, root.manifest, array.name, chunk.key, into)
        if reason:
            return ChunkReading(Damage(array.name, chunk.key, chunk.where, reason), np.empty(0, np.int64), crc)
        return ChunkReading(None, chunk.start + absent_rows(into[0, : chunk.rows], array.dtype), crc)

    return _side_by_side(place, see, chunks)


def _side_by_side(place: Place, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    items = list(items)
    with ThreadPoolExecutor(place.streams, "check") as pool:
        yield from zip(items, pool.map(work, items), strict=True)


def checked_read(place: Place, manifest: Manifest, array: str, key: str, into: np.ndarray, *, padding: int = 0) -> int:
    """crc32c of a chunk read into an array; Torn where the file, its checksum or the manifest disagree.

    A chunk that the manifest does not list (an open store) is checked against its own checksum alone.
    """
    crc = read_chunk(place, f"{array}/{key}", into, padding=padding)
    if manifest.get(array, {}).get(key, crc) != crc:
        raise Torn("holds other content than was sealed")
    return crc


def _checked(place: Place, manifest: Manifest, array: str, key: str, into: np.ndarray) -> tuple[str, int]:
    """Return (the fault of a chunk, empty where it is intact; its crc32c)."""
    try:
        return "", checked_read(place, manifest, array, key, into)
    except Torn as torn:
        return str(torn), 0


def padding_bytes(array: Array, rows: int) -> int:
    """Bytes behind the given number of rows in a chunk of features; chunks on disk are always whole."""
    return (array.chunk[1] - rows) * array.chunk[2] * np.dtype(array.stored).itemsize
