"""Fits all trials of a method together: one autograd step for S batch orders × T trials."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.longtail import class_balanced_weights
from pipeline.rebalance.engine.batches import batch_order
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Schedule
from pipeline.rebalance.engine.streamed import StreamedView
from pipeline.rebalance.engine.tensor_backend import SHARED_PRODUCT
from pipeline.rebalance.methods.api import Free, Given, Params, Sampling, Trained, unweighted
from pipeline.resources import free_memory
from pipeline.results.heads import Linear, Scorer, scorer_of
from pipeline.seeds import derive

BLOCK = 1 << 14  # rows


@dataclass(frozen=True)
class Trial:
    """One learning rate with one set of a method's own values."""

    lr: float
    own: Mapping[str, Any]


def solve(
    rule: Free,
    owns: Sequence[Mapping[str, Any]],
    features: Features,
    *,
    rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> list[Linear]:
    """The heads of a method without training, in float64; rows: the training rows that count as seen, None for all."""
    taken = np.arange(len(features.labels)) if rows is None else rows
    given = given_of(features, torch.device(device), torch.float64)
    samples = partial(_blocks, features, taken, torch.device(device))
    return [Linear(*(t.float().cpu().numpy() for t in rule.solve(given, samples, own))) for own in owns]


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
) -> list[list[Scorer]]:
    """Heads [trial][seed]; the learning rate of the schedule is each trial's own, on a cosine to 0.

    sampling and weighting: in place of the method's own. rows: the training rows to fit on, None for all; the counts stay
    those of all. memory_bytes: what parameters and buffers may take; where all
    trials take more, they are fitted in several passes. PipelineError where one trial alone takes more.
    """
    taken = np.arange(len(features.labels)) if rows is None else rows
    device = torch.device(device)
    lengths = sum(float(x.norm(dim=1).sum()) for x, _ in _blocks(features, taken, device))
    given = replace(given_of(features, device, dtype), length=max(lengths / len(taken), torch.finfo(dtype).tiny))
    weight = {None: rule.class_weight, "none": unweighted, "class-balanced": _class_balanced}[weighting]
    rule = replace(rule, class_weight=weight, sampling=sampling or rule.sampling)
    schedule = replace(schedule, batch_size=min(schedule.batch_size, len(taken)))
    if rule.weight_decay is not None:
        schedule = replace(schedule, weight_decay=rule.weight_decay)
    budget = free_memory(device) // 2 if memory_bytes is None else memory_bytes
    heads: list[list[Scorer]] = [[] for _ in trials]
    for members, orders in passes(rule, trials, given, seeds, schedule.batch_size, budget):
        group = [trials[i] for i in members]
        work = 2 * len(group) * len(orders) * schedule.batch_size * given.weight.numel()
        with _cores(device, worth_sharing=work >= SHARED_PRODUCT):
            found = _fit_together(rule, group, given, features, orders, schedule, taken)
        for i, of_seeds in zip(members, found, strict=True):
            heads[i] += of_seeds
    return heads


@contextmanager
def _cores(device: torch.device, *, worth_sharing: bool) -> Iterator[None]:
    """One core where operations are too small to be shared: the others would be waited for at every one of them, which on
    a machine that has other work to do takes most of the time."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu" and not worth_sharing:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def given_of(features: Features, device: torch.device, dtype: torch.dtype) -> Given:
    """What a rule may know before training, all but the length of features."""
    arrays = (features.counts, features.weight, features.bias)
    counts, weight, bias = (torch.as_tensor(a, dtype=dtype, device=device) for a in arrays)
    return Given(counts, weight, bias)


def _blocks(features: Features, rows: np.ndarray, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(clean features (n, D) in float64, labels (n,)) of the rows, never all of them at once."""
    for block in np.split(rows, range(BLOCK, len(rows), BLOCK)):
        x = torch.as_tensor(features.views[0][block], device=device).double()
        yield x, torch.as_tensor(features.labels[block], dtype=torch.int64, device=device)


