"""Fits many heads on cached features in one pass over the data."""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.rebalance import native
from pipeline.rebalance.batches import Batch, Batches, Weighting, batch_order
from pipeline.rebalance.features import Features
from pipeline.rebalance.formulation import Penalty
from pipeline.rebalance.native import instruction_sets
from pipeline.rebalance.stack import Form, Stack
from pipeline.rebalance.target import class_balanced_weights, number_coefficient

CPU_STACK_LOGITS = 100_000  # the logits, residuals, heads and momentum of a stack then stay in the cache of its core
SHARED_PRODUCT = (
    10**8
)  # operations from which cores gain by sharing one matrix product; below it each has its own stack
KERNEL_BLOCK_BYTES = 4 << 20  # features that the kernel takes at a time, one set of them while the next is gathered
ALONE = Penalty(kl_weight=0.0)


@dataclass(frozen=True)
class Head:
    """One head to fit: its classification loss, λ and penalty. ALONE is the loss without a penalty."""

    loss: Literal["ce", "cb-softmax", "cb-bce"]
    lam: float = 0.0
    penalty: Penalty = ALONE
    beta: float = 0.9999

    @property
    def penalised(self) -> bool:
        return self.penalty.kl_weight != 0

    @property
    def form(self) -> Form:
        """What decides with which other heads this one can advance; the rest is a number of each head's own."""
        mode: float | Literal["batch"] = "batch" if self.penalty.kl_weight == "batch" else 1.0
        rule = replace(self.penalty, kl_weight=mode, log_base="2", number=True)
        return Form("bce" if self.loss == "cb-bce" else "softmax", rule)

    @property
    def weighting(self) -> tuple[str, float]:
        """Heads that agree in this give every sample the same loss weight."""
        return (self.loss, 0.0 if self.loss == "ce" else self.beta)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: SGD with momentum, the learning rate on a cosine to 0, one value an epoch."""

    epochs: int = 10
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    augmented: bool = True

    def lr_of(self, epoch: int) -> float:
        return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


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
    kernel: str | None = next(iter(instruction_sets()), None),
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (S, K, C, D) and biases (S, K, C) of K heads in each of S batch orders, all started from the stage-1
    head.

    rows: the training rows to fit on, None for all; the counts stay those of all. memory_bytes: what heads and
    buffers may take; where they take more, the heads are fitted in several passes over the data. What is fitted
    together does not change a head beyond the rounding of dtype. kernel: the instruction set of `native` to use on a
    CPU, None for the tensor engine.
    """
    device = torch.device(device)
    n = len(features.labels) if rows is None else len(rows)
    classes, width = features.weight.shape
    real = np.float64 if dtype == torch.float64 else np.float32
    by_kernel = device.type == "cpu" and kernel
    row = np.dtype(real).itemsize * len(seeds) * classes
    per_head = row * (2 * (width + 1) + (0 if by_kernel else 5 * (min(schedule.batch_size, n) + 1)))
    passes = plan(len(heads), per_head, memory_bytes or _free_bytes(device) // 2)
    order = sorted(range(len(heads)), key=lambda i: (heads[i].form.cb, heads[i].penalised, str(heads[i].form)))
    weight = np.empty((len(seeds), len(heads), classes, width), real)
    bias = np.empty(weight.shape[:3], real)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    fit_pass = partial(_fit_native, instruction_set=by_kernel) if by_kernel else partial(_fit_stacks, device=device)
    with _arithmetic(device):
        for first, last in passes:
            chosen = order[first:last]
            fitted = fit_pass(features, [heads[i] for i in chosen], seeds, schedule, rows, threads=threads, dtype=dtype)
            for members, of_stack, bias_of_stack in fitted:
                at = [chosen[i] for i in members]
                weight[:, at] = of_stack
                bias[:, at] = bias_of_stack
    return weight, bias


def plan(heads: int, cost: int, budget: int) -> list[tuple[int, int]]:
    """Runs of heads (first, last + 1): as few as fit the budget, as even as can be, each of one head at least."""
    runs = -(-heads // max(1, budget // cost))
    return [(heads * i // runs, heads * (i + 1) // runs) for i in range(runs)]


def _fit_native(
    features: Features,
    heads: Sequence[Head],
    seeds: Sequence[int],
    schedule: Schedule,
    rows: np.ndarray | None,
    *,
    threads: int,
    dtype: torch.dtype,
    instruction_set: str,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields (head numbers, weights (S, K, C, D), biases (S, K, C)) of all heads after one pass over the data."""
    counts = torch.as_tensor(features.counts, dtype=torch.float64)
    kinds = sorted({h.weighting for h in heads})
    fitted = native.Heads(
        features.weight,
        features.bias,
        seeds=len(seeds),
        penalties=[h.penalty for h in heads],
        half_targets=torch.stack([_half_target(counts, h) for h in heads]).numpy(),
        class_weights=[(_class_weights(counts, *kind).numpy(), kind[0] != "cb-bce") for kind in kinds],
        weighting=[kinds.index(h.weighting) for h in heads],
        bce=[h.loss == "cb-bce" for h in heads],
        dtype=np.float64 if dtype == torch.float64 else np.float32,
        instruction_set=instruction_set,
    )
    taken = np.arange(len(features.labels)) if rows is None else rows
    size = min(schedule.batch_size, len(taken))
    at_once = max(1, KERNEL_BLOCK_BYTES // (size * features.weight.shape[1] * fitted.dtype.itemsize)) * size
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        running: Iterator[None] = iter(())
        for epoch in range(schedule.epochs):
            view = torch.as_tensor(features.views[features.view_of_epoch(epoch, augmented=schedule.augmented)])
            orders = [torch.as_tensor(taken[batch_order(len(taken), seed=s, epoch=epoch)]) for s in seeds]
            advance = partial(
                fitted.advance,
                pool,
                threads,
                batch=size,
                lr=schedule.lr_of(epoch),
                momentum=schedule.momentum,
                weight_decay=schedule.weight_decay,
            )
            for first in range(0, len(taken), at_once):
                blocks = [_kernel_block(view, features.labels, o[first : first + at_once], dtype) for o in orders]
                deque(running, 0)  # the next block is gathered while this one runs
                running = advance(blocks)
        deque(running, 0)
    yield list(range(len(heads))), fitted.weight, fitted.bias


def _kernel_block(
    view: Tensor, labels: np.ndarray, order: Tensor, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, D), 1/|x| (n,) and labels (n,) int32 of some rows."""
    features = view.index_select(0, order).to(dtype)
    norm = torch.linalg.vector_norm(features, dim=1).clamp_min_(torch.finfo(dtype).tiny)
    return features.numpy(), norm.reciprocal_().numpy(), labels[order.numpy()].astype(np.int32)


def _fit_stacks(
    features: Features,
    heads: Sequence[Head],
    seeds: Sequence[int],
    schedule: Schedule,
    rows: np.ndarray | None,
    *,
    threads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields (head numbers, weights (S, k, C, D), biases (S, k, C)) of every stack after one pass over the data."""
    counts = torch.as_tensor(features.counts, dtype=torch.float64)
    kinds = sorted({h.weighting for h in heads})
    weightings = [Weighting(_class_weights(counts, *kind).to(device, dtype), kind[0] != "cb-bce") for kind in kinds]
    start = torch.as_tensor(np.column_stack([features.weight, features.bias]), dtype=dtype, device=device)
    labels = torch.as_tensor(features.labels, dtype=torch.int64)
    taken = np.arange(len(labels)) if rows is None else rows
    size = min(schedule.batch_size, len(taken))
    logits = len(seeds) * size * len(start)  # of one head
    stacks = []
    for members in stacked(heads, max(1, CPU_STACK_LOGITS // logits) if device.type == "cpu" else len(heads), threads):
        group = [heads[i] for i in members]
        stack = Stack(
            next((h.form for h in group if h.penalised), group[0].form),
            start.expand(len(seeds), len(group), *start.shape).contiguous(),
            torch.stack([_half_target(counts, h) for h in group]).to(device, dtype),
            torch.tensor([_kl_weight(h) for h in group], dtype=dtype, device=device),
            _runs([kinds.index(h.weighting) for h in group]),
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
        )
        stacks.append((members, stack))
    unit = any(stack.penalised and stack.form.moving_target for _, stack in stacks)
    workers = min(threads, len(stacks))
    worth_sharing = 2 * logits * start.shape[1] >= SHARED_PRODUCT
    torch.set_num_threads(threads // workers if worth_sharing else 1)
    batches = Batches(len(seeds), len(taken), size, start.shape[1] - 1, weightings, unit=unit)
    with ThreadPoolExecutor(workers) as pool:
        for epoch in range(schedule.epochs):
            advance = partial(_advance, lr=schedule.lr_of(epoch))
            view = torch.as_tensor(features.views[features.view_of_epoch(epoch, augmented=schedule.augmented)])
            order = torch.as_tensor(np.stack([taken[batch_order(len(taken), seed=s, epoch=epoch)] for s in seeds]))
            if view.nbytes < _free_bytes(device) // 4:
                view = view.to(device)
            for block in batches.epoch(view, labels.to(view.device), order):
                list(pool.map(advance, [stack for _, stack in stacks], itertools.repeat(block)))
    for members, stack in stacks:
        head = stack.weight.cpu().numpy()
        yield members, head[..., :-1], head[..., -1]


@torch.no_grad()  # which is a setting of each thread
def _advance(stack: Stack, block: Sequence[Batch], lr: float) -> None:
    for batch in block:
        stack.step(batch, lr)


def stacked(heads: Sequence[Head], most: int, threads: int) -> list[list[int]]:
    """Head numbers of every stack: one form each, at most `most` heads, heads of one weighting side by side.

    A head without penalty goes with any form of its kind of loss. Every thread gets the same number of stacks of a form.
    """
    forms: dict[Form, list[int]] = {}
    for i in sorted(range(len(heads)), key=lambda i: not heads[i].penalised):
        form = heads[i].form
        if not heads[i].penalised:
            form = next((f for f in forms if f.cb == form.cb), form)
        forms.setdefault(form, []).append(i)
    for members in forms.values():
        members.sort(key=lambda i: heads[i].weighting)
    stacks = []
    for members in forms.values():
        runs = min(len(members), -(-len(members) // (most * threads)) * threads)
        stacks += [members[len(members) * i // runs : len(members) * (i + 1) // runs] for i in range(runs)]
    return stacks


def _runs(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal numbers as (first, last + 1, number)."""
    ends = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(numbers)))
    return [(a, b, numbers[a]) for a, b in itertools.pairwise([0, *ends])]


def _class_weights(counts: Tensor, loss: str, beta: float) -> Tensor:
    return torch.ones_like(counts) if loss == "ce" else class_balanced_weights(counts, beta=beta)


def _half_target(counts: Tensor, head: Head) -> Tensor:
    rule = head.penalty
    nc = number_coefficient(counts, log_base=rule.log_base) if rule.number else torch.ones_like(counts)
    return head.lam * nc / 2


def _kl_weight(head: Head) -> float:
    return 1.0 if head.penalty.kl_weight == "batch" else float(head.penalty.kl_weight)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return 4 << 30


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
