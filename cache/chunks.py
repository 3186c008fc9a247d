"""Reading chunk files: little-endian numbers followed by their crc32c, as zarr's bytes and crc32c codecs write them.

Not through zarr: it copies each chunk several times before the caller has it, and shows a missing one as its fill value.
"""

import os
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray


class Torn(Exception):
    """A chunk file is missing, cut short, too long, or does not match its own checksum."""


def checksum(data: bytes | NDArray) -> int:
    """crc32c (Castagnoli) of bytes or of a contiguous array's bytes."""
    return google_crc32c.value(data)


def read_chunk(path: Path, into: NDArray, *, padding: int = 0) -> int:
    """crc32c of a chunk whose first rows were read into a contiguous array.

    padding: bytes that follow those rows in a last, partly filled chunk. Nothing is copied.
    Raises Torn naming what is wrong with the file; `into` then holds rubbish.
    """
    flat = into.reshape(-1).view(np.uint8)
    rest = np.empty(padding + 4, np.uint8)
    try:
        with open(path, "rb", buffering=0) as file:
            size, expected = os.fstat(file.fileno()).st_size, flat.nbytes + rest.nbytes
            if size != expected:
                raise Torn(f"has {size:,} bytes instead of {expected:,}")
            _fill(file, flat)
            _fill(file, rest)
    except FileNotFoundError:
        raise Torn("is missing") from None
    except OSError as error:
        raise Torn(f"cannot be read: {error.strerror}") from error
    crc = google_crc32c.extend(checksum(flat), rest[:-4])
    if crc != int.from_bytes(rest[-4:].tobytes(), "little"):
        raise Torn("does not match its own checksum")
    return crc


def _fill(file, into: NDArray[np.uint8]) -> None:
    view, done = into.data, 0
    while done < into.nbytes:
        count = file.readinto(view[done:])
        if not count:
            raise Torn("is cut short")
        done += count
