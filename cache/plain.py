"""A store's numbers as files that need no zarr: .npy, or one .safetensors. Written row after row, so N costs no memory."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.files import fsync, fsync_tree, write_durably
from cache.layout import STORED, CacheError
from cache.reader import Cache, open_cache

_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int64": "I64"}


@dataclass(frozen=True)
class Exported:
    """The plain files of a store.

    Arguments:
        out: folder of the files.
        bytes: of all files.
        store, digest: of the store that they were made from.
    """

    out: Path
    files: tuple[str, ...]
    bytes: int
    store: str
    digest: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}

    def __str__(self) -> str:
        return f"{self.out}: {', '.join(self.files)} ({self.bytes / 1e6:,.1f} MB) of {self.store}"


class _Tensor(NamedTuple):
    """A name such as train/features, the type of its numbers (a key of STORED), its shape, and its rows in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterator[NDArray]


def export(store: Cache | Path | str, out: Path | str, *, format: Literal["npy", "safetensors"] = "npy") -> Exported:
    """Write a sealed store into the new folder `out`, which is there whole or not at all.

    Features have the store's type; numpy has no bfloat16, so it becomes float32 in .npy, exactly. Rows without features are
    NaN. store.json says the rest: class names, counts, fingerprint, provenance, digest, rows without features.

    Arguments:
        format: npy for SPLIT/features.npy (V, N, D), SPLIT/labels.npy and SPLIT/ids.npy (N,) int64, classifier/weight.npy
            (C, D) and classifier/bias.npy (C,) float32; safetensors for all of them in store.safetensors, so named.
    Raises: CacheError: the store is damaged (before `out` exists), or `out` holds something.
    """
    cache, out = store if isinstance(store, Cache) else open_cache(store), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CacheError(f"{out}: already holds something; choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.*.building"):
        shutil.rmtree(leftover)
    building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".building"))
    umask = os.umask(0)
    os.umask(umask)
    building.chmod(0o777 & ~umask)  # mkdtemp gives 0700, which another user of a shared run could not read
    try:
        write_durably(building / "store.json", json.dumps(_facts(cache), indent=1, ensure_ascii=False))
        {"npy": _npy, "safetensors": _safetensors}[format](cache, building)
        files = sorted(path for path in building.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        fsync_tree(building)
        os.rename(building, out)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(out)
        raise
    fsync(out.parent)
    names = tuple(str(path.relative_to(building)) for path in files)
    return Exported(out, names, size, str(cache.path), cache.digest)


def _npy(cache: Cache, folder: Path) -> None:
    for tensor in _tensors(cache, {**STORED, "bfloat16": "<f4"}):
        path = folder / f"{tensor.name}.npy"
        path.parent.mkdir(exist_ok=True)
        descr = "<f4" if tensor.dtype == "bfloat16" else STORED[tensor.dtype]
        with open(path, "wb") as file:
            header = {"descr": descr, "fortran_order": False, "shape": tensor.shape}
            np.lib.format.write_array_header_1_0(file, header)
            _write(file, tensor)


def _safetensors(cache: Cache, folder: Path) -> None:
    """The format as its description has it: length of the header, header, then all numbers without a gap."""
    tensors = sorted(
        _tensors(cache, STORED), key=lambda t: -np.dtype(STORED[t.dtype]).itemsize
    )  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"digest": cache.digest, "class_names": json.dumps(cache.class_names)}}
    start = 0
    for tensor in tensors:
        stop = start + prod(tensor.shape) * np.dtype(STORED[tensor.dtype]).itemsize
        facts = {"dtype": _SAFETENSORS[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, stop)}
        header[tensor.name], start = facts, stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "store.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write(file, tensor)


def _write(file: BinaryIO, tensor: _Tensor) -> None:
    for part in tensor.parts:
        file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def _tensors(cache: Cache, types: dict[str, str]) -> Iterator[_Tensor]:
    """Everything in a store, each read when its parts are; types: dtype → numpy type of the features given out."""
    for split in cache.splits:
        shape = (cache.views(split), cache.rows(split), cache.width)
        yield _Tensor(f"{split}/features", cache.dtype, shape, _features(cache, split, np.dtype(types[cache.dtype])))
        for name, values in ("labels", cache.labels(split)), ("ids", cache.ids(split)):
            yield _Tensor(f"{split}/{name}", "int64", values.shape, iter([values]))
    for name, head in zip(("weight", "bias"), cache.classifier, strict=True):
        yield _Tensor(f"classifier/{name}", "float32", head.shape, iter([head]))


def _features(cache: Cache, split: str, dtype: np.dtype) -> Iterator[NDArray]:
    for view in range(cache.views(split)):
        for chunk in cache.chunks(split, view):
            yield cache.read_chunk(chunk, np.empty((chunk.rows, cache.width), dtype))


def _facts(cache: Cache) -> dict[str, Any]:
    return {
        "store": str(cache.path),
        "digest": cache.digest,
        "dtype": cache.dtype,
        "class_names": cache.class_names,
        "counts": cache.counts.tolist(),
        "fingerprint": cache.fingerprint,
        "provenance": cache.provenance,
        "rows_without_features": {split: cache.skipped(split).tolist() for split in cache.splits},
    }
