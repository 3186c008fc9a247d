"""Fitting of all trials of a method together: one autograd step for S batch orders × T trials."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.longtail import class_balanced_weights
from pipeline.rebalance.engine.batches import batch_order
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Schedule
from pipeline.rebalance.engine.streamed import StreamedView, StreamedViews
from pipeline.rebalance.engine.tensor_backend import SHARED_PRODUCT
from pipeline.rebalance.methods.api import Free, Params, Sampling, Stage1, Trained, unweighted
from pipeline.resources import free_memory
from pipeline.results.heads import Linear, Scorer, scorer_of
from pipeline.seeds import derive

BLOCK = 1 << 14  # rows


@dataclass(frozen=True)
class Trial:
    """One learning rate with one point of a method's grid."""

    lr: float
    values: Mapping[str, Any]


def solve(
    rule: Free,
    grid: Sequence[Mapping[str, Any]],
    features: Features,
    *,
    rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    samples: "Blocks | None" = None,
) -> list[Linear]:
    """Return the heads of a method without training, solved in float64, one for each point of the grid.

    Arguments:
        rows: training rows to solve on, None for all.
        samples: the same rows where several methods are solved on them and share what they compute.
    """
    stage1 = stage1_of(features, torch.device(device), torch.float64)
    samples = samples or Blocks(features, rows, torch.device(device))
    if rows is not None:
        stage1 = replace(stage1, counts=torch.bincount(samples.labels, minlength=len(stage1.counts)).double())
    layers = rule.layers(stage1, samples, grid)
    return [Linear(*(t.float().contiguous().cpu().numpy() for t in layer)) for layer in layers]


def fit(
    rule: Trained,
    trials: Sequence[Trial],
    features: Features,
    *,
    seeds: Sequence[int],
    schedule: Schedule,
    sampling: Sampling | None = None,
    weighting: Literal["none", "class-balanced"] | None = None,
    rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_bytes: int | None = None,
    tick: Callable[[float], object] = lambda epochs: None,
) -> list[list[Scorer]]:
    """Return heads [trial][seed]; the learning rate of a trial falls on a cosine to 0.

    Arguments:
        sampling, weighting: in place of the method's.
        rows: training rows to fit on, None for all; the counts stay those of all.
        memory_bytes: most bytes of parameters and buffers; above it the trials are fitted in several passes.
        tick: called while heads are fitted with the epochs done since the last call, those of all heads added up.
    Raises: PipelineError: one trial alone takes more.
    """
    train_rows = np.arange(len(features.labels)) if rows is None else rows
    device = torch.device(device)
    lengths = sum(float(x.norm(dim=1).sum()) for x, _ in Blocks(features, train_rows, device)())
    stage1 = replace(stage1_of(features, device, dtype), length=max(lengths / len(train_rows), torch.finfo(dtype).tiny))
    weight = {None: rule.class_weight, "none": unweighted, "class-balanced": _class_balanced}[weighting]
    rule = replace(rule, class_weight=weight, sampling=sampling or rule.sampling)
    schedule = replace(schedule, batch_size=min(schedule.batch_size, len(train_rows)))
    if rule.weight_decay is not None:
        schedule = replace(schedule, weight_decay=rule.weight_decay)
    budget = free_memory(device) // 2 if memory_bytes is None else memory_bytes
    heads: list[list[Scorer]] = [[] for _ in trials]
    for members, orders in passes(rule, trials, stage1, seeds, schedule.batch_size, budget):
        group = [trials[i] for i in members]
        work = 2 * len(group) * len(orders) * schedule.batch_size * stage1.weight.numel()
        with _cores(device, worth_sharing=work >= SHARED_PRODUCT):
            views = group[0].values.get("views")
            planned = replace(schedule, augmented=views == "augmented") if views else schedule
            fitted = _fit_together(rule, group, stage1, features, orders, planned, train_rows, tick)
        for i, of_seeds in zip(members, fitted, strict=True):
            heads[i] += of_seeds
    return heads


