"""Fits many heads on cached features in one pass over the data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.distributed import Ranks
from pipeline.errors import PipelineError
from pipeline.rebalance.engine.c_backend import fit_by_kernel
from pipeline.rebalance.engine.c_kernel import instruction_sets
from pipeline.rebalance.engine.epochs import Epochs
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.head import ALONE, Head, Schedule
from pipeline.rebalance.engine.tensor_backend import fit_by_stacks

__all__ = ["ALONE", "Head", "Schedule", "fit_heads", "free_bytes", "plan"]


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
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (S, K, C, D) and biases (S, K, C) of K heads in each of S batch orders, all started from the stage-1
    head.

    rows: the training rows to fit on, None for all; the counts stay those of all. memory_bytes: what heads and
    buffers may take; where they take more, the heads are fitted in several passes over the data. ranks: who shares every
    batch, each calling with the same arguments; all get the same heads. What is fitted together, on however many ranks,
    does not change a head beyond the rounding of dtype. kernel: the instruction set of `native` to use on a CPU, None for
    tensor operations.
    Raises PipelineError where the results do not fit into memory, ValueError for kernel `double` with float32.
    """
    device = torch.device(device)
    if ranks and ranks.world == 1:
        ranks = None
    by_kernel = device.type == "cpu" and not ranks and kernel
    epochs = Epochs(features, schedule, seeds, rows)
    if epochs.streamed and not by_kernel and len(seeds) > 1:  # a stack's seeds would need batches of each at a time
        solo = partial(fit_heads, features, heads, schedule=schedule, rows=rows, device=device, dtype=dtype)
        each = [solo(seeds=[seed], memory_bytes=memory_bytes, ranks=ranks, kernel=kernel) for seed in seeds]
        return np.concatenate([w for w, _ in each]), np.concatenate([b for _, b in each])
    classes, width = features.weight.shape
    real = np.float64 if dtype == torch.float64 else np.float32
    row = np.dtype(real).itemsize * len(seeds) * classes
    per_head = row * (2 * (width + 1) + (0 if by_kernel else 5 * (epochs.size + 1)))
    free = memory_bytes or free_bytes(device) // 2
    passes = plan(len(heads), per_head, free)
    weight, bias = _results(len(seeds), len(heads), classes, width, real)
    order = sorted(range(len(heads)), key=lambda i: (heads[i].form.cb, heads[i].penalised, str(heads[i].form)))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    fit = (
        partial(fit_by_kernel, instruction_set=by_kernel)
        if by_kernel
        else partial(fit_by_stacks, device=device, free_bytes=2 * free, ranks=ranks)
    )
    with _arithmetic(device):
        for first, last in passes:
            chosen = order[first:last]
            for members, of_some, bias_of_some in fit(epochs, [heads[i] for i in chosen], threads=threads, dtype=dtype):
                at = [chosen[i] for i in members]
                weight[:, at] = of_some
                bias[:, at] = bias_of_some
    return weight, bias


def plan(heads: int, cost: int, budget: int) -> list[tuple[int, int]]:
    """Runs of heads (first, last + 1): as few as fit the budget, as even as can be, each of one head at least."""
    runs = -(-heads // max(1, budget // cost))
    return [(heads * i // runs, heads * (i + 1) // runs) for i in range(runs)]


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses yet."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return 4 << 30


def _results(seeds: int, heads: int, classes: int, width: int, real: type) -> tuple[np.ndarray, np.ndarray]:
    """Arrays (S, K, C, D) and (S, K, C) for the heads; PipelineError where they do not fit into memory."""
    needed = seeds * heads * classes * (width + 1) * np.dtype(real).itemsize
    free = free_bytes(torch.device("cpu"))
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