def passes(
    rule: Trained, trials: Sequence[Trial], given: Given, seeds: Sequence[int], batch: int, budget: int
) -> list[tuple[list[int], Sequence[int]]]:
    """(trial numbers, batch orders) that are fitted together: as many as fit the budget of bytes.

    Trials that differ in a value which is no number are never together.
    """
    cost = bytes_of_one(rule, given, batch)
    if cost > budget:
        raise PipelineError(
            f"{rule.name}: one trial takes {cost / 2**30:.2f} GiB and {budget / 2**30:.2f} are free; take a smaller "
            "--batch-size, or a device with more memory"
        )
    orders = [seeds] if cost * len(seeds) <= budget else [[seed] for seed in seeds]
    most = int(budget // (cost * len(orders[0])))
    kinds: dict[str, list[int]] = {}
    for i, trial in enumerate(trials):
        kinds.setdefault(repr({k: v for k, v in trial.own.items() if isinstance(v, str)}), []).append(i)
    chunks = [members[i : i + most] for members in kinds.values() for i in range(0, len(members), most)]
    return [(chunk, of) for of in orders for chunk in chunks]


def bytes_of_one(rule: Trained, given: Given, batch: int) -> int:
    """Memory of one trial in one batch order: parameters, gradient, momentum, the head, logits and what autograd keeps."""
    numbers = sum(p.numel() for p in rule.start(given, np.random.default_rng(0)).values())
    classes, width = given.weight.shape
    kept = 3 * numbers + 2 * classes * width + 6 * batch * classes + batch * width
    return kept * given.weight.element_size()


def class_balanced_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The order (N,) of an epoch in which every class that is there comes equally often (±1), its samples in turn: a
    function of labels, seed and epoch alone. [Kang et al., ICLR 2020]
    """
    random = np.random.default_rng(derive(seed, "class-balanced-order", epoch))
    present, sizes = np.unique(labels, return_counts=True)
    quota = np.full(len(present), len(labels) // len(present))
    quota[random.permutation(len(present))[: len(labels) % len(present)]] += 1
    mixed = random.permutation(len(labels))
    by_class = np.split(mixed[np.argsort(labels[mixed], kind="stable")], np.cumsum(sizes)[:-1])
    return random.permutation(np.concatenate([np.resize(mine, q) for mine, q in zip(by_class, quota, strict=True)]))


def _fit_together(
    rule: Trained,
    trials: Sequence[Trial],
    given: Given,
    features: Features,
    seeds: Sequence[int],
    schedule: Schedule,
    taken: np.ndarray,
) -> list[list[Scorer]]:
    like = given.weight
    own = _stacked([trial.own for trial in trials], like)
    lead = (len(seeds), len(trials))
    params = _start(rule, given, seeds, len(trials))
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    base = like.new_tensor([trial.lr for trial in trials])
    decay = own.get("weight_decay", like.new_full((1, 1), schedule.weight_decay)).flatten()
    labels = torch.as_tensor(features.labels, dtype=torch.int64)
    for epoch in range(schedule.epochs):
        lr = base * (1 + math.cos(math.pi * epoch / schedule.epochs)) / 2
        weights = rule.class_weight(given, own, epoch / schedule.epochs)
        view = _resident(features.views[features.view_of_epoch(epoch, augmented=schedule.augmented)], like)
        orders = np.stack([_order(rule, features.labels, taken, seed, epoch) for seed in seeds])
        for rows in torch.as_tensor(orders).split(schedule.batch_size, 1):
            x = view[rows.to(view.device)].to(like)[:, None]
            y = labels[rows].to(like.device)[:, None]
            each = rule.loss(params, x, y, given, own).expand(*lead, -1)
            if weights is None:
                loss = each.mean(-1)
            else:
                w = weights[:, y.squeeze(1)].transpose(0, 1)
                loss = (w * each).sum(-1) / w.sum(-1)
            gradients = torch.autograd.grad(loss.sum(), list(params.values()))  # trials share no parameter
            with torch.no_grad():
                for (name, p), gradient in zip(params.items(), gradients, strict=True):
                    of_trial = (-1,) + (1,) * (p.dim() - 2)
                    velocity[name].mul_(schedule.momentum).add_(gradient).add_(decay.view(of_trial) * p)
                    p.sub_(lr.view(of_trial) * velocity[name])
                if rule.project is not None:
                    rule.project(params, given, own)
    with torch.no_grad():
        head = [t.expand(*lead, *t.shape[2:]).float().cpu().numpy() for t in rule.head(params, given, own)]
    return [[scorer_of([a[s, t].copy() for a in head]) for s in range(lead[0])] for t in range(lead[1])]


def _start(rule: Trained, given: Given, seeds: Sequence[int], trials: int) -> Params:
    """Parameters (S, T, …), alike in all trials of a batch order."""
    each = [rule.start(given, np.random.default_rng(derive(seed, f"start of {rule.name}"))) for seed in seeds]
    return {
        name: torch.stack([start[name] for start in each])[:, None]
        .repeat(1, trials, *[1] * like.dim())
        .requires_grad_()
        for name, like in each[0].items()
    }


def _stacked(owns: Sequence[Mapping[str, Any]], like: Tensor) -> dict[str, Any]:
    """Numbers of the trials as (T, 1); anything else is the same in all of them."""
    return {
        key: value if isinstance(value, str) else like.new_tensor([float(own[key]) for own in owns])[:, None]
        for key, value in owns[0].items()
    }


def _order(rule: Trained, labels: np.ndarray, taken: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    if rule.sampling == "class-balanced":
        return taken[class_balanced_order(labels[taken], seed=seed, epoch=epoch)]
    return taken[batch_order(len(taken), seed=seed, epoch=epoch)]


def _resident(view: np.ndarray | StreamedView, like: Tensor) -> Tensor:
    """The features of an epoch, on the device where they fit it; a view that memory does not hold says so itself."""
    features = torch.as_tensor(view)
    return features.to(like.device) if features.nbytes < free_memory(like.device) // 4 else features


def _class_balanced(given: Given, own: Mapping[str, Any], progress: float) -> Tensor:
    return class_balanced_weights(given.counts)[None]
