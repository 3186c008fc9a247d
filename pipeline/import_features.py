"""Features that somebody else computed, as a store of this program: checked arrays in, sealed store out."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

import cache
from pipeline.data.dataset import check_labels, numbered_names
from pipeline.data.names import class_names_from
from pipeline.data.sources import read_npz, unreadable_reason
from pipeline.dump_prepare import as_data_error
from pipeline.errors import DataError
from pipeline.method_names import PROBE
from pipeline.prepared import Prepared, Write
from pipeline.probe import SETTINGS as PROBE_SETTINGS
from pipeline.probe import Probe, fit_probe
from pipeline.provenance import provenance
from pipeline.text import Shown

SPLITS = ("train", "val", "test")
ARRAYS = (*(f"{split}_{kind}" for split in SPLITS for kind in ("features", "labels", "index")), "weight", "bias")
GIVEN_HEAD = "weight and bias of the arrays"


@dataclass(frozen=True)
class ImportResult(Shown):
    """A sealed store of imported features.

    Arguments:
        samples: split → N.
        views: of each training sample.
        head: name of the head that stage 2 starts from.
    """

    store: Path | str
    digest: str
    samples: dict[str, int]
    views: int
    width: int
    classes: int
    dtype: str
    head: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"store": str(self.store)}

    def __str__(self) -> str:
        sizes = ", ".join(f"{n:,} {split}" for split, n in self.samples.items())
        return (
            f"{self.store}: {sizes}; {self.classes} classes, {self.views} training view(s), {self.width} features each, "
            f"{self.dtype}; {self.seconds:.1f} s; digest {self.digest[:16]}\n"
            f"head: {PROBE_SETTINGS if self.head == PROBE else self.head}\nnext: pipeline rebalance {self.store}"
        )


def store_from_arrays(
    out: Path | str,
    *,
    dtype: str = "float16",
    class_names: ArrayLike | None = None,
    origin: str = "arrays",
    overwrite: bool = False,
    **arrays: ArrayLike,
) -> ImportResult:
    """Return the sealed store of features that were computed elsewhere; the same arrays find it complete.

    Arguments:
        out: a folder or URL.
        dtype: of the stored features: float16, bfloat16 or float32.
        class_names: (C,) texts; by default the numbers of the classes.
        origin: where the arrays come from, for messages and the store's provenance.
        overwrite: replace a store of other features.
        arrays: train_features (N, D) or (V, N, D) with view 0 the clean one; train_labels (N,) in 0…C−1; val_features,
            val_labels, test_features, test_labels likewise with one view; train_index and the like, ids of the samples;
            weight (C, D) and bias (C,) of a classifier to start from. Without weight a linear probe is fitted.

    Raises:
        DataError: arrays that do not fit each other, numbers that are not finite or too large for dtype, a class without a
            training row, or a store of other features.
    """
    started = time.perf_counter()
    contents = _store_arguments(arrays, class_names, dtype=dtype, origin=origin)
    features = {split: _with_views(arrays[f"{split}_features"]) for split in contents["splits"]}
    with as_data_error(), cache.create_store(out, overwrite=overwrite, **contents) as writer:
        for chunk in writer.missing():
            writer.write(chunk, np.asarray(features[chunk.split][chunk.view, chunk.start : chunk.stop], np.float32))
        facts = {}
        if contents["weight"] is None and not writer.has_classifier:
            probe = _fit_head(writer, contents["splits"])
            writer.set_classifier(probe.weight, probe.bias)
            facts = {"head": str(probe), "probe": probe.to_dict()}
        digest = writer.seal(facts=facts)
        layout = writer.layout
    return ImportResult(
        store=out,
        digest=digest,
        samples={split: layout.rows(split) for split in contents["splits"]},
        views=layout.views("train"),
        width=layout.width,
        classes=layout.classes,
        dtype=layout.dtype,
        head=PROBE if contents["weight"] is None else GIVEN_HEAD,
        seconds=round(time.perf_counter() - started, 2),
    )


def prepare_import(
    out: Path | str,
    *,
    dtype: str = "float16",
    class_names: ArrayLike | None = None,
    origin: str = "arrays",
    overwrite: bool = False,
    **arrays: ArrayLike,
) -> Prepared:
    """Return what `store_from_arrays` would do, checked; nothing is written.

    Arguments and raises: those of `store_from_arrays`.
    """
    contents = _store_arguments(arrays, class_names, dtype=dtype, origin=origin)
    with as_data_error():
        store = cache.foresee_store(out, overwrite=overwrite, **contents)
    sizes = ", ".join(f"{store.layout.rows(split):,} {split}" for split in contents["splits"])
    head = "a linear probe is fitted" if contents["weight"] is None else GIVEN_HEAD
    return Prepared(
        command="import-features",
        config={},
        facts={"features": f"{origin}: {sizes}; {store.layout.width} features each, {dtype}", "head": head},
        numbers={"chunks": len(store.missing), "store_bytes": store.layout.bytes},
        writes=(Write(out, store.layout.bytes, store.state),),
        notes=(),
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file, those whose names `store_from_arrays` takes and `class_names`.

    Raises: DataError: the file cannot be read, or holds no train_features and train_labels.
    """
    arrays = read_npz(path, (*ARRAYS, "class_names"))
    missing = [name for name in ("train_features", "train_labels") if name not in arrays]
    if missing:
        raise DataError(f"{path}: needs {' and '.join(missing)}; it holds {', '.join(read_npz(path)) or 'nothing'}")
    return arrays


