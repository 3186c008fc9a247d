"""The work of fitting, counted before it starts, and the time that it takes on this machine from one timed product."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config import RebalanceConfig
from pipeline.rebalance.candidates import ENGINE, is_trained
from pipeline.rebalance.halving import SHARES, class_sizes, rungs
from pipeline.rebalance.tuning import LAMS, tuned_methods
from pipeline.results.head_id import HeadId

AUTOGRAD = 4.0  # time of a method that autograd differentiates, in that of the engine
CONVEX_PASSES = 900  # products over all samples by which logistic regression solves its whole grid
LOGIT_SECONDS = 2e-9  # of the exponentials of one logit on a core, once in each head and epoch
FOLD_FITS = 5  # work of a fit on all samples and of one on the others of each of five folds, in that of the first
LONG = 600.0  # seconds from which the estimate names what takes less


@dataclass(frozen=True)
class Work:
    """The work of one method, at most.

    Arguments:
        heads: fitted by gradient.
        epochs: of one head over all training samples; a method that autograd differentiates counts AUTOGRAD times.
        passes: products over all samples beside them.
    """

    heads: int = 0
    epochs: float = 0.0
    passes: float = 0.0

    @property
    def products(self) -> float:
        """Products of all training features with class vectors; an epoch takes two."""
        return 2 * self.epochs + self.passes

    def seconds(self, product: float, logits: float) -> float:
        """Return the time it takes.

        Arguments:
            product: seconds of one product.
            logits: seconds of the exponentials of one head over all samples.
        """
        return self.products * product + (self.epochs + self.passes / 4) * logits


def product_seconds(rows: int, width: int, classes: int, device: torch.device) -> float:
    """Return the seconds of one product of all features (rows, width) with class vectors (width, classes).

    The fastest of five products of few rows is scaled up: other work on the machine makes them slower, nothing faster.
    """
    few = max(1, min(rows, (1 << 28) // (2 * width * classes)))
    x, w = torch.ones(few, width, device=device), torch.ones(width, classes, device=device)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        float((x @ w)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - started)
    return min(times[1:]) * rows / few


def comparison_work(config: RebalanceConfig, share: float = 1.0, counts: np.ndarray | None = None) -> dict[str, Work]:
    """Return the work of every method that is tuned, by name; all logistic regressions solve one grid together.

    Arguments:
        share: of the training rows on the first rung of successive halving; 1 for none.
        counts: (C,) training images, needed where there are rungs.
    """
    fractions = {1.0: 1.0}
    if counts is not None:
        fractions |= {s: float(class_sizes(counts, s).sum() / counts.sum()) for s in SHARES}
    ladder = rungs(config.trials, share)
    rows = sum(number * fractions[s] for number, s in ladder)  # of all trials, in those of the store
    work, convex, again = {}, CONVEX_PASSES * (FOLD_FITS if config.select_on == "kfold" else 1), len(config.seeds) - 1
    for method in tuned_methods(config):
        more = again + (len(LAMS) * len(config.seeds) if method == "iwb" and share == 1 else 0)  # the curve of λ
        fits = FOLD_FITS * is_trained(HeadId(method)) if config.select_on == "kfold" else is_trained(HeadId(method))
        passes, convex = (convex, 0) if method.startswith("logistic") else (0, convex)
        heads = fits * (sum(number for number, _ in ladder) + more)
        work[method] = Work(heads, fits * (rows + more) * head_epochs(method, config), passes * rows / config.trials)
    return work


def head_epochs(method: str, config: RebalanceConfig) -> float:
    """Return the epochs of one head, those of autograd AUTOGRAD times."""
    return config.epochs * (1.0 if method in ENGINE else AUTOGRAD)


def comparison_seconds(
    config: RebalanceConfig,
    *,
    rows: int,
    width: int,
    classes: int,
    device: torch.device,
    share: float = 1.0,
    counts: np.ndarray | None = None,
    product: float | None = None,
) -> tuple[int, float]:
    """Return how many heads tuning fits by gradient at most, and the seconds that it and the convex heads take.

    Arguments:
        rows, width, classes: training samples, features of a sample, classes.
        share, counts: as of `comparison_work`.
        product: seconds of one product, measured by default.
    """
    product, logits = product or product_seconds(rows, width, classes, device), rows * classes * LOGIT_SECONDS
    work = comparison_work(config, share, counts).values()
    return sum(part.heads for part in work), math.fsum(part.seconds(product, logits) for part in work)


def estimate_text(config: RebalanceConfig, **size: Any) -> str:
    """Return one line on what tuning fits and about how long it takes, and what would take less where that is long.

    Arguments:
        size: as of `comparison_seconds`.
    """
    heads, seconds = comparison_seconds(config, **size)
    methods = len(tuned_methods(config))
    text = f"tuning {methods} methods, at most {heads} heads by gradient: about {duration(seconds)} on a quiet machine like this"
    return text + "; fewer methods (--method), fewer trials (--trials) or a GPU take less" * (seconds > LONG)


def duration(seconds: float) -> str:
    """Return `90 s`, `12 min` or `3 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


class FitProgress:
    """The share of the work that is done, reported while heads are fitted.

    Arguments:
        work: of each part, by name, in the order in which they are fitted.
        move: called with the percentage done, 100 and a note on the part, the heads and their rate.
    """

    def __init__(self, work: dict[str, Work], move: Callable[[float, float, str], object]):
        self.move = move
        self.plan(work)
        self.before = self.within = self.heads = 0.0
        self.started = self.moved = time.monotonic()
        self.part = ""

    def plan(self, work: dict[str, Work]) -> None:
        """Count with this work instead."""
        self.work, self.total = work, max(sum(part.products for part in work.values()), 1.0)

    def begin(self, part: str) -> None:
        """Note that a part begins, so that those before it are done, however much work they were."""
        names = list(self.work)
        number = names.index(part) if part in names else len(names)
        self.before = sum(self.work[name].products for name in names[:number])
        self.within, self.part = 0.0, f"method {number + 1} of {len(names)}: {part}" if part in names else part
        self._report()

    def tick(self, heads: float = 0.0, epochs: float = 0.0, passes: float = 0.0) -> None:
        """Count work that was done: heads, epochs of heads as `head_epochs` counts them, and further products."""
        self.heads += heads
        self.within += 2 * epochs + passes
        if time.monotonic() - self.moved > 0.1:
            self._report()

    def _report(self) -> None:
        self.moved = time.monotonic()
        name = self.part.rpartition(" ")[2]
        most = self.work[name].products if name in self.work else 0.0
        done = (self.before + min(self.within, most)) / self.total
        rate = self.heads / max(self.moved - self.started, 1e-9)
        heads = f", {self.heads:,.0f} heads, {rate:.3g} heads/s" if self.heads >= 1 else ""
        self.move(math.floor(100 * done), 100, f"{self.part}{heads}")
