"""Reading chunk files: little-endian numbers followed by their crc32c, as zarr's bytes and crc32c codecs write them.

Not through zarr: it copies each chunk several times before the caller has it, and shows a missing one as its fill value.
"""

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.place import Place

PIECE = 1 << 20  # bytes read at a time: their checksum is taken while they are still in the processor's cache


class Torn(Exception):
    """A chunk file is missing, cut short, too long, or does not match its own checksum."""


def checksum(data: bytes | NDArray) -> int:
    """crc32c (Castagnoli) of bytes or of a contiguous array's bytes."""
    return google_crc32c.value(data)


def read_chunk(place: Place, name: str, into: NDArray, *, padding: int = 0) -> int:
    """crc32c of a chunk whose first rows were read into a contiguous array.

    padding: bytes that follow those rows in the file and are checked but not kept. Nothing is copied, and a chunk that
    is only checked takes the memory of one piece. Raises Torn naming what is wrong; `into` then holds rubbish.
    """
    flat = into.reshape(-1).view(np.uint8)
    crc, rest, last = 0, np.empty(min(padding, PIECE), np.uint8), np.empty(4, np.uint8)
    try:
        with place.open(name) as (file, size):
            expected = flat.nbytes + padding + 4
            if size != expected:
                raise Torn(f"has {size:,} bytes instead of {expected:,}")
            for start in range(0, flat.nbytes, PIECE):
                crc = google_crc32c.extend(crc, _fill(file, flat[start : start + PIECE]))
            for start in range(0, padding, PIECE):
                crc = google_crc32c.extend(crc, _fill(file, rest[: padding - start]))
            _fill(file, last)
    except FileNotFoundError:
        raise Torn("is missing") from None
    except OSError as error:
        raise Torn(f"cannot be read: {error.strerror}") from error
    if crc != int.from_bytes(last.tobytes(), "little"):
        raise Torn("does not match its own checksum")
    return crc


def _fill(file, into: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view, done = into.data, 0
    while done < into.nbytes:
        count = file.readinto(view[done:])
        if not count:
            raise Torn("is cut short")
        done += count
    return into
