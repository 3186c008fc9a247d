"""Filling a store: chunk by chunk, by any number of processes; sealed last.

A chunk is finished when its file is there and its checksum holds; nothing else records progress, so a kill at any
moment costs at most the chunks in flight, and of these what `write_part` has not kept.
"""

import io
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache import store
from cache.chunks import Torn, checksum
from cache.layout import LARGEST, CacheError, Chunk, Layout, canonical, owned_chunks
from cache.locate import locate
from cache.numbers import decode, encode
from cache.place import Place, WriteLock
from cache.root import Root, read_root
from cache.verify import checked_read, inspect, metadata_checksums, survey

PART = ".part"  # ends the name of the file that keeps the finished rows of an unfinished chunk


def part_name(chunk: Chunk) -> str:
    """Return the name of the file that keeps the finished rows of a chunk."""
    return f"{chunk.array}/{chunk.key}{PART}"


def open_writer(path: Path | str) -> "Writer":
    """Return a writer of chunks beside the one that `create_store` returned, in another process of the same run.

    It takes no lock and cannot seal. Raises CacheError where there is no store.
    """
    place = locate(path)
    return Writer(place, read_root(place), None)


class Writer:
    """Writes whole chunks of features into an open store, each durable when `write` returns."""

    def __init__(self, place: Place, root: Root, lock: WriteLock | None):
        self.place = place
        self._root = root
        self._lock = lock
        self._ids: dict[str, NDArray] = {}
        self._parts: set[Chunk] = set()  # that may be on the disk

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
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
    def provenance(self) -> dict[str, Any]:
        return dict(self._root.provenance)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return dict(self._root.fingerprint)

    @property
    def chunks(self) -> list[Chunk]:
        return self.layout.chunks()

    @property
    def skipped(self) -> dict[str, list[int]]:
        """Split → rows that had no features when the store was last sealed."""
        return self._root.skipped

    def missing(self, *, rank: int = 0, world: int = 1, skipping: bool = True) -> list[Chunk]:
        """Return the chunks this rank owns that are absent, torn or damaged, in order; reads those that are there.

        skipping: whether a chunk may hold rows without features; if not, such a chunk is missing too.
        """
        if self.sealed:
            return []
        chunks = self.chunks
        owned = owned_chunks(chunks=len(chunks), rank=rank, world=world)
        readings = inspect(self.place, self._root, (chunks[i] for i in owned))
        return [chunk for chunk, reading in readings if reading.damage or (len(reading.absent) and not skipping)]

    def write(
        self,
        chunk: Chunk,
        rows: NDArray,
        *,
        absent: Collection[int] = (),
        name: Callable[[int], str] | None = None,
    ) -> None:
        """Store the features (chunk.rows, D) of one chunk.

        absent: rows of the chunk, counted from its first, that have none: NaN is stored, and the seal lists them.
        name: row of the split → what a person calls the sample beside its id.
        Raises CacheError naming the sample where a number is not finite or too large for the store's dtype, and
        where the disk refuses.
        """
        if self.sealed:
            raise CacheError(f"{self.place}: is sealed; nothing is left to write")
        array = self.layout.features(chunk.split)
        if rows.shape != (chunk.rows, self.layout.width):
            raise ValueError(f"{chunk}: got {rows.shape}, expected {(chunk.rows, self.layout.width)}")
        if absent:
            rows = rows.astype(np.float32)
            rows[list(absent)] = np.nan
        self._check_range(chunk, rows, absent, name)
        self._confirm()
        selection = slice(chunk.view, chunk.view + 1), slice(chunk.start, chunk.stop)
        with self.place.refusals():
            store.write_chunk(self.place, array, chunk.key, encode(rows, array.dtype)[None], selection)
            if chunk in self._parts:
                self._parts.remove(chunk)
                self.place.delete(part_name(chunk))

    def write_part(self, chunk: Chunk, rows: NDArray, *, absent: Collection[int] = ()) -> None:
        """Keep the first rows (n, D) of a chunk that is not finished, durable when `write_part` returns.

        A part is no chunk: `write` of the whole one removes it, and readers never see it.
        """
        self._confirm()
        content = io.BytesIO()
        for array in (np.asarray(rows, np.float32), np.array(sorted(absent), np.int64)):
            np.save(content, array, allow_pickle=False)
        payload = content.getvalue()
        with self.place.refusals():
            self.place.write(part_name(chunk), checksum(payload).to_bytes(4, "little") + payload)
        self._parts.add(chunk)

    def read_part(self, chunk: Chunk) -> tuple[NDArray, list[int]] | None:
        """Return the rows (n, D) float32 that `write_part` kept and those of them without features, None where it kept none.

        One that is damaged counts as none.
        """
        try:
            content, _ = self.place.read(part_name(chunk))
        except FileNotFoundError:
            return None
        self._parts.add(chunk)
        payload = content[4:]
        if checksum(payload).to_bytes(4, "little") != content[:4]:
            return None
        stream = io.BytesIO(payload)
        rows, absent = (np.load(stream, allow_pickle=False) for _ in range(2))
        fits = rows.ndim == 2 and rows.shape[1] == self.layout.width and len(rows) < chunk.rows
        return (rows, absent.tolist()) if fits else None

    def read(self, chunk: Chunk) -> NDArray:
        """Features (chunk.rows, D) that were written, as `Cache.read_chunk` gives them; NaN in rows that have none.

        Raises CacheError where the chunk is missing or damaged.
        """
        array = self.layout.features(chunk.split)
        into = np.empty(array.chunk, array.stored)
        try:
            checked_read(self.place, self._root.manifest, array.name, chunk.key, into)
        except Torn as torn:
            again = "run the same pipeline dump-features command again"
            raise CacheError(f"{self.place}: {array.name}/{chunk.key} ({chunk.where}) {torn}; {again}") from None
        return decode(into[0, : chunk.rows], array.dtype)

    @property
    def has_classifier(self) -> bool:
        """Return True where the classifier is final: in a sealed store, and in one opened again for other chunks."""
        manifest = self._root.manifest
        return all(key in manifest.get(array.name, {}) for array in self.layout.classifier() for key in array.keys)

    def set_classifier(self, weight: ArrayLike, bias: ArrayLike) -> None:
        """Store the classifier (C, D), (C,) of a store that was made without one; until the seal it may be set again.

        Raises CacheError where the store is sealed or not ours, ValueError for other shapes or numbers that are not finite.
        """
        if not self._lock or self.has_classifier:
            raise CacheError(f"{self.place}: its classifier is set once, by the process that seals the store")
        for array, parameter in zip(self.layout.classifier(), (weight, bias), strict=True):
            values = np.ascontiguousarray(parameter, array.stored)
            if values.shape != array.shape or not np.isfinite(values).all():
                raise ValueError(f"{array.name}: expected finite numbers of shape {array.shape}, got {values.shape}")
            self._confirm()
            with self.place.refusals():
                store.write_chunk(self.place, array, array.keys[0], values)

    def _confirm(self) -> None:
        """CacheError where the store is no longer ours to write, as for a rank that has outlived the one with the lock."""
        if self._lock:
            self._lock.confirm()
            return
        existing = read_root(self.place)
        if existing.sealed or (existing.layout, existing.fingerprint) != (self.layout, self._root.fingerprint):
            raise CacheError(
                f"{self.place}: another process has sealed or replaced it meanwhile; nothing more is written"
            )

    def _check_range(
        self, chunk: Chunk, rows: NDArray, absent: Collection[int], name: Callable[[int], str] | None
    ) -> None:
        dtype = self.layout.dtype
        if -LARGEST[dtype] <= rows.min() and rows.max() <= LARGEST[dtype]:
            return  # false where anything is not a number; a third of the time of looking at each
        bad = ~(np.abs(rows) <= LARGEST[dtype])
        bad[list(absent)] = False
        if not bad.any():
            return
        row, column = np.argwhere(bad)[0]
        value, sample = rows[row, column], self._sample(chunk.split, chunk.start + row)
        sample += f", {name(chunk.start + row)}," if name else ""
        location = f"{self.place}: feature {column} of sample {sample} ({chunk.split} view {chunk.view}) is {value:g}"
        if np.isfinite(value):
            raise CacheError(
                f"{location}, beyond {dtype}'s ±{LARGEST[dtype]:g}; use --dtype float32 or --dtype bfloat16"
            )
        raise CacheError(
            f"{location}; no dtype holds that: look at this image, and at the checkpoint's training: it may have diverged"
        )

    def _sample(self, split: str, row: int) -> str:
        if split not in self._ids:
            array = next(a for a in self.layout.small() if a.name == f"{split}/ids")
            ids = np.empty(array.shape, array.stored)
            checked_read(self.place, {}, array.name, "c/0", ids)
            self._ids[split] = ids
        return str(self._ids[split][row])

    def seal(
        self,
        identify: Callable[[Mapping[str, list[int]]], Mapping[str, Any]] | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the store's digest, after every chunk was read back and the store marked sealed in one last write.

        identify: the fingerprint of the content without the skipped rows (split → rows), where that is another one.
        facts: are added to the provenance.
        Raises CacheError naming what is missing or damaged; the store then stays open.
        """
        if self._root.sealed:
            return self._root.digest
        if not self._lock:
            raise CacheError(f"{self.place}: only the process that created or resumed the store can seal it")
        faults, skipped, manifest = survey(self.place, self._root)
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            again = "run the same pipeline dump-features command again"
            raise CacheError(f"{self.place}: cannot be sealed: {faults[0]}{more}; {again}")
        sealed = replace(
            self._root,
            state="sealed",
            fingerprint=json.loads(canonical(dict(identify(skipped)))) if identify else self._root.fingerprint,
            provenance=json.loads(canonical({**self._root.provenance, **(facts or {})})),
            manifest=manifest,
            metadata=metadata_checksums(self._root),
            skipped=skipped,
        )
        with self.place.refusals():
            if parts := [
                name for name in self.place.names() if name.endswith(PART)
            ]:  # a process died before it removed them
                self.place.delete(*parts)
            self.place.settle()
            self._lock.renew()
            self._lock.confirm()
            self._root = store.write_root(self.place, sealed)
        return self._root.digest