@contextmanager
def _cores(device: torch.device, *, worth_sharing: bool) -> Iterator[None]:
    """Use one core where operations are too small to share: at each of them the other cores would be waited for, which on
    a busy machine takes most of the time."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu" and not worth_sharing:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def stage1_of(features: Features, device: torch.device, dtype: torch.dtype) -> Stage1:
    """Return the start of all methods, without the length of features."""
    arrays = (features.counts, features.weight, features.bias)
    counts, weight, bias = (torch.as_tensor(a, dtype=dtype, device=device) for a in arrays)
    return Stage1(counts, weight, bias)


class Blocks:
    """Calling it yields clean training features (n, D) in float64 with labels (n,), a block at a time.

    Arguments:
        rows: training rows (M,), None for all.
    Attributes:
        shared: what methods have computed from these samples, for the next of them.
        tick: called with the products over all samples that a solver has computed since the last call.
    """

    def __init__(self, features: Features, rows: np.ndarray | None, device: torch.device):
        self.features, self.device = features, device
        self.rows = np.arange(len(features.labels)) if rows is None else rows
        self.shared: dict[Any, Any] = {}
        self.tick: Callable[[float], object] = lambda products: None

    @property
    def labels(self) -> Tensor:
        """Return the labels (M,) of all rows."""
        return torch.as_tensor(self.features.labels[self.rows], dtype=torch.int64, device=self.device)

    @property
    def streamed(self) -> bool:
        """Return true where memory does not hold the features, so that no method may keep them all."""
        return isinstance(self.features.views, StreamedViews)

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for block in np.split(self.rows, range(BLOCK, len(self.rows), BLOCK)):
            x = torch.as_tensor(self.features.views[0][block], device=self.device).double()
            yield x, torch.as_tensor(self.features.labels[block], dtype=torch.int64, device=self.device)


def passes(
    rule: Trained, trials: Sequence[Trial], stage1: Stage1, seeds: Sequence[int], batch: int, budget: int
) -> list[tuple[list[int], Sequence[int]]]:
    """Return (trial numbers, batch orders) that are fitted together: as many as fit the budget of bytes.

    Trials that differ in a hyperparameter that is no number are never together.
    """
    cost = bytes_of_one(rule, stage1, batch)
    if cost > budget:
        raise PipelineError(
            f"{rule.name}: one trial takes {cost / 2**30:.2f} GiB and {budget / 2**30:.2f} are free; take a smaller "
            "--batch-size, or a device with more memory"
        )
    orders = [seeds] if cost * len(seeds) <= budget else [[seed] for seed in seeds]
    most = int(budget // (cost * len(orders[0])))
    kinds: dict[str, list[int]] = {}
    for i, trial in enumerate(trials):
        kinds.setdefault(repr({k: v for k, v in trial.values.items() if isinstance(v, str)}), []).append(i)
    chunks = [members[i : i + most] for members in kinds.values() for i in range(0, len(members), most)]
    return [(chunk, seeds) for seeds in orders for chunk in chunks]


def bytes_of_one(rule: Trained, stage1: Stage1, batch: int) -> int:
    """Return the memory of one trial in one batch order: parameters, gradient, momentum, head, logits, autograd's copies."""
    numbers = sum(p.numel() for p in rule.start(stage1, np.random.default_rng(0)).values())
    classes, width = stage1.weight.shape
    total = 3 * numbers + 2 * classes * width + 6 * batch * classes + batch * width
    return total * stage1.weight.element_size()


