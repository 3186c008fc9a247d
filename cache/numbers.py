"""Between the numbers people compute with and the bits a store holds."""

import numpy as np
from numpy.typing import NDArray

# the type that a reader gets for each type of store
NUMBERS = {"float16": np.float16, "bfloat16": np.float32, "float32": np.float32}


def encode(rows: NDArray, dtype: str) -> NDArray:
    """Finite features as the store keeps them: float16, float32, or the bits of bfloat16 rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(rows, {"float16": "<f2", "float32": "<f4"}[dtype])
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def decode(rows: NDArray, dtype: str, out: NDArray | None = None) -> NDArray:
    """Stored rows as numbers; bfloat16 becomes float32, which holds each of its values exactly.

    out: receives them and is returned; of the numbers' own type or of a float type that holds it.
    """
    if dtype != "bfloat16":
        if out is None:
            return rows
        np.copyto(out, rows, casting="safe")
        return out
    if out is not None and out.dtype == np.float32 and out.flags.c_contiguous:
        np.left_shift(rows, 16, out=out.view(np.uint32), dtype=np.uint32)
        return out
    numbers = decode(rows, dtype, np.empty(rows.shape, np.float32))
    return numbers if out is None else decode(numbers, "float32", out)


def absent_rows(rows: NDArray, dtype: str) -> NDArray[np.int64]:
    """Positions of the rows (n, D), as stored, that hold no features: they are not a number from end to end."""
    return np.flatnonzero(np.isnan(decode(rows[:, 0], dtype)))
