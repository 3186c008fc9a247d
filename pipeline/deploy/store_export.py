"""A feature store as plain files."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import cache
from cache import Cache, CacheError, Exported, refuse_unwritable
from pipeline.errors import DataError
from pipeline.prepared import Prepared, Write

Format = Literal["npy", "safetensors"]


@dataclass(frozen=True, eq=False)
class PreparedStoreExport:
    """An export of a store that has passed every check; `write` executes it."""

    store: Cache
    to: Format
    out: Path

    @property
    def description(self) -> Prepared:
        store = self.store
        itemsize = 4 if store.dtype == "float32" or (self.to == "npy" and store.dtype == "bfloat16") else 2
        rows = sum(store.rows(split) for split in store.splits)
        numbers = sum(prod((store.views(s), store.rows(s), store.width)) for s in store.splits)
        size = itemsize * numbers + 16 * rows + 4 * len(store.counts) * (store.width + 1)
        shapes = ", ".join(f"{s} {store.views(s)} × {store.rows(s):,} × {store.width}" for s in store.splits)
        facts = {"store": f"{store.path}: {shapes}, {store.dtype}"}
        document = {"store": str(store.path), "to": self.to}
        return Prepared("export", {}, facts, document, (Write(self.out, size, "new"),))

    def write(self) -> Exported:
        return cache.export(self.store, self.out, format=self.to)


def prepare_store_export(store: Path | str, *, to: Format = "npy", out: Path) -> PreparedStoreExport:
    """Return the export of a store that `cache.export` would execute, checked; nothing is written.

    Arguments:
        to: the format, as for `cache.export`.
        out: the folder to make.
    Raises: DataError: the store cannot be read, or `out` holds something.
    """
    try:
        opened = cache.open_cache(store)
    except CacheError as error:
        raise DataError(str(error)) from error
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: already holds something; choose another --out, or remove it")
    refuse_unwritable(out)
    return PreparedStoreExport(opened, to, out)
