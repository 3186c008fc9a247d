"""All heads of a job through the C kernel (csrc/): on a CPU, each head alone in the cache of its core.

A piece of an epoch is passed by every head, then comes the next piece. The kernel is built when the package is installed,
where there is a C compiler; without it the tensor backend does the same with several times the work.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.rebalance.engine.epochs import Epochs
from pipeline.rebalance.engine.head import Head, class_weights
from pipeline.rebalance.engine.objective import KERNEL_SWITCHES, Penalty

try:
    from pipeline.rebalance.engine import _c_kernel  # type: ignore[attr-defined]
except ImportError:
    _c_kernel = None

PIECE_BYTES = 4 << 20  # features that all heads pass before the next ones come; those are gathered meanwhile
SHARED = 10**7  # operations of a step from which threads gain by sharing a head

_ADDRESSES = ("weight", "velocity", "bias", "bias_velocity", "half_target", "class_weight", "prior")
_SWITCHES = ("penalised", "summed", "loss", "by_sum", *KERNEL_SWITCHES, "moving")
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
    """Return name → lanes of a vector for each instruction set that the kernel can use here, the fastest first."""
    return {} if _c_kernel is None else dict(_c_kernel.instruction_sets())


def fit_with_c_kernel(
    epochs: Epochs, heads: Sequence[Head], *, threads: int, dtype: torch.dtype, instruction_set: str
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield (head numbers, weights (S, K, C, D), biases (S, K, C)) of all heads, after one pass over the data."""
    features, schedule = epochs.features, epochs.schedule
    counts = torch.as_tensor(features.counts, dtype=torch.float64)
    kinds = sorted({h.weighting for h in heads})
    fitted = KernelHeads(
        features.weight,
        features.bias,
        seeds=len(epochs.seeds),
        penalties=[h.penalty for h in heads],
        half_targets=torch.stack([h.half_target(counts) for h in heads]).numpy(),
        priors=torch.stack([h.prior(counts) for h in heads]).numpy(),
        class_weights=[(class_weights(counts, *kind).numpy(), kind[0] != "cb-bce") for kind in kinds],
        weighting=[kinds.index(h.weighting) for h in heads],
        bce=[h.loss == "cb-bce" for h in heads],
        dtype=np.float64 if dtype == torch.float64 else np.float32,
        instruction_set=instruction_set,
    )
    at_once = max(1, PIECE_BYTES // (epochs.size * features.weight.shape[1] * fitted.dtype.itemsize)) * epochs.size
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        running: Iterator[None] = iter(())
        for epoch in range(len(epochs)):
            for piece in epochs.pieces(epoch, at_once=at_once):
                blocks = [_block(rows, x, features.labels, dtype) for rows, x in piece]
                deque(running, 0)
                running = fitted.advance(
                    pool,
                    threads,
                    blocks,
                    batch=epochs.size,
                    lr=schedule.lr_of(epoch),
                    momentum=schedule.momentum,
                    weight_decay=schedule.weight_decay,
                )
        deque(running, 0)
    yield list(range(len(heads))), fitted.weight, fitted.bias


def _block(
    rows: np.ndarray, features: Tensor, labels: np.ndarray, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features (n, D), 1/|x| (n,) and labels (n,) int32, contiguous."""
    features = features.to(dtype).contiguous()
    norm = torch.linalg.vector_norm(features, dim=1).clamp_min_(torch.finfo(dtype).tiny)
    return features.numpy(), norm.reciprocal_().numpy(), labels[rows].astype(np.int32)


class KernelHeads:
    """S × K heads with their momentum in the layout and precision of the kernel.

    Arguments:
        weight: (C, D) the start of all heads.
        bias: (C,).
        penalties: (K,).
        half_targets: (K, C) λ·NC/2.
        priors: (K, C) terms that are in the bias while the heads are fitted.
        class_weights: for each weighting (C,), and true where they are divided by their sum over the batch.
        weighting: (K,) index into class_weights.
        bce: (K,) true for binary cross-entropy, else softmax.
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
            rule, weights = penalties[k], weighting[k]
            arrays = (self._weight[s, k], self._velocity[s, k], self._bias[s, k], self._bias_velocity[s, k])
            addresses = [array.ctypes.data for array in (*arrays, self._half[k], self._class[weights], self._prior[k])]
            summed = rule.kl_weight == "batch"
            kl_weight = 1.0 if rule.kl_weight == "batch" else float(rule.kl_weight)
            self._heads[s, k] = (
                *addresses,
                kl_weight,
                kl_weight != 0,
                summed,
                bce[k],
                class_weights[weights][1],
                *rule.codes,
                rule.moving_target,
            )

    @property
    def weight(self) -> NDArray:
        """(S, K, C, D)"""
        return self._weight[..., : self.classes].swapaxes(2, 3)

    @property
    def bias(self) -> NDArray:
        """(S, K, C), without the prior."""
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
        """Run one block of batches for every seed and head in the pool; it is done when the iterator is exhausted.

        Arguments:
            blocks: for every seed features (n, D), 1/|x| (n,) of this precision and labels (n,) int32, contiguous.
        """
        assert _c_kernel is not None
        kernel, instruction_set, heads = _c_kernel, self._set, self._heads
        described = np.zeros(len(blocks), BLOCK)
        for s, (features, inverse, labels) in enumerate(blocks):
            addresses = (features.ctypes.data, inverse.ctypes.data, labels.ctypes.data)
            sizes = (len(features), batch, self.width, self.classes, self.padded)
            described[s] = (*addresses, *sizes, lr, momentum, weight_decay)
        members = self._members(threads, batch)
        parts = [list(range(k, heads.size, threads // members)) for k in range(threads // members)]
        scratch = _c_kernel.scratch_size(batch, self.padded, members)
        teams = [(np.empty(scratch, self.dtype), np.zeros(2, np.int32), part) for part in parts]

        def run(task: tuple[tuple[NDArray, NDArray, list[int]], int]) -> None:
            (scratch, meeting, numbers), rank = task
            assert blocks  # alive until here: the kernel has only their addresses
            for number in numbers:
                s, k = divmod(number, heads.shape[1])
                addresses = (scratch.ctypes.data, meeting.ctypes.data)
                block = described.ctypes.data + s * BLOCK.itemsize
                kernel.advance(instruction_set, heads[s].ctypes.data, k, k + 1, block, *addresses, rank, members)

        return pool.map(run, itertools.product(teams, range(members)))

    def _members(self, threads: int, batch: int) -> int:
        """Return how many threads share a head: one where there are enough heads or a step is over before they meet."""
        worth_sharing = 4 * batch * self.padded * self.width >= SHARED
        return max(1, threads // self._heads.size) if worth_sharing else 1

    def _zeros(self, *shape: int) -> NDArray:
        """Zeros (*shape, P)."""
        return np.zeros((*shape, self.padded), self.dtype)
