"""`pipeline bench rebalance`: stage 2 beside the loop people write and beside the arithmetic it cannot do without."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from pipeline.bench.measure import Benchmark, Measure, interleaved, machine
from pipeline.data.subset import class_sizes
from pipeline.distributed import choose_device
from pipeline.longtail import class_balanced_weights
from pipeline.rebalance.engine.c_backend import instruction_sets
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.formulation import penalty
from pipeline.rebalance.engine.target import number_coefficient

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
        """Generated float16 features with class centres, and a stage-1 head of the size trained ones have."""
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
    """Ratios of the stage-2 engine on generated features; large: also at ImageNet-LT's and iNaturalist's class counts.

    loop_ratio: 32 λ at CIFAR100-LT size against 32 times `the_usual_loop`. per_head_ratio: what one more head costs
    there over two bare matrix products and two exponentials per logit. gemm_ratio: one λ at ImageNet-LT's size over the two
    bare products on the same batches. iwb_over_ce: what the penalty adds to plain cross-entropy. The cost is affine in
    heads, samples and epochs: the largest deviation from the fitted line is told.
    """
    started, where = time.perf_counter(), choose_device(device)
    threads = torch.get_num_threads()
    kernel = next(iter(instruction_sets()), None) if where.type == "cpu" else None
    measures = [*_sweep(where, repeat, say), *_affine(where, repeat, say)]
    if large:
        measures += [*_large(IMAGENET, where, repeat, say, target=1.15), *_large(INATURALIST, where, repeat, say)]
    settings = {"repeat": repeat, "device": str(where), "kernel": kernel or "tensor operations", "workers": 0}
    facts = machine(**({"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}))
    torch.set_num_threads(threads)
    return Benchmark("rebalance", facts, settings, tuple(measures), round(time.perf_counter() - started, 1))


def the_usual_loop(features: Features, lam: float, schedule: Schedule, device: torch.device) -> torch.nn.Linear:
    """One head as most repositories fit one: DataLoader, autograd and torch.optim, one λ at a time."""
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
    """loop_ratio, per_head_ratio and iwb_over_ce at CIFAR100-LT size."""
    say(f"{CIFAR.name}: {SWEEP} λ against the usual loop")
    features, schedule = CIFAR.features(), CIFAR.schedule
    fit = partial(_fit, features, schedule, device)
    heads = sorted({SWEEP, *(n * torch.get_num_threads() for n in HEADS)})
    ways = {
        "loop": _until_done(device, lambda: the_usual_loop(features, 0.15, schedule, device)),
        "ce": lambda: fit([Head("ce")] * SWEEP),
        "products": _until_done(device, _bare(CIFAR, device, heads=SWEEP)),
        "products and exponentials": _until_done(device, _bare(CIFAR, device, heads=SWEEP, exponentials=2)),
    } | {f"{k} heads": partial(fit, _lams(k)) for k in heads}
    seconds = interleaved(ways, repeat=repeat)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    together = medians[f"{SWEEP} heads"]
    figures = {f"{way}, s": round(t, 4) for way, t in medians.items()} | {"all s": _rounded(seconds)}
    yield Measure(
        "loop_ratio",
        round(SWEEP * medians["loop"] / together, 1),
        "×",
        target=60,
        figures=figures,
        why="other work on this machine takes cores from the threads"
        if device.type == "cuda" or instruction_sets()
        else "without the kernel (no C compiler at installation) each step goes through memory many times",
    )
    slope, deviation = affine([(k, medians[f"{k} heads"]) for k in heads])
    floor = medians["products and exponentials"] / SWEEP
    yield Measure(
        "per_head_ratio",
        round(slope / floor, 2),
        "×",
        target=2,
        at_most=True,
        figures={"one more head, s": round(slope, 5), "its products and exponentials, s": round(floor, 5)},
    )
    yield Measure(f"iwb_over_ce, {CIFAR.name}", round(together / medians["ce"], 3), "×", target=1.6, at_most=True)
    yield Measure(f"gemm_ratio, {CIFAR.name}, {SWEEP} heads", round(together / medians["products"], 2), "×")
    yield Measure("affine in heads: largest deviation", round(100 * deviation, 1), "%")


def _affine(device: torch.device, repeat: int, say: Callable[[str], object]) -> Iterator[Measure]:
    """How far the cost is from a straight line in samples and in epochs."""
    say("the cost over samples and epochs")
    sizes = [replace(CIFAR, largest=CIFAR.largest * n, views=1) for n in (1, 2, 4)]
    heads = _lams(8)
    ways = {n.rows: partial(_fit, n.features(), replace(CIFAR.schedule, augmented=False), device, heads) for n in sizes}
    yield _line("samples", ways, repeat)
    features = CIFAR.features()
    epochs = {e: partial(_fit, features, replace(CIFAR.schedule, epochs=e), device, heads) for e in (5, 10, 20, 40)}
    yield _line("epochs", epochs, repeat)


def _line(name: str, ways: Mapping[int, Callable[[], object]], repeat: int) -> Measure:
    seconds = interleaved({str(n): way for n, way in ways.items()}, repeat=repeat)
    points = [(n, statistics.median(seconds[str(n)])) for n in ways]
    slope, deviation = affine(points)
    figures = {f"{n}, s": round(t, 4) for n, t in points} | {"slope, s": slope}
    return Measure(f"affine in {name}: largest deviation", round(100 * deviation, 1), "%", figures=figures)


def _large(
    size: Size, device: torch.device, repeat: int, say: Callable[[str], object], *, target: float | None = None
) -> Iterator[Measure]:
    """gemm_ratio and iwb_over_ce of one head."""
    say(f"{size.name}: {size.width} × {size.classes}, batch {size.schedule.batch_size}")
    features = size.features()
    fit = partial(_fit, features, size.schedule, device)
    ways = {
        "iwb": lambda: fit(_lams(1)),
        "ce": lambda: fit([Head("ce")]),
        "products": _until_done(device, _bare(size, device, heads=1)),
    }
    seconds = interleaved(ways, repeat=repeat if target else 1)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    steps = -(-size.rows // size.schedule.batch_size) * size.schedule.epochs
    figures = {f"{way}, ms a step": round(1000 * t / steps, 3) for way, t in medians.items()} | {"steps": steps}
    yield Measure(
        f"gemm_ratio, {size.name}",
        round(medians["iwb"] / medians["products"], 3),
        "×",
        target=target,
        at_most=True,
        figures=figures | {"all s": _rounded(seconds)},
        why="softmax, momentum and update go through memory beside the two products",
    )
    ratio = round(medians["iwb"] / medians["ce"], 3)
    yield Measure(f"iwb_over_ce, {size.name}", ratio, "×", target=target, at_most=True)


def _bare(size: Size, device: torch.device, *, heads: int, exponentials: int = 0) -> Callable[[], None]:
    """The two matrix products of every step for so many heads, on batches that are there already, and exponentials."""
    schedule, classes = size.schedule, heads * size.classes
    steps = -(-size.rows // schedule.batch_size) * schedule.epochs
    x = torch.rand(schedule.batch_size, size.width, device=device)
    weight = torch.rand(classes, size.width, device=device)
    logits = torch.rand(schedule.batch_size, classes, device=device)
    gradient = torch.empty_like(weight)
    scratch = torch.empty_like(logits)

    def products() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # as the engine computes on a GPU; it changes nothing on a CPU
        for _ in range(steps):
            torch.mm(x, weight.T, out=logits)
            for _ in range(exponentials):
                torch.exp(logits, out=scratch)
            torch.mm(logits.T, x, out=gradient)
        torch.set_float32_matmul_precision(before)

    return products


def affine(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope, largest deviation as a share of the value) of the least-squares line through (x, seconds)."""
    x, y = np.array(points, np.float64).T
    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(np.abs((start + slope * x) / y - 1).max())


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


def _rounded(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {way: [round(t, 4) for t in times] for way, times in seconds.items()}
