"""Finding what is damaged: one check for `verify`, for resuming an open store and for repairing a sealed one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import store
from cache.chunks import Torn, checksum, read_chunk
from cache.layout import Array, CacheError, Chunk
from cache.numbers import absent_rows
from cache.place import Place, locate
from cache.root import Manifest, Root, read_root


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not what the store says it is.

    array: such as "train/features"; chunk: its key, or "zarr.json"; rows: in words; what: what is wrong with it.
    """

    array: str
    chunk: str
    rows: str
    what: str

    def __str__(self) -> str:
        where = f" ({self.rows})" if self.rows else ""
        return f"{self.array}/{self.chunk}{where} {self.what}"


def verify(path: Path | str) -> list[Damage]:
    """Every damaged file of a sealed store, after reading all of it; an empty list means whole.

    Repair is `pipeline dump-features` with the same settings: it recomputes just these chunks.
    Raises CacheError where there is no sealed store, or its root metadata is damaged.
    """
    place = locate(path)
    root = read_root(place)
    if not root.sealed:
        raise CacheError(unfinished(place))
    return damages(place, root)


def unfinished(place: Place) -> str:
    return f"{place}: state is {'open'!r}: its dump did not finish; run the same pipeline dump-features command again"


def damages(place: Place, root: Root) -> list[Damage]:
    """What is wrong in the store's metadata, small arrays and features, in this order."""
    return survey(place, root)[0]


def survey(place: Place, root: Root) -> tuple[list[Damage], dict[str, list[int]]]:
    """(`damages`; split → rows without features in any of its views, splits that have such), after reading all of it."""
    found = list(damaged_metadata(place, root))
    found += damaged_small(place, root)
    absent: dict[str, set[int]] = {}
    for chunk in root.layout.chunks():
        damage, rows = inspected(place, root, chunk)
        found += filter(None, [damage])
        if len(rows):
            absent.setdefault(chunk.split, set()).update(rows.tolist())
    return found, {split: sorted(rows) for split, rows in absent.items()}


def damaged_metadata(place: Place, root: Root) -> Iterator[Damage]:
    """Group and array metadata files other than those sealed; in an open store, than those zarr makes for its layout."""
    for name, crc in (root.metadata or metadata_checksums(root)).items():
        try:
            same = checksum(place.read(f"{name}/zarr.json")[0]) == crc
            what = "is not as it was made"
        except OSError as error:
            same, what = False, f"cannot be read: {error.strerror}"
        if not same:
            yield Damage(name, "zarr.json", "", what)


def metadata_checksums(root: Root) -> dict[str, int]:
    """Name of each group and array below the root → crc32c of the zarr.json that zarr makes for it."""
    return {name: checksum(document) for name, document in store.metadata(root).items()}


def damaged_small(place: Place, root: Root) -> list[Damage]:
    """Damaged labels, ids and classifier; also labels that do not give the class counts."""
    found, whole = [], {}
    for array in root.layout.small():
        for key in array.keys:
            into = np.empty(array.shape, array.stored)
            what = _fault(place, root.manifest, array.name, key, into)
            if what:
                found.append(Damage(array.name, key, "", what))
            else:
                whole[array.name] = into
    labels = whole.get("train/labels")
    if labels is not None and not counts_agree(labels, root.counts):
        found.append(Damage("train/labels", "c/0", "", "does not give the class counts in the root metadata"))
    return found


def counts_agree(labels: np.ndarray, counts: tuple[int, ...]) -> bool:
    """Whether labels in [0, C) occur as often as counts says."""
    if labels.size and (labels.min() < 0 or labels.max() >= len(counts)):
        return False
    return np.array_equal(np.bincount(labels, minlength=len(counts)), counts)


def inspected(place: Place, root: Root, chunk: Chunk) -> tuple[Damage | None, NDArray[np.int64]]:
    """(what is wrong with a chunk of features, its rows of the split that hold none).

    Wrong is what its own checksum finds, and the manifest where that lists the chunk.
    """
    array = root.layout.features(chunk.split)
    into = np.empty(array.chunk, array.stored)
    what = _fault(place, root.manifest, array.name, chunk.key, into)
    if what:
        return Damage(array.name, chunk.key, chunk.where, what), np.empty(0, np.int64)
    return None, chunk.start + absent_rows(into[0, : chunk.rows], array.dtype)


def checked_read(place: Place, manifest: Manifest, array: str, key: str, into: np.ndarray, *, padding: int = 0) -> int:
    """crc32c of a chunk read into an array; Torn where the file, its checksum or the manifest disagree.

    A chunk that the manifest does not list (an open store) is checked against its own checksum alone.
    """
    crc = read_chunk(place, f"{array}/{key}", into, padding=padding)
    if manifest.get(array, {}).get(key, crc) != crc:
        raise Torn("holds other content than was sealed")
    return crc


def _fault(place: Place, manifest: Manifest, array: str, key: str, into: np.ndarray, *, padding: int = 0) -> str | None:
    try:
        checked_read(place, manifest, array, key, into, padding=padding)
    except Torn as torn:
        return str(torn)
    return None


def padding_bytes(array: Array, rows: int) -> int:
    """Bytes behind the given number of rows in a chunk of features; chunks on disk are always whole."""
    return (array.chunk[1] - rows) * array.chunk[2] * np.dtype(array.stored).itemsize
