"""The batches of an epoch, laid out as the stacks read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.seeds import derive

BLOCK_BYTES = 32 << 20  # batches are laid out this many bytes at a time


@dataclass(frozen=True)
class Batch:
    """One step of every batch order, B samples each.

    x (S, B+1, D+1): features and a 1; the last row is the mean of the unit features, and a 0. weighted: x with every
    row times its loss weight and the last row 0, once for every weighting. labels (S, B). inverse_norm (S, B): 1/|x|.
    unit (S, B, D+1): x/|x| with 0 in the last column, or None where no head asks for it.
    """

    x: Tensor
    weighted: Sequence[Tensor]
    labels: Tensor
    inverse_norm: Tensor
    unit: Tensor | None = None


@dataclass(frozen=True)
class Weighting:
    """Loss weight of a sample by its class, (C,); divided by their sum over the batch, or else by its size B."""

    of_class: Tensor
    by_sum: bool


def batch_order(rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order (rows,) in which an epoch sees the samples: a function of seed and epoch alone."""
    return np.random.default_rng(derive(seed, "batch-order", epoch)).permutation(rows)


def blocks(
    features: Tensor, labels: Tensor, order: Tensor, size: int, weightings: Sequence[Weighting], *, unit: bool
) -> Iterator[list[Batch]]:
    """The batches of an epoch, as many at a time as BLOCK_BYTES hold; the short last batch is kept and comes alone.

    features (N, D) of the epoch's view and labels (N,), on any device; order (S, n) rows of them in the order of each
    seed. The batches come on the device and in the dtype of the weightings.
    """
    like = weightings[0].of_class
    seeds, n = order.shape
    full = n // size
    copies = 1 + len(weightings) + unit
    batch_bytes = seeds * (size + 1) * (features.shape[1] + 1) * like.element_size() * copies
    at_once = max(1, BLOCK_BYTES // batch_bytes)
    cuts = [(i * size, min(i + at_once, full) * size, size) for i in range(0, full, at_once)]
    if n > full * size:
        cuts.append((full * size, n, n - full * size))
    for first, last, b in cuts:
        rows = order[:, first:last].reshape(seeds, -1, b).transpose(0, 1)
        x = features[rows].to(like.device, like.dtype)
        yield lay_out(x, labels[rows].to(like.device), weightings, unit=unit)


def lay_out(x: Tensor, y: Tensor, weightings: Sequence[Weighting], *, unit: bool) -> list[Batch]:
    """Batches of features x (n, S, B, D) and labels y (n, S, B)."""
    n, s, b, d = x.shape
    inverse = 1 / torch.linalg.vector_norm(x, dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
    rows = x.new_zeros(n, s, b + 1, d + 1)
    rows[..., :b, :d] = x
    rows[..., :b, d] = 1
    rows[..., b, :d] = torch.einsum("nsb,nsbd->nsd", inverse / b, x)
    weighted = []
    for weighting in weightings:
        v = weighting.of_class[y]
        v /= v.sum(-1, keepdim=True) if weighting.by_sum else b
        weighted.append(rows * torch.nn.functional.pad(v, (0, 1))[..., None])
    units = None
    if unit:
        units = rows[..., :b, :] * inverse[..., None]
        units[..., d] = 0
    return [
        Batch(rows[i], [w[i] for w in weighted], y[i], inverse[i], units[i] if units is not None else None)
        for i in range(n)
    ]
