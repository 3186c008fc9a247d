"""Randomness as a pure function of (seed, purpose, index): nothing to save, nothing that depends on ranks or workers."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive(seed: int, purpose: str, *index: int) -> int:
    """Return a 63-bit seed that depends on all of seed, purpose and index, and on nothing else."""
    text = repr((int(seed), purpose, *(int(i) for i in index))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniform(seed: int, ids: ArrayLike, draws: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1) of shape (len(ids), draws), each a function of (seed, id, draw) alone.

    The generator is splitmix64 used as a counter (Steele, Lea and Flood, OOPSLA 2014): whole batches at once, where
    one Generator per sample would cost more than the augmentation it seeds.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(seed) ^ _mix(np.asarray(ids).astype(np.uint64) * _GOLDEN + np.uint64(1)))
        bits = _mix(start[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_torch(seed: int, device: "torch.device") -> None:
    """Seed the generators that dropout and the like draw from.

    torch.manual_seed asks all kinds of devices and takes 50 times as long.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
