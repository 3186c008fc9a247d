"""The batches of an epoch, in the layout that the stacks read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.distributed import Ranks
from pipeline.seeds import derive

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # laid out at a time; on a CPU read again while still in its cache


@dataclass(frozen=True)
class Batch:
    """One step of every batch order: B samples each, or the part of them that this rank has.

    Arguments:
        x: (S, B+1, D+1) features and a 1; the last row is the mean of the unit features and a 0.
        weighted: for each weighting x with every row times its loss weight, and the last row 0.
        labels: (S, B, 1).
        inverse_norm: (S, B, 1) 1/|x|.
        size: samples of the batch on all ranks.
        unit: (S, B, D+1) x/|x| with 0 in the last column; None where no head needs it.
    """

    x: Tensor
    weighted: Sequence[Tensor]
    labels: Tensor
    inverse_norm: Tensor
    size: int
    unit: Tensor | None = None


@dataclass(frozen=True)
class Weighting:
    """Loss weights by class (C,), divided by their sum over the batch or by its size B."""

    class_weight: Tensor
    by_sum: bool


def batch_order(rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order (rows,) in which an epoch sees the samples, a function of seed and epoch alone."""
    return np.random.default_rng(derive(seed, "batch-order", epoch)).permutation(rows)


class Batches:
    """Epochs block by block, in buffers that are made once, on the device and in the dtype of the weightings.

    Arguments:
        seeds: S.
        rows: samples of an epoch.
        size: B; the last batch may be shorter.
        width: D.
        unit: compute the unit features too.
        ranks: processes that share every batch.
    """

    def __init__(
        self,
        seeds: int,
        rows: int,
        size: int,
        width: int,
        weightings: Sequence[Weighting],
        *,
        unit: bool = False,
        ranks: Ranks | None = None,
    ):
        like = weightings[0].class_weight
        self.size = size
        batch_bytes = seeds * (size + 1) * (width + 1) * like.element_size() * (1 + len(weightings) + unit)
        self.at_once = max(1, min(rows // size, BLOCK_BYTES[like.device.type] // batch_bytes))
        self._make = lambda batches, rows: BatchBlock(batches, seeds, rows, width, weightings, unit=unit, ranks=ranks)
        self._blocks: dict[tuple[int, int], BatchBlock] = {}

    def epoch(self, features: Tensor, labels: Tensor, order: Tensor) -> Iterator[Sequence[Batch]]:
        """Yield blocks of batches, a short batch last; each block overwrites the one before.

        Arguments:
            features: (N, D).
            labels: (N,), on the same device.
            order: (S, n) rows of both.
        """
        full, last = divmod(order.shape[1], self.size)
        for first in range(0, full, self.at_once):
            batches = min(self.at_once, full - first)
            yield self._block(batches, self.size).fill(features, labels, order, first * self.size)
        if last:
            yield self._block(1, last).fill(features, labels, order, full * self.size)

    def _block(self, batches: int, size: int) -> "BatchBlock":
        if (batches, size) not in self._blocks:
            self._blocks[batches, size] = self._make(batches, size)
        return self._blocks[batches, size]


class BatchBlock:
    """n batches of one size in one set of buffers, and the views of them that a step reads."""

    def __init__(
        self,
        n: int,
        s: int,
        size: int,
        d: int,
        weightings: Sequence[Weighting],
        *,
        unit: bool,
        ranks: Ranks | None = None,
    ):
        like, self.ranks = weightings[0].class_weight, ranks or Ranks(0, 1, weightings[0].class_weight.device)
        self.size, self.first = size, size * self.ranks.rank // self.ranks.world
        b = size * (self.ranks.rank + 1) // self.ranks.world - self.first
        self.shape, self.weightings = (n, s, b, d), weightings
        self.x = like.new_zeros(n, s, b + 1, d + 1)
        self.x[:, :, :b, d] = 1
        self.labels = torch.empty(n, s, b, 1, dtype=torch.int64, device=like.device)
        self.norm, self.inverse = like.new_empty(n, s, b), like.new_empty(n, s, b)
        self.weighted = [torch.zeros_like(self.x) for _ in weightings]
        self.weight, self.mean = like.new_empty(n, s, b), like.new_empty(n, s, 1, d)
        self.all_weights, self.total = like.new_empty(n, s, size), like.new_empty(n, s, 1)
        self.unit = like.new_zeros(n, s, b, d + 1) if unit else None
        self.features, self.samples = self.x[:, :, :b, :d], self.x[:, :, :b]
        self.batches = [
            Batch(
                self.x[i],
                [w[i] for w in self.weighted],
                self.labels[i],
                self.inverse[i, ..., None],
                size,
                None if self.unit is None else self.unit[i],
            )
            for i in range(n)
        ]

    def fill(self, features: Tensor, labels: Tensor, order: Tensor, first: int) -> list[Batch]:
        """Return the batches that begin at position `first` of the order."""
        n, s, b, d = self.shape
        all_rows = order[:, first : first + n * self.size].reshape(s, n, self.size).transpose(0, 1)
        rows = all_rows[:, :, self.first : self.first + b].reshape(-1).to(features.device)
        self.features.copy_(features.index_select(0, rows).view(n, s, b, d))
        self.labels.copy_(labels.index_select(0, rows).view(n, s, b, 1))
        torch.linalg.vector_norm(self.features, dim=-1, out=self.norm)
        torch.reciprocal(self.norm.clamp_min_(torch.finfo(self.x.dtype).tiny), out=self.inverse)
        torch.div(self.inverse, self.size, out=self.weight)
        torch.matmul(self.weight[:, :, None], self.features, out=self.mean)
        self.ranks.add_up(self.mean)
        self.x[:, :, b:, :d] = self.mean
        all_labels = labels.index_select(0, all_rows.reshape(-1).to(labels.device)).to(self.x.device)
        for weighting, weighted in zip(self.weightings, self.weighted, strict=True):
            torch.index_select(weighting.class_weight, 0, self.labels.view(-1), out=self.weight.view(-1))
            if weighting.by_sum:
                torch.index_select(weighting.class_weight, 0, all_labels, out=self.all_weights.view(-1))
                self.weight.div_(torch.sum(self.all_weights, -1, keepdim=True, out=self.total))
            else:
                self.weight.div_(self.size)
            torch.mul(self.samples, self.weight[..., None], out=weighted[:, :, :b])
        if self.unit is not None:
            torch.mul(self.features, self.inverse[..., None], out=self.unit[..., :d])
        return self.batches
