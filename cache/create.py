"""Making a store, or taking up the one that is there if it was made from the same."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache import store
from cache.chunks import Torn, checksum, read_chunk
from cache.files import refuse_unwritable
from cache.layout import STORED, CacheError, Chunk, Layout, Otherwise, canonical, chunk_rows
from cache.local import Local
from cache.locate import locate
from cache.lock import Lock
from cache.place import ABSENT, LEASE, Place
from cache.root import Root, read_root, reopened
from cache.verify import counts_agree, damaged_metadata, damages
from cache.writer import Writer

REMOVING = "removing"  # the state of a store that --overwrite is taking out of a bucket


class StoreSplit(NamedTuple):
    """One split as `create_store` wants it: views V, labels (N,) in [0, C), ids (N,) of the dataset."""

    views: int
    labels: ArrayLike
    ids: ArrayLike


def create_store(
    path: Path | str,
    *,
    splits: Mapping[str, StoreSplit],
    width: int,
    dtype: str,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    class_names: list[str] | tuple[str, ...],
    counts: ArrayLike,
    fingerprint: Mapping[str, Any],
    provenance: Mapping[str, Any],
    rows_per_chunk: int | None = None,
    overwrite: bool = False,
    retry: Mapping[str, Collection[int]] | None = None,
) -> Writer:
    """The writer of a new open store, or of the one that is there if its fingerprint is the same.

    splits: by name, "train" among them; dtype: float16, float32 or bfloat16; weight (C, D); bias (C,), both None for a
    classifier that follows from the features: `Writer.set_classifier` then has to come before the seal, and the
    fingerprint has to say how it is made; counts (C,) of the training labels; fingerprint: flat, JSON; provenance: JSON.
    A sealed store with damaged files is opened again for those alone, a whole one comes back sealed. retry: split → rows
    that were skipped and can be had now; a sealed store is opened again for the chunks that hold them. The writer holds
    the store's lock until it is closed.
    Raises CacheError for another fingerprint (naming the fields), a second writer, or a path that is no feature store.
    """
    place, root, contents = _wanted(
        path, splits=splits, width=width, dtype=dtype, weight=weight, bias=bias, class_names=class_names, counts=counts,
        fingerprint=fingerprint, provenance=provenance, rows_per_chunk=rows_per_chunk,
    )  # fmt: skip
    if place.occupied() and not overwrite:
        return _continue(place, root, contents, retry or {})
    if not isinstance(place, Local):
        return _make_of_objects(place, root, contents, overwrite)
    with place.refusals():
        place.remove()
        place.build(lambda building: _make(building, root, contents))
    return Writer(place, root, place.lock().take())


@dataclass(frozen=True)
class Foreseen:
    """What `create_store` would find: `new`, or a store that is `sealed`, `open`, `damaged` or to be `replaced`.

    layout: of the store that is wanted; missing: its chunks of features that are still to be written.
    """

    state: Literal["new", "sealed", "open", "damaged", "replaced"]
    layout: Layout
    missing: tuple[Chunk, ...]


def foresee_store(
    path: Path | str,
    *,
    overwrite: bool = False,
    retry: Mapping[str, Collection[int]] | None = None,
    skipping: bool = True,
    **wanted: Any,
) -> Foreseen:
    """What `create_store` would do with the same arguments, and refuse: it raises the same. Nothing is written.

    skipping: as `Writer.missing` has it; wanted: the other arguments of `create_store`. A store in a bucket that another
    process writes is not noticed.
    """
    place, root, contents = _wanted(path, **wanted)
    found = _foreseen(place, root, contents, overwrite=overwrite, retry=retry or {}, skipping=skipping)
    if isinstance(place, Local) and found.missing:
        with place.refusals():
            refuse_unwritable(place.path)
    return found


def _foreseen(
    place: Place,
    root: Root,
    contents: Mapping[str, NDArray],
    *,
    overwrite: bool,
    retry: Mapping[str, Collection[int]],
    skipping: bool,
) -> Foreseen:
    every = tuple(root.layout.chunks())
    if isinstance(place, Local):
        Lock(place.path).refuse_held()
        if place.path.is_file() or place.occupied():
            place.refuse_removal()
    if not place.occupied():
        return Foreseen("new", root.layout, every)
    if overwrite:
        return Foreseen("replaced", root.layout, every)
    there = read_root(place)
    if there.state == REMOVING:
        return Foreseen("new", root.layout, every)
    _refuse_other(place, there, root, contents)
    if there.sealed:
        lost = set(_to_open(place, there, contents, retry))
        missing = tuple(chunk for chunk in every if (chunk.array, chunk.key) in lost)
        return Foreseen("damaged" if lost else "sealed", there.layout, missing)
    return Foreseen("open", there.layout, tuple(Writer(place, there, None).missing(skipping=skipping)))


def _wanted(
    path: Path | str,
    *,
    splits: Mapping[str, StoreSplit],
    width: int,
    dtype: str,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    class_names: list[str] | tuple[str, ...],
    counts: ArrayLike,
    fingerprint: Mapping[str, Any],
    provenance: Mapping[str, Any],
    rows_per_chunk: int | None = None,
) -> tuple[Place, Root, dict[str, NDArray]]:
    """Where the store that is wanted goes, its root, and its contents as far as they are known."""
    place = locate(path)
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
        raise CacheError(f"{place}: counts do not agree with the training labels")
    return place, root, contents


def _contents(
    layout: Layout, splits: Mapping[str, StoreSplit], weight: ArrayLike | None, bias: ArrayLike | None
) -> dict[str, NDArray]:
    """Array name → values of everything that is known before the first image is encoded."""
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias: give both, or None for both")
    given: dict[str, ArrayLike] = {}
    if weight is not None and bias is not None:
        given |= {"classifier/weight": weight, "classifier/bias": bias}
    for name, split in splits.items():
        given |= {f"{name}/labels": split.labels, f"{name}/ids": split.ids}
    contents = {}
    for array in (a for a in layout.small() if a.name in given):
        contents[array.name] = np.ascontiguousarray(given[array.name], array.stored)
        if contents[array.name].shape != array.shape:
            raise ValueError(f"{array.name} has shape {contents[array.name].shape}, expected {array.shape}")
    return contents


def _make(building: Local, root: Root, contents: Mapping[str, NDArray]) -> None:
    """All files of a new open store but the chunks of features."""
    store.make(building.path, root)
    _restore_small(building, root, contents)


def _make_of_objects(place: Place, root: Root, contents: Mapping[str, NDArray], overwrite: bool) -> Writer:
    """The writer of a new open store: its root comes first, since it makes all else a part of a store to be finished."""
    lock = place.lock().take()
    try:
        if not overwrite and place.occupied() and read_root(place).state != REMOVING:
            raise CacheError(f"{place}: another process has made a store there meanwhile; run the same command again")
        root = store.write_root(place, replace(root, tag=_vacated(place, root)))
        _restore_metadata(place, root)
        _restore_small(place, root, contents)
    except BaseException:
        lock.release()
        raise
    return Writer(place, root, lock)


def _vacated(place: Place, root: Root) -> Any:
    """The tag a new root has to replace, once nothing else is there.

    A store that is removed is marked as such first: after a kill half-way its chunks must not pass for another's.
    """
    names = [name for name in place.names() if name != LEASE]
    if not names:
        return ABSENT
    if "zarr.json" not in names:
        raise CacheError(f"{place}: not a feature store (it has no zarr.json); remove it or choose another --out")
    marked = store.write_root(place, replace(root, state=REMOVING, tag=place.read("zarr.json")[1]))
    place.delete(*(name for name in names if name != "zarr.json"))
    return marked.tag


def _restore_metadata(place: Place, root: Root) -> None:
    """Writes the metadata files of an open store that are absent or not what zarr makes for its layout."""
    documents = store.metadata(root)
    for damage in damaged_metadata(place, root):
        place.write(f"{damage.array}/zarr.json", documents[damage.array])


def _restore_small(place: Place, root: Root, contents: Mapping[str, NDArray]) -> None:
    """Writes the small arrays that are absent or not what they must be."""
    for array in (a for a in root.layout.small() if a.name in contents):
        for key in array.keys:
            values = contents[array.name]
            try:
                same = read_chunk(place, f"{array.name}/{key}", np.empty_like(values)) == checksum(values)
            except Torn:
                same = False
            if not same:
                store.write_chunk(place, array, key, values)


def _continue(
    place: Place, wanted: Root, contents: Mapping[str, NDArray], retry: Mapping[str, Collection[int]]
) -> Writer:
    """The writer of a store that is already there: swept, its small files restored, its damaged chunks open again."""
    if isinstance(place, Local):
        place.refuse_removal()
    there = read_root(place)
    if not isinstance(place, Local) and there.state == REMOVING:
        return _make_of_objects(place, wanted, contents, overwrite=False)
    _refuse_other(place, there, wanted, contents)
    if there.sealed and not _to_open(place, there, contents, retry):
        return Writer(place, there, None)
    lock = place.lock().take()
    try:
        with place.refusals():
            place.sweep()
            there = read_root(place)  # its last owner may have sealed it just now
            if there.sealed:
                lost = _to_open(place, there, contents, retry)
                for array, key in lost:  # else a whole chunk in the wrong place would pass for finished
                    place.delete(f"{array}/{key}")
                there = store.write_root(place, reopened(there, lost)) if lost else there
            if not there.sealed:
                _restore_metadata(place, there)
                _restore_small(place, there, contents)
    except BaseException:
        lock.release()
        raise
    return Writer(place, there, lock)


def _to_open(
    place: Place, root: Root, contents: Mapping[str, NDArray], retry: Mapping[str, Collection[int]]
) -> list[tuple[str, str]]:
    """(array, key) of the chunks of a sealed store that are damaged or hold a row to be tried again.

    What follows from the training features, a classifier that is not in contents, goes with their rows.
    """
    again = [
        (chunk.array, chunk.key)
        for chunk in root.layout.chunks()
        if any(chunk.start <= row < chunk.stop for row in retry.get(chunk.split, ()))
    ]
    if retry.get("train"):
        again += [(a.name, key) for a in root.layout.small() if a.name not in contents for key in a.keys]
    return list(dict.fromkeys([(damage.array, damage.chunk) for damage in damages(place, root)] + again))


def _refuse_other(place: Place, there: Root, wanted: Root, contents: Mapping[str, NDArray]) -> None:
    """Raises Otherwise naming each field in which the store differs from the one that is wanted."""
    old, new = _identity(there), _identity(wanted)
    if old == new:  # else labels and ids that differ follow from it
        for name, values in contents.items():
            for key, crc in there.manifest.get(name, {}).items():
                old[f"crc32c of {name}/{key}"], new[f"crc32c of {name}/{key}"] = crc, checksum(values)
    fields = [f for f in dict.fromkeys([*new, *old]) if old.get(f) != new.get(f)]
    if fields:
        listed = "; ".join("{} is {} there, {} wanted".format(f, *_shown(old.get(f), new.get(f))) for f in fields)
        raise Otherwise(
            f"{place}: holds features made otherwise: {listed}. Choose another --out, or replace it with --overwrite"
        )


def _identity(root: Root) -> dict[str, Any]:
    layout = root.layout
    sizes = {f"{name} (views, rows)": [views, rows] for name, views, rows in layout.splits}
    fields = {**sizes, "width": layout.width, "dtype": layout.dtype, "class_names": list(root.class_names)}
    return {**fields, "counts": list(root.counts), **root.fingerprint}


def _shown(*values: Any, most: int = 60) -> list[str]:
    """Values as JSON; of long ones the part in which they differ."""
    texts = [canonical(value).decode() for value in values]
    if max(map(len, texts)) <= most:
        return texts
    same = next((i for i, of in enumerate(zip(*texts, strict=False)) if len(set(of)) > 1), 0)
    start = max(0, same - most // 3)
    return [("…" if start else "") + t[start : start + most] + ("…" if start + most < len(t) else "") for t in texts]
