"""All heads of a job through the kernel: every head goes alone over a piece of an epoch, then comes the next piece."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipeline.rebalance.engine.c_kernel import Heads
from pipeline.rebalance.engine.epochs import Epochs
from pipeline.rebalance.engine.head import Head, class_weights

PIECE_BYTES = 4 << 20  # features that all heads pass before the next ones come; those are gathered meanwhile


def fit_by_kernel(
    epochs: Epochs, heads: Sequence[Head], *, threads: int, dtype: torch.dtype, instruction_set: str
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields (head numbers, weights (S, K, C, D), biases (S, K, C)) of all heads, after one pass over the data."""
    features, schedule = epochs.features, epochs.schedule
    counts = torch.as_tensor(features.counts, dtype=torch.float64)
    kinds = sorted({h.weighting for h in heads})
    fitted = Heads(
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
                blocks = [_block(rows, found, features.labels, dtype) for rows, found in piece]
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
    """Features (n, D), 1/|x| (n,) and labels (n,) int32, contiguous."""
    features = features.to(dtype).contiguous()
    norm = torch.linalg.vector_norm(features, dim=1).clamp_min_(torch.finfo(dtype).tiny)
    return features.numpy(), norm.reciprocal_().numpy(), labels[rows].astype(np.int32)
