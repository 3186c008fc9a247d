"""A checksummed, resumable store of features: a zarr v3 group that any zarr client can read.

Make one: `create_store` (one process), `open_writer` (others beside it), `Writer.missing`, `write`, `seal`.
Use one: `open_cache`, then `Cache.read`, or `Cache.stream` where it is larger than memory. Check one: `verify`.
zarr makes and writes the files; chunks are read straight into the caller's memory, so that importing this loads neither
torch nor zarr.
"""

from cache.create import Foreseen, StoreSplit, create_store, foresee_store
from cache.files import refuse_unwritable, write_durably
from cache.layout import CacheError, Chunk, Layout, Otherwise, Unlockable, chunk_rows, owned_chunks
from cache.locate import is_url, locate
from cache.lock import Lock
from cache.plain import Exported, export
from cache.reader import Cache, open_cache
from cache.stream import stream_order
from cache.verify import Damage, verify
from cache.writer import Writer, open_writer

__all__ = [
    "Cache",
    "CacheError",
    "Chunk",
    "Damage",
    "Exported",
    "Foreseen",
    "Layout",
    "Lock",
    "Otherwise",
    "StoreSplit",
    "Unlockable",
    "Writer",
    "chunk_rows",
    "create_store",
    "export",
    "foresee_store",
    "is_url",
    "locate",
    "open_cache",
    "open_writer",
    "owned_chunks",
    "refuse_unwritable",
    "stream_order",
    "verify",
    "write_durably",
]
