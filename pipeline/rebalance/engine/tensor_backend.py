"""All heads of a job by tensor operations: on a GPU, over several ranks, and where the C kernel was not built."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.distributed import Ranks
from pipeline.rebalance.engine.batches import Batch, Batches, Weighting
from pipeline.rebalance.engine.epochs import Epochs
from pipeline.rebalance.engine.head import Form, Head, class_weights
from pipeline.rebalance.engine.stack import Stack
from pipeline.rebalance.engine.step import Steps

CPU_STACK_LOGITS = 100_000  # the logits, residuals, heads and momentum of a stack then stay in the cache of its core
SHARED_PRODUCT = 10**8  # operations from which cores gain by sharing one product; below it each has its own stack
RESIDENT = 0.25  # of the free memory of a device: what views may take that are kept there


def fit_with_tensors(
    epochs: Epochs,
    heads: Sequence[Head],
    *,
    threads: int,
    dtype: torch.dtype,
    device: torch.device,
    free_bytes: int,
    ranks: Ranks | None = None,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield (head numbers, weights (S, k, C, D), biases (S, k, C)) of every stack, after one pass over the data.

    Arguments:
        ranks: processes that share every batch; each calls this with the same arguments and gets the same heads.
    """
    features, schedule, seeds = epochs.features, epochs.schedule, len(epochs.seeds)
    counts = torch.as_tensor(features.counts, dtype=torch.float64)
    kinds = sorted({h.weighting for h in heads})
    weightings = [Weighting(class_weights(counts, *kind).to(device, dtype), kind[0] != "cb-bce") for kind in kinds]
    start = torch.as_tensor(np.column_stack([features.weight, features.bias]), dtype=dtype, device=device)
    logits = seeds * epochs.size * len(start)  # of one head
    stacks = []
    for members in stacked(heads, max(1, CPU_STACK_LOGITS // logits) if device.type == "cpu" else len(heads), threads):
        group = [heads[i] for i in members]
        stack = Stack(
            next((h.form for h in group if h.penalised), group[0].form),
            start.expand(seeds, len(group), *start.shape).contiguous(),
            torch.stack([h.half_target(counts) for h in group]).to(device, dtype),
            torch.tensor([h.kl_weight for h in group], dtype=dtype, device=device),
            torch.stack([h.prior(counts) for h in group]).to(device, dtype),
            _runs([kinds.index(h.weighting) for h in group]),
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            ranks=ranks,
            fused=fuses(device, dtype, ranks),
        )
        stacks.append((members, stack))
    unit = any(stack.penalised and stack.form.moving_target for _, stack in stacks)
    workers = 1 if ranks else min(threads, len(stacks))  # ranks have to meet in the same order
    worth_sharing = 2 * logits * start.shape[1] >= SHARED_PRODUCT
    torch.set_num_threads(threads // workers if worth_sharing else 1)
    batches = Batches(
        seeds, len(epochs.train_rows), epochs.size, start.shape[1] - 1, weightings, unit=unit, ranks=ranks
    )
    advance = Recorded() if device.type == "cuda" and not ranks else _advance
    place = Residence(device, int(RESIDENT * free_bytes))
    steps = [Steps(stack) for _, stack in stacks]
    with ThreadPoolExecutor(workers) as pool:
        run = pool.map if workers > 1 else map
        for epoch in range(len(epochs)):
            for _, stack in stacks:
                stack.minus_lr.fill_(-schedule.lr_of(epoch))
            for view, labels, order in epochs.views(epoch, place=place):
                for block in batches.epoch(view, labels, order):
                    list(run(advance, steps, itertools.repeat(block)))
                    epochs.tick(sum(batch.size for batch in block) * seeds / len(epochs.train_rows))
    for members, stack in stacks:
        yield members, stack.vectors.cpu().numpy(), (stack.weight[..., -1] - stack.prior).cpu().numpy()


def fuses(device: torch.device, dtype: torch.dtype, ranks: Ranks | None) -> bool:
    """Return true where steps end with the Triton kernel: in float32, on a GPU that runs it, without other ranks."""
    return device.type == "cuda" and dtype == torch.float32 and not ranks and why_no_kernel(device) is None


@functools.cache
def why_no_kernel(device: torch.device) -> str | None:
    """Return why the Triton kernel does not run on a device, None where it does.

    Triton comes with torch for GPUs on most systems, and needs a C compiler and Python's headers to start a kernel.
    """
    try:
        from pipeline.rebalance.engine.triton_kernel import update

        weight, ones = torch.ones(1, 2, device=device), torch.ones(1, device=device)
        update(weight, weight.clone(), ones, ones.clone(), ones[0], weight_decay=0.0)
    except Exception as error:  # single operations do the same
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


@torch.no_grad()  # which is a setting of each thread
def _advance(steps: Steps, block: Sequence[Batch]) -> None:
    for batch in block:
        steps(batch)


class Residence:
    """Views on the device of the heads: all of them stay there if they fit the budget of bytes, else one, else none."""

    def __init__(self, device: torch.device, budget: int):
        self.device, self.budget, self._resident = device, budget, dict[int, torch.Tensor]()

    def __call__(self, view: torch.Tensor, number: int | None) -> torch.Tensor:
        """Return the view where batches are gathered from it; a part of a view (number None) does not stay."""
        if view.device == self.device or view.nbytes > self.budget:
            return view
        if number is None:
            return view.to(self.device)
        if number not in self._resident:
            if sum(resident.nbytes for resident in self._resident.values()) + view.nbytes > self.budget:
                self._resident.clear()
            self._resident[number] = view.to(self.device)
        return self._resident[number]


class Recorded:
    """Steps as CUDA graphs: one launch for all steps of a block, because launches take longer than small heads.

    The buffers of a block and of a stack are the same in every epoch. At first the steps run as they are, which also
    makes the buffers; the second time they are recorded, and from then on replayed.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def __call__(self, steps: Steps, block: Sequence[Batch]) -> None:
        key = id(steps), block[0].x.data_ptr()
        if key not in self._graphs:
            self._graphs[key] = None
            _advance(steps, block)
            return
        graph = self._graphs[key]
        if graph is None:
            self._graphs[key] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                _advance(steps, block)
        graph.replay()


def stacked(heads: Sequence[Head], most: int, threads: int) -> list[list[int]]:
    """Return the head numbers of every stack: one form, at most `most` heads, heads of one weighting side by side.

    A head without penalty joins any form of its kind of loss. Every thread gets the same number of stacks of a form.
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
    """Return runs of equal numbers as (first, last + 1, number)."""
    ends = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(numbers)))
    return [(a, b, numbers[a]) for a, b in itertools.pairwise([0, *ends])]
