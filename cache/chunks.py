"""Chunk files: little-endian numbers followed by their crc32c, as zarr's bytes and crc32c codecs write them."""

import os
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.files import write_durably


class Torn(Exception):
    """A chunk file is missing, cut short, too long, or does not match its own checksum."""


def checksum(data: bytes | NDArray) -> int:
    """crc32c (Castagnoli) of bytes or of a contiguous array's bytes."""
    return google_crc32c.value(data)


def write_chunk(path: Path, rows: NDArray) -> int:
    """crc32c of a chunk after its file is durably there; rows: contiguous, of the whole chunk's shape."""
    crc = checksum(rows)
    write_durably(path, lambda file: (file.write(rows.data), file.write(crc.to_bytes(4, "little"))))
    return crc


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
