"""The time that fitting takes on this machine, from one timed product and the number of products."""

import time

import torch

from pipeline.config import RebalanceConfig
from pipeline.rebalance.candidates import ENGINE, is_trained
from pipeline.rebalance.tuning import LAMS, tuned_methods
from pipeline.results.head_id import HeadId

AUTOGRAD = 4.0  # time of a method that autograd differentiates, in that of the engine
CONVEX_PASSES = 900  # products over all samples by which logistic regression solves its whole grid
LOGIT_SECONDS = 2e-9  # of the exponentials of one logit on a core, once in each head and epoch
LONG = 600.0  # seconds from which the estimate names what takes less


def product_seconds(rows: int, width: int, classes: int, device: torch.device) -> float:
    """Return the seconds of one product of all features (rows, width) with class vectors (width, classes).

    The median of three products of few rows is scaled up.
    """
    few = max(1, min(rows, (1 << 28) // (2 * width * classes)))
    x, w = torch.ones(few, width, device=device), torch.ones(width, classes, device=device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        float((x @ w)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[1] * rows / few


def comparison_seconds(
    config: RebalanceConfig, *, rows: int, width: int, classes: int, device: torch.device
) -> tuple[int, float]:
    """Return how many heads tuning fits by gradient at most, and the seconds that it and the convex heads take.

    Arguments:
        rows, width, classes: training samples, features of a sample, classes.
    """
    methods = tuned_methods(config)
    product, logits = product_seconds(rows, width, classes, device), rows * classes * LOGIT_SECONDS
    epoch, again = 2 * product + logits, len(config.seeds) - 1
    heads, seconds = 0, 0.0
    for method in methods:
        number = config.trials + again
        if method == "iwb":  # the curve of λ in every batch order
            number += len(LAMS) * len(config.seeds)
        if is_trained(HeadId(method)):
            heads += number
            seconds += number * config.epochs * epoch * (1.0 if method in ENGINE else AUTOGRAD)
    if any(method.startswith("logistic") for method in methods):
        seconds += CONVEX_PASSES * (product + logits / 4)
    return heads, seconds


def estimate_text(config: RebalanceConfig, *, rows: int, width: int, classes: int, device: torch.device) -> str:
    """Return one line on what tuning fits and about how long it takes, and what would take less where that is long."""
    heads, seconds = comparison_seconds(config, rows=rows, width=width, classes=classes, device=device)
    methods = len(tuned_methods(config))
    duration = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )
    text = f"tuning {methods} methods, at most {heads} heads by gradient: about {duration} on a quiet machine like this"
    return text + "; fewer methods (--method), fewer trials (--trials) or a GPU take less" * (seconds > LONG)
