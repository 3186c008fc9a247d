"""`pipeline bench rebalance`: stage 2 over the usual training loop and over its bare matrix products."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from pipeline.bench.measure import Benchmark, Measure, interleaved, machine, medians
from pipeline.data.subset import class_sizes
from pipeline.distributed import choose_device
from pipeline.longtail import class_balanced_weights
from pipeline.rebalance.engine.c_backend import instruction_sets
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.objective import number_coefficient, penalty

SWEEP = 32
HEADS = (1, 2, 4, 8, 16)  # times the threads, so that all of them are busy
IWB = penalty("paper")


@dataclass(frozen=True)
class Size:
    """A job of stage 2: an exponential subset of C classes with `largest` to `largest` / 100 samples, features of width D."""

    name: str
    largest: int
    width: int
    classes: int
    schedule: Schedule
    views: int = 1

    @property
    def counts(self) -> np.ndarray:
        return class_sizes(classes=self.classes, largest=self.largest, imbalance=100, shape="exponential")

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    def features(self) -> Features:
        """Return generated float16 features with class centres, and a stage-1 head with norms as trained ones have."""
        rng = np.random.default_rng(0)
        labels = rng.permutation(np.repeat(np.arange(self.classes), self.counts))
        centres = rng.standard_normal((self.classes, self.width), np.float32)
        views = [
            np.abs(centres[labels] + rng.standard_normal((self.rows, self.width), np.float32)).astype(np.float16)
            for _ in range(self.views)
        ]
        weight = rng.standard_normal((self.classes, self.width), np.float32) / np.float32(self.width**0.5)
        return Features(views, labels, self.counts, weight, np.zeros(self.classes, np.float32))


CIFAR = Size("CIFAR100-LT", 500, 64, 100, Schedule(batch_size=64), views=11)
IMAGENET = Size("ImageNet-LT", 50, 2048, 1000, Schedule(batch_size=512, lr=0.01, augmented=False, epochs=1))
INATURALIST = Size("iNaturalist2018", 4, 2048, 8142, Schedule(batch_size=512, lr=2e-4, augmented=False, epochs=1))


def bench_rebalance(
    *, repeat: int = 5, device: str = "auto", large: bool = True, say: Callable[[str], object] = lambda text: None
) -> Benchmark:
    """Return ratios of the stage-2 engine on generated features.

    loop_ratio: 32 λ at CIFAR100-LT size against 32 times `the_usual_loop`. per_head_ratio: the cost of one more head
    there over two bare matrix products and two exponentials per logit. gemm_ratio: one λ at ImageNet-LT's size over the
    two bare products on the same batches. iwb_over_ce: the cost of the penalty beside plain cross-entropy.

    Arguments:
        large: also measure at ImageNet-LT's and iNaturalist's class counts.
    """
    started, target = time.perf_counter(), choose_device(device)
    threads = torch.get_num_threads()
    kernel = next(iter(instruction_sets()), None) if target.type == "cpu" else None
    measures = [*_sweep(target, repeat, say)]
    if large:
        measures += [*_large(IMAGENET, target, repeat, say, limit=1.15), *_large(INATURALIST, target, repeat, say)]
    settings = {"repeat": repeat, "device": str(target), "kernel": kernel or "tensor operations", "workers": 0}
    facts = machine(**({"gpu": torch.cuda.get_device_name(target)} if target.type == "cuda" else {}))
    torch.set_num_threads(threads)
    return Benchmark("rebalance", facts, settings, tuple(measures), round(time.perf_counter() - started, 1))


def the_usual_loop(features: Features, lam: float, schedule: Schedule, device: torch.device) -> torch.nn.Linear:
    """Fit one head as most repositories do: DataLoader, autograd and torch.optim, one λ at a time."""
    counts = torch.as_tensor(features.counts, dtype=torch.float32)
    weights = class_balanced_weights(counts).to(device)
    number = number_coefficient(counts).to(device)
    classes, width = features.weight.shape
    head = torch.nn.Linear(width, classes, device=device)
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(features.weight))
        head.bias.copy_(torch.as_tensor(features.bias))
    optimizer = torch.optim.SGD(head.parameters(), lr=schedule.lr, momentum=schedule.momentum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs)
    labels = torch.as_tensor(features.labels)
    for epoch in range(schedule.epochs):
        view = features.views[features.view_of_epoch(epoch, augmented=schedule.augmented)]
        dataset = TensorDataset(torch.as_tensor(view, dtype=torch.float32), labels)
        for x, y in DataLoader(dataset, batch_size=schedule.batch_size, shuffle=True):
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(head(x), y, weight=weights)
            cosine = F.normalize(x) @ F.normalize(head.weight).T
            target = (lam * number * (1 - cosine) / 2).detach()
            norms = head.weight.norm(dim=1).expand_as(target)
            loss = loss + F.kl_div(target.log_softmax(1), norms.softmax(1), reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return head


def _sweep(device: torch.device, repeat: int, say: Callable[[str], object]) -> Iterator[Measure]:
    """Yield loop_ratio, per_head_ratio and iwb_over_ce at CIFAR100-LT size."""
    say(f"{CIFAR.name}: {SWEEP} λ against the usual loop")
    features, schedule = CIFAR.features(), CIFAR.schedule
    fit = partial(_fit, features, schedule, device)
    heads = sorted({SWEEP, *(n * torch.get_num_threads() for n in HEADS)})
    functions = {
        "loop": _until_done(device, lambda: the_usual_loop(features, 0.15, schedule, device)),
        "ce": lambda: fit([Head("ce")] * SWEEP),
        "products": _until_done(device, _bare(CIFAR, device, heads=SWEEP)),
        "products and exponentials": _until_done(device, _bare(CIFAR, device, heads=SWEEP, exponentials=2)),
    } | {f"{k} heads": partial(fit, _lams(k)) for k in heads}
    times = interleaved(functions, repeat=repeat)
    seconds = medians(times)
    together = seconds[f"{SWEEP} heads"]
    figures = {f"{name}, s": round(s, 4) for name, s in seconds.items()} | {"all s": _rounded(times)}
    yield Measure(
        "loop_ratio",
        round(SWEEP * seconds["loop"] / together, 1),
        "×",
        target=60,
        figures=figures,
        why="other work on this machine takes cores from the threads"
        if device.type == "cuda" or instruction_sets()
        else "without the kernel (no C compiler at installation) each step goes through memory many times",
    )
    slope, _ = np.polyfit(heads, [seconds[f"{k} heads"] for k in heads], 1)
    floor = seconds["products and exponentials"] / SWEEP
    yield Measure(
        "per_head_ratio",
        round(slope / floor, 2),
        "×",
        target=2,
        at_most=True,
        figures={"one more head, s": round(slope, 5), "its products and exponentials, s": round(floor, 5)},
    )
    yield Measure(f"iwb_over_ce, {CIFAR.name}", round(together / seconds["ce"], 3), "×", target=1.6, at_most=True)
    yield Measure(f"gemm_ratio, {CIFAR.name}, {SWEEP} heads", round(together / seconds["products"], 2), "×")


def _large(
    size: Size, device: torch.device, repeat: int, say: Callable[[str], object], *, limit: float | None = None
) -> Iterator[Measure]:
    """Yield gemm_ratio and iwb_over_ce of one head."""
    say(f"{size.name}: {size.width} × {size.classes}, batch {size.schedule.batch_size}")
    features = size.features()
    fit = partial(_fit, features, size.schedule, device)
    functions = {
        "iwb": lambda: fit(_lams(1)),
        "ce": lambda: fit([Head("ce")]),
        "products": _until_done(device, _bare(size, device, heads=1)),
    }
    times = interleaved(functions, repeat=repeat if limit else 1)
    seconds = medians(times)
    steps = -(-size.rows // size.schedule.batch_size) * size.schedule.epochs
    figures = {f"{name}, ms a step": round(1000 * s / steps, 3) for name, s in seconds.items()} | {"steps": steps}
    yield Measure(
        f"gemm_ratio, {size.name}",
        round(seconds["iwb"] / seconds["products"], 3),
        "×",
        target=limit,
        at_most=True,
        figures=figures | {"all s": _rounded(times)},
        why="softmax, momentum and update go through memory beside the two products",
    )
    ratio = round(seconds["iwb"] / seconds["ce"], 3)
    yield Measure(f"iwb_over_ce, {size.name}", ratio, "×", target=limit, at_most=True)


def _bare(size: Size, device: torch.device, *, heads: int, exponentials: int = 0) -> Callable[[], None]:
    """Return a function that does the two matrix products of every step, and exponentials, on one batch in memory."""
    schedule, classes = size.schedule, heads * size.classes
    steps = -(-size.rows // schedule.batch_size) * schedule.epochs
    x = torch.rand(schedule.batch_size, size.width, device=device)
    weight = torch.rand(classes, size.width, device=device)
    logits = torch.rand(schedule.batch_size, classes, device=device)
    gradient = torch.empty_like(weight)
    scratch = torch.empty_like(logits)

    def products() -> None:
        previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # as the engine computes on a GPU; it changes nothing on a CPU
        for _ in range(steps):
            torch.mm(x, weight.T, out=logits)
            for _ in range(exponentials):
                torch.exp(logits, out=scratch)
            torch.mm(logits.T, x, out=gradient)
        torch.set_float32_matmul_precision(previous)

    return products


def _fit(features: Features, schedule: Schedule, device: torch.device, heads: Sequence[Head]) -> None:
    fit_heads(features, heads, seeds=(0,), schedule=schedule, device=device)


def _lams(heads: int) -> list[Head]:
    return [Head("cb-softmax", float(lam), IWB) for lam in np.linspace(0.01, 0.5, heads)]


def _until_done(device: torch.device, work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _rounded(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(s, 4) for s in seconds] for name, seconds in times.items()}
