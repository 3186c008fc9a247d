"""Making a store: created whole, filled chunk by chunk by any number of processes, sealed last.

A chunk is finished when its file is there and its checksum holds; nothing else records progress, so a kill at any
moment costs at most the chunks in flight.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache import store
from cache.chunks import Torn, checksum, read_chunk
from cache.files import fsync, fsync_tree, write_durably
from cache.layout import LARGEST, STORED, CacheError, Chunk, Layout, canonical, chunk_rows, owned_chunks
from cache.lock import Lock
from cache.numbers import encode
from cache.root import Manifest, Root, read_root, reopened
from cache.verify import (
    checked_read,
    counts_agree,
    damaged_metadata,
    damages,
    inspected,
    metadata_checksums,
    survey,
)


class Split(NamedTuple):
    """One split as `create_store` wants it: views V, labels (N,) in [0, C), ids (N,) of the dataset."""

    views: int
    labels: ArrayLike
    ids: ArrayLike


def create_store(
    path: Path | str,
    *,
    splits: Mapping[str, Split],
    width: int,
    dtype: str,
    weight: ArrayLike,
    bias: ArrayLike,
    class_names: list[str] | tuple[str, ...],
    counts: ArrayLike,
    fingerprint: Mapping[str, Any],
    provenance: Mapping[str, Any],
    rows_per_chunk: int | None = None,
    overwrite: bool = False,
    retry: Mapping[str, Collection[int]] | None = None,
) -> "Writer":
    """The writer of a new open store, or of the one that is there if its fingerprint is the same.

    splits: by name, "train" among them; dtype: float16, float32 or bfloat16; weight (C, D); bias (C,); counts (C,) of
    the training labels; fingerprint: flat, JSON; provenance: JSON. A sealed store with damaged files is opened again
    for those alone, a whole one comes back sealed. retry: split → rows that were skipped and can be had now; a sealed
    store is opened again for the chunks that hold them. The writer holds the store's lock until it is closed.
    Raises CacheError for another fingerprint (naming the fields), a second writer, or a path that is no feature store.
    """
    path = Path(path)
    layout = Layout(
        tuple((name, split.views, len(np.asarray(split.labels))) for name, split in splits.items()),
        width,
        len(class_names),
        dtype,
        rows_per_chunk or chunk_rows(width=width, itemsize=np.dtype(STORED[dtype]).itemsize),
    )
    root = Root(
        layout,
        tuple(class_names),
        tuple(int(n) for n in np.asarray(counts)),
        json.loads(canonical(dict(fingerprint))),
        json.loads(canonical(dict(provenance))),
    )
    contents = _contents(layout, splits, weight, bias)
    if not counts_agree(contents["train/labels"], root.counts):
        raise CacheError(f"{path}: counts do not agree with the training labels")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        return _continue(path, root, contents, retry or {})
    with _disk(path):
        if path.exists():
            _remove(path)
        for leftover in path.parent.glob(f".{path.name}.*.building"):
            shutil.rmtree(leftover)
        _make(path, root, contents)
    return Writer(path, root, Lock(path).take())


def open_writer(path: Path | str) -> "Writer":
    """A writer of chunks beside the one that `create_store` returned, in another process of the same run.

    It takes no lock and cannot seal. Raises CacheError where there is no store.
    """
    path = Path(path)
    return Writer(path, read_root(path), None)


class Writer:
    """Writes whole chunks of features into an open store, each durable when `write` returns."""

    def __init__(self, path: Path, root: Root, lock: Lock | None):
        self.path = path
        self._root = root
        self._lock = lock
        self._ids: dict[str, NDArray] = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process write."""
        if self._lock:
            self._lock.release()

    @property
    def sealed(self) -> bool:
        return self._root.sealed

    @property
    def digest(self) -> str | None:
        return self._root.digest if self.sealed else None

    @property
    def layout(self) -> Layout:
        return self._root.layout

    @property
    def chunks(self) -> list[Chunk]:
        return self.layout.chunks()

    @property
    def skipped(self) -> dict[str, list[int]]:
        """Split → rows that had no features when the store was last sealed."""
        return self._root.skipped

    def missing(self, *, rank: int = 0, world: int = 1, skipping: bool = True) -> list[Chunk]:
        """The chunks this rank owns that are absent, torn or damaged, in order; reads those that are there.

        skipping: whether a chunk may hold rows without features; if not, such a chunk is missing too.
        """
        if self.sealed:
            return []
        chunks = self.chunks
        mine = owned_chunks(chunks=len(chunks), rank=rank, world=world)
        found = ((chunks[i], *inspected(self.path, self._root, chunks[i])) for i in mine)
        return [chunk for chunk, damage, absent in found if damage or (len(absent) and not skipping)]

    def write(self, chunk: Chunk, rows: NDArray, *, absent: Collection[int] = ()) -> None:
        """Stores the features (chunk.rows, D) of one chunk.

        absent: rows of the chunk, counted from its first, that have none: NaN is stored, and the seal lists them.
        Raises CacheError naming the sample where a number is not finite or too large for the store's dtype, and
        where the disk refuses.
        """
        if self.sealed:
            raise CacheError(f"{self.path}: is sealed; nothing is left to write")
        array = self.layout.features(chunk.split)
        if rows.shape != (chunk.rows, self.layout.width):
            raise ValueError(f"{chunk}: got {rows.shape}, expected {(chunk.rows, self.layout.width)}")
        if absent:
            rows = rows.astype(np.float32)
            rows[list(absent)] = np.nan
        self._check_range(chunk, rows, absent)
        where = slice(chunk.view, chunk.view + 1), slice(chunk.start, chunk.stop)
        with _disk(self.path):
            store.write_chunk(self.path, array, chunk.key, encode(rows, array.dtype)[None], where)

    def _check_range(self, chunk: Chunk, rows: NDArray, absent: Collection[int]) -> None:
        dtype = self.layout.dtype
        bad = ~(np.abs(rows) <= LARGEST[dtype])
        bad[list(absent)] = False
        if not bad.any():
            return
        row, column = np.argwhere(bad)[0]
        value, sample = rows[row, column], self._sample(chunk.split, chunk.start + row)
        where = f"{self.path}: feature {column} of sample {sample} ({chunk.split} view {chunk.view}) is {value:g}"
        if np.isfinite(value):
            raise CacheError(f"{where}, beyond {dtype}'s ±{LARGEST[dtype]:g}; use --dtype float32 or --dtype bfloat16")
        raise CacheError(f"{where}; no dtype holds that: the checkpoint or this image gives it, check both")

    def _sample(self, split: str, row: int) -> int:
        if split not in self._ids:
            array = next(a for a in self.layout.small() if a.name == f"{split}/ids")
            ids = np.empty(array.shape, array.stored)
            checked_read(self.path, {}, array.name, "c/0", ids)
            self._ids[split] = ids
        return int(self._ids[split][row])

    def seal(self, identify: Callable[[Mapping[str, list[int]]], Mapping[str, Any]] | None = None) -> str:
        """The store's digest, after every chunk was read back and the store marked sealed in one last write.

        identify: the fingerprint of the content without the skipped rows (split → rows), where that is another one.
        Raises CacheError naming what is missing or damaged; the store then stays open.
        """
        if self._root.sealed:
            return self._root.digest
        if not self._lock:
            raise CacheError(f"{self.path}: only the process that created or resumed the store can seal it")
        found, skipped = survey(self.path, self._root)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            again = "run the same pipeline dump-features command again"
            raise CacheError(f"{self.path}: cannot be sealed: {found[0]}{more}; {again}")
        sealed = replace(
            self._root,
            state="sealed",
            fingerprint=json.loads(canonical(dict(identify(skipped)))) if identify else self._root.fingerprint,
            manifest=_manifest(self.path, self.layout),
            metadata=metadata_checksums(self._root),
            skipped=skipped,
        )
        with _disk(self.path):
            fsync_tree(self.path)  # also what a process killed before its own fsync left, and another took for finished
            self._root = store.write_root(self.path, sealed)
        return self._root.digest


