"""Heads on a CPU: each goes alone through the batches of a block, in the cache of its core (the C kernel in csrc/).

The kernel is built when the package is installed, where there is a C compiler; without it the tensor engine does the
same with several times the work.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pipeline.rebalance.engine.formulation import Penalty

try:
    from pipeline.rebalance.engine import _c_kernel  # type: ignore[attr-defined]
except ImportError:
    _c_kernel = None

SHARED = 10**7  # operations of a step from which threads gain by sharing a head

_ADDRESSES = ("weight", "velocity", "bias", "bias_velocity", "half_target", "class_weight", "prior")
_SWITCHES = ("penalised", "summed", "loss", "by_sum", "divergence", "direction", "hardness", "moving")
HEAD = np.dtype(
    [(name, np.uint64) for name in _ADDRESSES] + [("kl_weight", np.float64)] + [(name, np.int32) for name in _SWITCHES],
    align=True,
)
BLOCK = np.dtype(
    [(name, np.uint64) for name in ("features", "inverse_norm", "labels")]
    + [(name, np.int64) for name in ("rows", "batch", "width", "classes", "padded")]
    + [(name, np.float64) for name in ("lr", "momentum", "weight_decay")],
    align=True,
)
if _c_kernel is not None and _c_kernel.sizes() != (HEAD.itemsize, BLOCK.itemsize):
    _c_kernel = None  # built from other sources


def instruction_sets() -> dict[str, int]:
    """Lanes of a vector by name of every instruction set that the kernel can use here, the fastest first; empty without it."""
    return {} if _c_kernel is None else dict(_c_kernel.instruction_sets())


class Heads:
    """S × K heads with their momentum, all of one size; arrays of the kernel's precision.

    weight (C, D), bias (C,): where all start. priors (K, C): added to the bias while fitting. half_targets (K, C): λ·NC/2.
    class_weights: (C,) of every weighting with whether it is divided by its sum over the batch; weighting (K,): which of
    them a head takes. bce (K,): which loss.
    """

    def __init__(
        self,
        weight: NDArray,
        bias: NDArray,
        *,
        seeds: int,
        penalties: Sequence[Penalty],
        half_targets: NDArray,
        priors: NDArray,
        class_weights: Sequence[tuple[NDArray, bool]],
        weighting: Sequence[int],
        bce: Sequence[bool],
        dtype: type[np.floating] = np.float32,
        instruction_set: str | None = None,
    ):
        sets = instruction_sets()
        name = "double" if dtype is np.float64 else instruction_set or next(iter(sets))
        if name == "double" and dtype is not np.float64:
            raise ValueError("the kernel for double precision takes no float32: choose another, or dtype=torch.float64")
        self._set, lanes = list(sets).index(name), sets[name]
        self.dtype, (self.classes, self.width) = np.dtype(dtype), weight.shape
        self.padded = -(-self.classes // lanes) * lanes
        shape = (seeds, len(penalties))
        self._weight, self._bias = self._zeros(*shape, self.width), self._zeros(*shape)
        self._weight[..., : self.classes] = weight.T
        self._bias[..., : self.classes] = bias + priors
        self._bias[..., self.classes :] = -1e30  # e^ of it is exactly 0: padding has no probability and no gradient
        self._velocity, self._bias_velocity = np.zeros_like(self._weight), np.zeros_like(self._bias)
        self._half, self._prior = self._zeros(len(penalties)), self._zeros(len(penalties))
        self._prior[:, : self.classes] = priors
        self._class = self._zeros(len(class_weights))
        self._half[:, : self.classes] = half_targets
        self._class[:, : self.classes] = np.stack([weights for weights, _ in class_weights])
        self._heads = np.zeros(shape, HEAD)
        for s, k in np.ndindex(shape):
            rule, of = penalties[k], weighting[k]
            arrays = (self._weight[s, k], self._velocity[s, k], self._bias[s, k], self._bias_velocity[s, k])
            addresses = [array.ctypes.data for array in (*arrays, self._half[k], self._class[of], self._prior[k])]
            summed = rule.kl_weight == "batch"
            kl_weight = 1.0 if rule.kl_weight == "batch" else float(rule.kl_weight)
            self._heads[s, k] = (
                *addresses,
                kl_weight,
                kl_weight != 0,
                summed,
                bce[k],
                class_weights[of][1],
                rule.divergence == "mse",
                rule.direction == "target-to-norms",
                ("vector", "scalar", "none").index(rule.hardness),
                not rule.detach_target and rule.hardness != "none",
            )

    @property
    def weight(self) -> NDArray:
        """(S, K, C, D)"""
        return self._weight[..., : self.classes].swapaxes(2, 3)

    @property
    def bias(self) -> NDArray:
        """(S, K, C), the prior taken out again."""
        return (self._bias - self._prior)[..., : self.classes]

    def advance(
        self,
        pool: ThreadPoolExecutor,
        threads: int,
        blocks: Sequence[tuple[NDArray, NDArray, NDArray]],
        *,
        batch: int,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> Iterator[None]:
        """One block of batches for every seed and head, by `threads` threads; done when the iterator is used up.

        blocks: for every seed features (n, D), 1/|x| (n,) of this precision and labels (n,) int32, contiguous.
        """
        assert _c_kernel is not None
        kernel, which, heads = _c_kernel, self._set, self._heads
        described = np.zeros(len(blocks), BLOCK)
        for s, (features, inverse, labels) in enumerate(blocks):
            addresses = (features.ctypes.data, inverse.ctypes.data, labels.ctypes.data)
            sizes = (len(features), batch, self.width, self.classes, self.padded)
            described[s] = (*addresses, *sizes, lr, momentum, weight_decay)
        members = self._members(threads, batch)
        parts = [list(range(k, heads.size, threads // members)) for k in range(threads // members)]
        scratch = _c_kernel.scratch_size(batch, self.padded, members)
        teams = [(np.empty(scratch, self.dtype), np.zeros(2, np.int32), of) for of in parts]

        def run(task: tuple[tuple[NDArray, NDArray, list[int]], int]) -> None:
            (scratch, meeting, numbers), rank = task
            assert blocks  # kept alive until here: the kernel has only their addresses
            for number in numbers:
                s, k = divmod(number, heads.shape[1])
                addresses = (scratch.ctypes.data, meeting.ctypes.data)
                block = described.ctypes.data + s * BLOCK.itemsize
                kernel.advance(which, heads[s].ctypes.data, k, k + 1, block, *addresses, rank, members)

        return pool.map(run, itertools.product(teams, range(members)))

    def _members(self, threads: int, batch: int) -> int:
        """Threads that share a head: one each where there are heads enough, or where a step is over before they meet."""
        worth_sharing = 4 * batch * self.padded * self.width >= SHARED
        return max(1, threads // self._heads.size) if worth_sharing else 1

    def _zeros(self, *shape: int) -> NDArray:
        """Zeros (*shape, P)."""
        return np.zeros((*shape, self.padded), self.dtype)