def class_balanced_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order (N,) of an epoch in which every class occurs equally often (±1), its samples in turn.

    It is a function of labels, seed and epoch alone.

    Source: Kang et al., ICLR 2020.
    """
    random = np.random.default_rng(derive(seed, "class-balanced-order", epoch))
    present, sizes = np.unique(labels, return_counts=True)
    quota = np.full(len(present), len(labels) // len(present))
    quota[random.permutation(len(present))[: len(labels) % len(present)]] += 1
    mixed = random.permutation(len(labels))
    by_class = np.split(mixed[np.argsort(labels[mixed], kind="stable")], np.cumsum(sizes)[:-1])
    return random.permutation(np.concatenate([np.resize(rows, q) for rows, q in zip(by_class, quota, strict=True)]))


def _fit_together(
    rule: Trained,
    trials: Sequence[Trial],
    stage1: Stage1,
    features: Features,
    seeds: Sequence[int],
    schedule: Schedule,
    train_rows: np.ndarray,
    tick: Callable[[float], object],
) -> list[list[Scorer]]:
    like = stage1.weight
    values = _stacked([trial.values for trial in trials], like)
    lead = (len(seeds), len(trials))
    params = _start(rule, stage1, seeds, len(trials))
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    base = like.new_tensor([trial.lr for trial in trials])
    decay = values.get("weight_decay", like.new_full((1, 1), schedule.weight_decay)).flatten()
    labels = torch.as_tensor(features.labels, dtype=torch.int64)
    for epoch in range(schedule.epochs):
        lr = base * (1 + math.cos(math.pi * epoch / schedule.epochs)) / 2
        weights = rule.class_weight(stage1, values, epoch / schedule.epochs)
        view = _resident(features.views[features.view_of_epoch(epoch, augmented=schedule.augmented)], like)
        orders = np.stack([_order(rule, features.labels, train_rows, seed, epoch) for seed in seeds])
        for rows in torch.as_tensor(orders).split(schedule.batch_size, 1):
            x = view[rows.to(view.device)].to(like)[:, None]
            y = labels[rows].to(like.device)[:, None]
            sample_loss = rule.loss(params, x, y, stage1, values).expand(*lead, -1)
            if weights is None:
                loss = sample_loss.mean(-1)
            else:
                w = weights[:, y.squeeze(1)].transpose(0, 1)
                loss = (w * sample_loss).sum(-1) / w.sum(-1)
            gradients = torch.autograd.grad(loss.sum(), list(params.values()))  # trials share no parameter
            with torch.no_grad():
                for (name, p), gradient in zip(params.items(), gradients, strict=True):
                    shape = (-1,) + (1,) * (p.dim() - 2)
                    velocity[name].mul_(schedule.momentum).add_(gradient).add_(decay.view(shape) * p)
                    p.sub_(lr.view(shape) * velocity[name])
                if rule.project is not None:
                    rule.project(params, stage1, values)
            tick(len(trials) * rows.numel() / len(train_rows))
    with torch.no_grad():
        head = [t.expand(*lead, *t.shape[2:]).float().cpu().numpy() for t in rule.head(params, stage1, values)]
    return [[scorer_of([a[s, t].copy() for a in head]) for s in range(lead[0])] for t in range(lead[1])]


def _start(rule: Trained, stage1: Stage1, seeds: Sequence[int], trials: int) -> Params:
    """Return parameters (S, T, …), the same in all trials of a batch order."""
    starts = [rule.start(stage1, np.random.default_rng(derive(seed, f"start of {rule.name}"))) for seed in seeds]
    return {
        name: torch.stack([start[name] for start in starts])[:, None]
        .repeat(1, trials, *[1] * like.dim())
        .requires_grad_()
        for name, like in starts[0].items()
    }


def _stacked(grid: Sequence[Mapping[str, Any]], like: Tensor) -> dict[str, Any]:
    """Return numbers of the trials as (T, 1); anything else is the same in all of them."""
    return {
        key: value if isinstance(value, str) else like.new_tensor([float(values[key]) for values in grid])[:, None]
        for key, value in grid[0].items()
    }


def _order(rule: Trained, labels: np.ndarray, train_rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    if rule.sampling == "class-balanced":
        return train_rows[class_balanced_order(labels[train_rows], seed=seed, epoch=epoch)]
    return train_rows[batch_order(len(train_rows), seed=seed, epoch=epoch)]


def _resident(view: np.ndarray | StreamedView, like: Tensor) -> Tensor:
    """Return the features of an epoch, on the device where they fit; a streamed view refuses to be copied."""
    features = torch.as_tensor(view)
    return features.to(like.device) if features.nbytes < free_memory(like.device) // 4 else features


def _class_balanced(stage1: Stage1, values: Mapping[str, Any], progress: float) -> Tensor:
    return class_balanced_weights(stage1.counts)[None]