def _manifest(path: Path, layout: Layout) -> Manifest:
    """crc32c of every chunk, from the last four bytes of its file: `damages` has just verified them."""
    manifest: Manifest = {}
    for array in layout.arrays:
        manifest[array.name] = {}
        for key in array.keys:
            with open(path / array.name / key, "rb") as file:
                file.seek(-4, os.SEEK_END)
                manifest[array.name][key] = int.from_bytes(file.read(4), "little")
    return manifest


def _contents(layout: Layout, splits: Mapping[str, Split], weight: ArrayLike, bias: ArrayLike) -> dict[str, NDArray]:
    """Array name → values of everything that is known before the first image is encoded."""
    given = {"classifier/weight": weight, "classifier/bias": bias}
    for name, split in splits.items():
        given |= {f"{name}/labels": split.labels, f"{name}/ids": split.ids}
    contents = {}
    for array in layout.small():
        contents[array.name] = np.ascontiguousarray(given[array.name], array.stored)
        if contents[array.name].shape != array.shape:
            raise ValueError(f"{array.name} has shape {contents[array.name].shape}, expected {array.shape}")
    return contents


def _make(path: Path, root: Root, contents: Mapping[str, NDArray]) -> None:
    """A new open store: built beside its place and renamed, so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".building"))
    umask = os.umask(0)
    os.umask(umask)
    building.chmod(0o777 & ~umask)  # mkdtemp gives 0700, which another user of a shared run could not read
    try:
        store.make(building, root)
        _restore_small(building, root, contents)
        fsync_tree(building)
        os.rename(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    fsync(path.parent)


def _restore_metadata(path: Path, root: Root) -> None:
    """Writes the metadata files of an open store that are absent or not what zarr makes for its layout."""
    documents = store.metadata(root)
    for damage in damaged_metadata(path, root):
        write_durably(path / damage.array / "zarr.json", documents[damage.array])


def _restore_small(path: Path, root: Root, contents: Mapping[str, NDArray]) -> None:
    """Writes the small arrays that are absent or not what they must be."""
    for array in root.layout.small():
        for key in array.keys:
            values = contents[array.name]
            try:
                same = read_chunk(path / array.name / key, np.empty_like(values)) == checksum(values)
            except Torn:
                same = False
            if not same:
                store.write_chunk(path, array, key, values)


def _continue(
    path: Path, wanted: Root, contents: Mapping[str, NDArray], retry: Mapping[str, Collection[int]]
) -> Writer:
    """The writer of a store that is already there: swept, its small files restored, its damaged chunks open again."""
    there = read_root(path)
    _refuse_other(path, there, wanted, contents)
    if there.sealed and not _to_open(path, there, retry):
        return Writer(path, there, None)
    lock = Lock(path).take()
    try:
        with _disk(path):
            for leftover in [*path.rglob(".*.tmp"), *path.rglob("*.partial")]:
                leftover.unlink(missing_ok=True)
            there = read_root(path)  # its last owner may have sealed it just now
            if there.sealed:
                lost = _to_open(path, there, retry)
                for array, key in lost:  # else a whole chunk in the wrong place would pass for finished
                    (path / array / key).unlink(missing_ok=True)
                there = store.write_root(path, reopened(there, lost)) if lost else there
            if not there.sealed:
                _restore_metadata(path, there)
                _restore_small(path, there, contents)
    except BaseException:
        lock.release()
        raise
    return Writer(path, there, lock)


def _to_open(path: Path, root: Root, retry: Mapping[str, Collection[int]]) -> list[tuple[str, str]]:
    """(array, key) of the chunks of a sealed store that are damaged or hold a row to be tried again."""
    again = [
        (chunk.array, chunk.key)
        for chunk in root.layout.chunks()
        if any(chunk.start <= row < chunk.stop for row in retry.get(chunk.split, ()))
    ]
    return list(dict.fromkeys([(damage.array, damage.chunk) for damage in damages(path, root)] + again))


def _refuse_other(path: Path, there: Root, wanted: Root, contents: Mapping[str, NDArray]) -> None:
    """Raises CacheError naming each field in which the store differs from the one that is wanted."""
    old, new = _identity(there), _identity(wanted)
    for name, values in contents.items():
        for key, crc in there.manifest.get(name, {}).items():
            old[f"crc32c of {name}/{key}"], new[f"crc32c of {name}/{key}"] = crc, checksum(values)
    fields = [f for f in dict.fromkeys([*new, *old]) if old.get(f) != new.get(f)]
    if fields:
        listed = "; ".join(f"{f} is {_short(old.get(f))} there, {_short(new.get(f))} wanted" for f in fields)
        raise CacheError(
            f"{path}: holds features made otherwise: {listed}. Choose another --out, or replace it with --overwrite"
        )


def _identity(root: Root) -> dict[str, Any]:
    layout = root.layout
    sizes = {f"{name} (views, rows)": [views, rows] for name, views, rows in layout.splits}
    fields = {**sizes, "width": layout.width, "dtype": layout.dtype, "class_names": list(root.class_names)}
    return {**fields, "counts": list(root.counts), **root.fingerprint}


def _short(value: Any) -> str:
    text = canonical(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _remove(path: Path) -> None:
    """Takes a store, or an empty folder, away; a kill half-way leaves no half store under its name."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
        return
    if not (path / "zarr.json").is_file():
        raise CacheError(f"{path}: not a feature store (it has no zarr.json); remove it or choose another --out")
    with Lock(path):
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".building"))
        os.rename(path, aside)
        shutil.rmtree(aside)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns what the disk refuses (full, no permission) into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be written: {error.strerror or error}; finished chunks stay good: "
            "run the same pipeline dump-features command again when this is mended"
        ) from error
