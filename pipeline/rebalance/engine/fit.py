"""Fits many heads on cached features in one pass over the data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from pipeline.distributed import Ranks
from pipeline.errors import PipelineError
from pipeline.rebalance.engine.c_backend import fit_with_c_kernel, instruction_sets
from pipeline.rebalance.engine.epochs import Epochs
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.head import NO_PENALTY, Head, Schedule
from pipeline.rebalance.engine.tensor_backend import fit_with_tensors
from pipeline.resources import free_memory

__all__ = ["NO_PENALTY", "Head", "Schedule", "fit_heads", "plan"]


def fit_heads(
    features: Features,
    heads: Sequence[Head],
    *,
    seeds: Sequence[int],
    schedule: Schedule,
    rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_bytes: int | None = None,
    ranks: Ranks | None = None,
    kernel: str | None = next(iter(instruction_sets()), None),
    tick: Callable[[float], object] = lambda epochs: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit K heads in each of S batch orders, all started from the stage-1 head.

    Heads that are fitted together, on any number of ranks, differ from those fitted alone by the rounding of dtype only.

    Arguments:
        rows: training rows to fit on, None for all; the counts stay those of all.
        memory_bytes: most bytes of heads and buffers; above it the heads are fitted in several passes over the data.
        ranks: processes that share every batch; each calls this with the same arguments and gets the same heads.
        kernel: instruction set of the C kernel to use on a CPU, None for tensor operations.
        tick: called while heads are fitted with the epochs done since the last call, those of all heads added up.
    Returns: weights (S, K, C, D) and biases (S, K, C).
    Raises: PipelineError: the heads do not fit into memory. ValueError: kernel `double` with float32.
    """
    device = torch.device(device)
    if ranks and ranks.world == 1:
        ranks = None
    c_kernel = device.type == "cpu" and not ranks and kernel
    epochs = Epochs(features, schedule, seeds, rows)
    if epochs.streamed and not c_kernel and len(seeds) > 1:  # a stack's seeds would need batches of each at a time
        solo = partial(fit_heads, features, heads, schedule=schedule, rows=rows, device=device, dtype=dtype, tick=tick)
        fitted = [solo(seeds=[seed], memory_bytes=memory_bytes, ranks=ranks, kernel=kernel) for seed in seeds]
        return np.concatenate([w for w, _ in fitted]), np.concatenate([b for _, b in fitted])
    classes, width = features.weight.shape
    real = np.float64 if dtype == torch.float64 else np.float32
    row = np.dtype(real).itemsize * len(seeds) * classes
    per_head = row * (2 * (width + 1) + (0 if c_kernel else 5 * (epochs.size + 1)))
    free = memory_bytes or free_memory(device) // 2
    passes = plan(len(heads), per_head, free)
    weight, bias = _results(len(seeds), len(heads), classes, width, real)
    order = sorted(range(len(heads)), key=lambda i: (heads[i].form.cb, heads[i].penalised, str(heads[i].form)))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    fit = (
        partial(fit_with_c_kernel, instruction_set=c_kernel)
        if c_kernel
        else partial(fit_with_tensors, device=device, free_bytes=2 * free, ranks=ranks)
    )
    with _arithmetic(device):
        for first, last in passes:
            group = order[first:last]
            epochs.tick = partial(_tick, tick, len(group))
            for members, w, b in fit(epochs, [heads[i] for i in group], threads=threads, dtype=dtype):
                at = [group[i] for i in members]
                weight[:, at] = w
                bias[:, at] = b
    return weight, bias


def _tick(tick: Callable[[float], object], heads: int, epochs: float) -> None:
    tick(heads * epochs)


def plan(heads: int, cost: int, budget: int) -> list[tuple[int, int]]:
    """Return runs of heads (first, last + 1): as few as fit the budget of bytes, equally long, each of one head at least.

    Arguments:
        cost: bytes of one head.
    """
    runs = -(-heads // max(1, budget // cost))
    return [(heads * i // runs, heads * (i + 1) // runs) for i in range(runs)]


def _results(seeds: int, heads: int, classes: int, width: int, real: type) -> tuple[np.ndarray, np.ndarray]:
    """Return arrays (S, K, C, D) and (S, K, C) for the heads; raise PipelineError where they do not fit into memory."""
    needed = seeds * heads * classes * (width + 1) * np.dtype(real).itemsize
    free = free_memory()
    if needed > free:
        raise PipelineError(
            f"{heads:,} heads in {seeds} batch orders take {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free: "
            f"ask for {max(1, int(heads * free / needed / 2)):,} at a time"
        )
    return np.empty((seeds, heads, classes, width), real), np.empty((seeds, heads, classes), real)


@contextmanager
def _arithmetic(device: torch.device) -> Iterator[None]:
    """No autograd; TF32 products on CUDA: features cached as float16 have the 10 bits of mantissa that TF32 keeps."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
