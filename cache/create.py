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
    """Return the writer of a new open store, or of the existing one if its fingerprint is the same.

    A sealed store with damaged files is opened again for those alone; an intact one comes back sealed. The writer holds the
    store's lock until it is closed.

    Arguments:
        splits: by name, "train" among them.
        width: D, numbers in a feature.
        dtype: float16, float32 or bfloat16.
        weight, bias: (C, D) and (C,) of the stage-1 classifier. Both None for one that follows from the features: then
            `Writer.set_classifier` has to come before the seal, and the fingerprint has to say how it is made.
        counts: (C,) training labels of each class.
        fingerprint: flat JSON that decides the features: a store with another one is refused.
        provenance: any JSON.
        rows_per_chunk: None for chunks of about 16 MiB.
        overwrite: replace what is there.
        retry: split → rows that were skipped and have features now; a sealed store is opened again for their chunks.
    Raises: CacheError: another fingerprint (the differing fields are named), a second writer, or a path that is no store.
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
    """The state in which `create_store` finds a store: `new`, or one that is `sealed`, `open`, `damaged` or to be `replaced`.

    Arguments:
        layout: of the store that is wanted.
        missing: its chunks of features that are still to be written.
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
    **arguments: Any,
) -> Foreseen:
    """Return the state in which `create_store` would find a store, and raise what it would raise; nothing is written.

    A store in a bucket that another process writes is not noticed.

    Arguments:
        overwrite, retry: as for `create_store`.
        skipping: as for `Writer.missing`.
        arguments: the other arguments of `create_store`.
    """
    place, root, contents = _wanted(path, **arguments)
    foreseen = _foreseen(place, root, contents, overwrite=overwrite, retry=retry or {}, skipping=skipping)
    if isinstance(place, Local) and foreseen.missing:
        with place.refusals():
            refuse_unwritable(place.path)
    return foreseen


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
    existing = read_root(place)
    if existing.state == REMOVING:
        return Foreseen("new", root.layout, every)
    _refuse_other(place, existing, root, contents)
    if existing.sealed:
        reopen = set(_to_open(place, existing, contents, retry))
        missing = tuple(chunk for chunk in every if (chunk.array, chunk.key) in reopen)
        return Foreseen("damaged" if reopen else "sealed", existing.layout, missing)
    return Foreseen("open", existing.layout, tuple(Writer(place, existing, None).missing(skipping=skipping)))


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
    values_by_name: dict[str, ArrayLike] = {}
    if weight is not None and bias is not None:
        values_by_name |= {"classifier/weight": weight, "classifier/bias": bias}
    for name, split in splits.items():
        values_by_name |= {f"{name}/labels": split.labels, f"{name}/ids": split.ids}
    contents = {}
    for array in (a for a in layout.small() if a.name in values_by_name):
        contents[array.name] = np.ascontiguousarray(values_by_name[array.name], array.stored)
        if contents[array.name].shape != array.shape:
            raise ValueError(f"{array.name} has shape {contents[array.name].shape}, expected {array.shape}")
    return contents


def _make(building: Local, root: Root, contents: Mapping[str, NDArray]) -> None:
    """All files of a new open store but the chunks of features."""
    store.write_root(building, root)
    for name, document in store.metadata(root.layout).items():
        building.write(f"{name}/zarr.json", document)
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
    documents = store.metadata(root.layout)
    for damage in damaged_metadata(place, root):
        place.write(f"{damage.array}/zarr.json", documents[damage.array])


def _restore_small(place: Place, root: Root, contents: Mapping[str, NDArray]) -> None:
    """Writes the small arrays that are absent or not what they must be."""
    for array in (a for a in root.layout.small() if a.name in contents):
        for key in array.keys:
            values = contents[array.name]
            try:
                intact = read_chunk(place, f"{array.name}/{key}", np.empty_like(values)) == checksum(values)
            except Torn:
                intact = False
            if not intact:
                store.write_chunk(place, array, key, values)


def _continue(
    place: Place, requested: Root, contents: Mapping[str, NDArray], retry: Mapping[str, Collection[int]]
) -> Writer:
    """The writer of a store that is already there: swept, its small files restored, its damaged chunks open again."""
    if isinstance(place, Local):
        place.refuse_removal()
    existing = read_root(place)
    if not isinstance(place, Local) and existing.state == REMOVING:
        return _make_of_objects(place, requested, contents, overwrite=False)
    _refuse_other(place, existing, requested, contents)
    if existing.sealed and not _to_open(place, existing, contents, retry):
        return Writer(place, existing, None)
    lock = place.lock().take()
    try:
        with place.refusals():
            place.sweep()
            existing = read_root(place)  # its last owner may have sealed it just now
            if existing.sealed:
                reopen = _to_open(place, existing, contents, retry)
                for array, key in reopen:  # else a whole chunk in the wrong place would pass for finished
                    place.delete(f"{array}/{key}")
                existing = store.write_root(place, reopened(existing, reopen)) if reopen else existing
            if not existing.sealed:
                _restore_metadata(place, existing)
                _restore_small(place, existing, contents)
    except BaseException:
        lock.release()
        raise
    return Writer(place, existing, lock)


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


def _refuse_other(place: Place, existing: Root, requested: Root, contents: Mapping[str, NDArray]) -> None:
    """Raises Otherwise naming each field in which the store differs from the one that is wanted."""
    old, new = _identity(existing), _identity(requested)
    if old == new:  # else labels and ids that differ follow from it
        for name, values in contents.items():
            for key, crc in existing.manifest.get(name, {}).items():
                old[f"crc32c of {name}/{key}"], new[f"crc32c of {name}/{key}"] = crc, checksum(values)
    fields = [f for f in dict.fromkeys([*new, *old]) if old.get(f) != new.get(f)]
    if fields:
        differences = "; ".join("{} is {} there, {} wanted".format(f, *_shown(old.get(f), new.get(f))) for f in fields)
        raise Otherwise(
            f"{place}: holds features made otherwise: {differences}. Choose another --out, or replace it with --overwrite"
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
    prefix = next((i for i, characters in enumerate(zip(*texts, strict=False)) if len(set(characters)) > 1), 0)
    start = max(0, prefix - most // 3)
    return [("…" if start else "") + t[start : start + most] + ("…" if start + most < len(t) else "") for t in texts]