def read_array(path: Path) -> np.ndarray:
    """Return the array of an .npy file, mapped into memory; raise DataError where it cannot be read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises a dozen types for damaged bytes
        raise DataError(f"{path}: cannot be read as .npy ({unreadable_reason(error)})") from error


def _store_arguments(
    arrays: Mapping[str, ArrayLike], class_names: ArrayLike | None, *, dtype: str, origin: str
) -> dict[str, Any]:
    """Return the arguments of `cache.create_store`, every array checked."""
    if unknown := sorted(set(arrays) - set(ARRAYS)):
        raise DataError(f"{origin}: unknown array {unknown[0]}; known are {', '.join(ARRAYS)}")
    for name in ("train_features", "train_labels"):
        if name not in arrays:
            raise DataError(f"{origin}: {name} is missing")
    width = np.shape(arrays["train_features"])[-1] if np.ndim(arrays["train_features"]) else 0
    weight, bias = arrays.get("weight"), arrays.get("bias")
    if class_names is not None:
        names = class_names_from(np.asarray(class_names).ravel().tolist(), f"{origin} (class_names)")
    else:
        numbered = tuple(map(str, range(len(np.asarray(weight))))) if weight is not None else None
        names = numbered or numbered_names(np.asarray(arrays["train_labels"]), f"{origin} (train_labels)")
    splits = {
        split: _checked_split(arrays, split, len(names), width, origin)
        for split in SPLITS
        if f"{split}_features" in arrays or f"{split}_labels" in arrays
    }
    counts = np.bincount(splits["train"].labels, minlength=len(names))
    if len(names) < 2 or not counts.all():
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        raise DataError(
            f"{origin}: class {empty[0]} has no training row; leave it out of class_names or bring features of it"
            if empty
            else f"{origin}: only one class; a classifier needs at least two"
        )
    if bias is not None and weight is None:
        raise DataError(f"{origin}: bias without weight; give both, or none for a linear probe")
    if weight is not None:
        weight = _finite(np.asarray(weight, np.float32), "weight", origin)
        bias = _finite(np.asarray(np.zeros(len(weight)) if bias is None else bias, np.float32), "bias", origin)
        if weight.shape != (len(names), width) or bias.shape != (len(names),):
            raise DataError(
                f"{origin}: weight {weight.shape} and bias {bias.shape} are not of {len(names)} classes and {width} features"
            )
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.shape} {array.dtype.str}".encode() + array.tobytes())
    return {
        "splits": splits,
        "width": width,
        "dtype": dtype,
        "weight": weight,
        "bias": bias,
        "class_names": names,
        "counts": counts,
        "fingerprint": {
            "arrays": sha.hexdigest(),
            "dtype": dtype,
            **({} if weight is not None else {"probe": PROBE_SETTINGS}),
        },
        "provenance": provenance(command="import-features", made_from={"arrays": origin}),
    }


def _checked_split(
    arrays: Mapping[str, ArrayLike], split: str, classes: int, width: int, origin: str
) -> cache.StoreSplit:
    """Return one split for `cache.create_store`; raise DataError naming the array that does not fit."""
    for kind in ("features", "labels"):
        if f"{split}_{kind}" not in arrays:
            raise DataError(f"{origin}: {split}_{kind} is missing beside the other array of {split}")
    features = _with_views(arrays[f"{split}_features"])
    if features.ndim != 3 or features.shape[2] != width or not width or not np.issubdtype(features.dtype, np.floating):
        shape = np.shape(arrays[f"{split}_features"])
        raise DataError(
            f"{origin}: {split}_features is {features.dtype} of shape {shape}, expected floating-point numbers (N, {width})"
        )
    if split != "train" and len(features) > 1:
        raise DataError(
            f"{origin}: {split}_features has {len(features)} views; only training features may have several"
        )
    _finite(features, f"{split}_features", origin)
    labels = check_labels(np.asarray(arrays[f"{split}_labels"]), classes, f"{origin} ({split}_labels)")
    ids = np.asarray(arrays.get(f"{split}_index", np.arange(len(labels))))
    if not len(labels) == features.shape[1] == len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{origin}: {split} has {features.shape[1]} features, {len(labels)} labels and {len(ids)} ids")
    return cache.StoreSplit(len(features), labels, ids.astype(np.int64))


def _with_views(features: ArrayLike) -> np.ndarray:
    """Return features (N, D) or (V, N, D) as (V, N, D)."""
    array = np.asarray(features)
    return array[None] if array.ndim == 2 else array


def _finite(array: np.ndarray, name: str, origin: str) -> np.ndarray:
    """Return the array; raise DataError naming the first row that holds a number which is not finite."""
    finite = np.isfinite(array)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][-2 if array.ndim > 1 else 0])
        raise DataError(f"{origin}: {name}, row {row}: a number that is not finite; mend it or leave the row out")
    return array


def _fit_head(writer: cache.Writer, splits: Mapping[str, cache.StoreSplit]) -> Probe:
    """Return a linear probe on the clean training features in the store, its L2 chosen on validation where there is one."""
    layout = writer.layout

    def blocks(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        truth = torch.from_numpy(np.asarray(splits[split].labels))
        for chunk in layout.chunks_of(split, 0):
            yield torch.from_numpy(writer.read(chunk)).float(), truth[chunk.start : chunk.stop]

    validation = partial(blocks, "val") if "val" in splits else None
    return fit_probe(partial(blocks, "train"), classes=layout.classes, width=layout.width, validation=validation)
