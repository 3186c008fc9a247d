"""The files of a store, made and written by zarr; here they are also made durable, which zarr's writes are not.

zarr is imported where it is used: it takes most of a second, which who only reads need not wait for.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import EllipsisType, MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.layout import Array, Layout
from cache.place import Place
from cache.root import Root

# what a plain zarr client shows where a chunk is missing: not a number, never a plausible zero
_FILL = {"<f2": np.nan, "<f4": np.nan, "<u2": 0x7FC0, "<i8": -1}


@functools.lru_cache(maxsize=8)  # zarr takes a third of a second for them
def metadata(layout: Layout) -> Mapping[str, bytes]:
    """Name of each group and array below the root → the zarr.json that zarr makes for it."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    files: dict[str, Any] = {}
    top = zarr.create_group(files)
    for group in layout.groups:
        top.create_group(group)
    for array in layout.arrays:
        top.create_array(
            array.name,
            shape=array.shape,
            chunks=array.chunk,
            dtype=array.stored,
            fill_value=_FILL[array.stored],
            filters=None,
            serializer=BytesCodec(endian="little"),
            compressors=Crc32cCodec(),
            attributes={"bits_of": "bfloat16"} if array.dtype == "bfloat16" else {},
        )
    documents = {key.rpartition("/")[0]: document.to_bytes() for key, document in files.items()}
    return MappingProxyType({name: document for name, document in documents.items() if name})


def write_root(place: Place, root: Root) -> Root:
    """The root, after its zarr.json was replaced in one atomic, durable step: this is what seals or opens a store.

    Raises Changed where an object store holds another version than root.tag.
    """
    import zarr

    files: dict[str, Any] = {}
    zarr.create_group(files, attributes=root.attributes())
    return replace(root, tag=place.write("zarr.json", files["zarr.json"].to_bytes(), tag=root.tag))


def write_chunk(
    place: Place, array: Array, key: str, values: NDArray, selection: tuple[slice, ...] | EllipsisType = ...
) -> None:
    """Assigns `selection`, the rows of one whole chunk; it is durable on return, and absent or as before if that fails."""
    import zarr

    with place.writing(f"{array.name}/{key}"):
        # else zarr compares each chunk with the fill value and leaves out equal ones: slow, and here all have to exist
        with zarr.config.set({"array.write_empty_chunks": True}):
            opened = zarr.open_array(place.zarr(), path=array.name, mode="r+")
        opened[selection] = values
