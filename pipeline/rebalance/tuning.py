"""The trials of each method when methods compete: every trained method has the same number of them.

A trial is a learning rate with one point of the method's grid; λ is in the grid of iwb. Methods without training try their
whole grid, since a trial costs one evaluation and there is no learning rate to tune.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError
from pipeline.rebalance.candidates import ENGINE, is_trained, method_names, parse_lam
from pipeline.rebalance.methods import RIVALS, Free, Trained
from pipeline.rebalance.methods.iwb_la import RATE, TRIALS
from pipeline.results.head_id import BASELINE, HeadId

LAMS = (0.05, 0.15, 0.5)  # of `--lam auto`


def is_comparison(config: RebalanceConfig) -> bool:
    """Return true where each method is tuned: where `tune` is set, and wherever a method competes that is always tuned."""
    return config.tune or any(method in RIVALS or method == "iwb-la" for method in method_names(config.method))


def next_trials(
    method: str, config: RebalanceConfig, trials: Sequence[HeadId] = (), best: HeadId | None = None
) -> list[HeadId]:
    """Return the next trials of one method, none once it is tuned.

    Half of the trials are a ladder of learning rates with the first point of the grid, which is the literature's; then
    every other point has one trial at the best rate, and the remaining trials are rates around the best, beyond the ladder
    where it lies at an end. A method without training tries its whole grid at once.

    Arguments:
        trials: those before.
        best: the best of them.
    """
    if best is None:
        ladder = learning_rates(centre_of(method, config), -(-config.trials // 2))
        first, *rest = settings_of(method, config)
        return [replace(first, lr=lr) for lr in ladder] if is_trained(first) else [first, *rest]
    left = config.trials - len(trials)
    if not is_trained(best) or left <= 0:
        return []
    points = {replace(trial, lr=None) for trial in trials}
    if rest := [replace(s, lr=best.lr) for s in settings_of(method, config) if s not in points]:
        return rest[:left]
    return [replace(best, lr=lr) for lr in rates_around(best, trials, left)]


def settings_of(method: str, config: RebalanceConfig) -> list[HeadId]:
    """Return a method at every point of its grid, λ included, without a learning rate; the literature's point first."""
    if method == "baseline":
        return [BASELINE]
    if method in ("ce", "cb"):
        return [HeadId(method, method)]
    if method == "iwb":
        lams = lams_of(config)
        middle = lams[len(lams) // 2]
        return [HeadId(method, config.loss, lam) for lam in sorted(lams, key=lambda lam: lam != middle)]
    if method == "iwb-la":
        return [HeadId(method, "la", lam, values=(("means", share),)) for lam, share in TRIALS]
    return [HeadId(method, values=tuple(values.items())) for values in RIVALS[method].grid]


def centre_of(method: str, config: RebalanceConfig) -> float:
    """Return the literature's learning rate, scaled in proportion to the batch; the configuration's where there is none."""
    rule = RIVALS.get(method)
    if method == "iwb-la":
        return config.lr * RATE
    if not isinstance(rule, Trained) or rule.lr is None:
        return config.lr
    return rule.lr * config.batch_size / rule.batch


def learning_rates(centre: float, how_many: int) -> tuple[float, ...]:
    """Return a ladder around `centre`, ascending, a factor of 4 apart, less where it has more than six rungs."""
    factor = _factor(how_many)
    return tuple(_rounded(centre * factor**i) for i in range(-(how_many // 2), how_many - how_many // 2))


def rates_around(best: HeadId, trials: Sequence[HeadId], how_many: int) -> list[float]:
    """Return new learning rates near the best: one factor beyond it where it lies at an end, else ever finer."""
    assert best.lr is not None
    rates, factor = {s.lr for s in trials if s.lr is not None}, _factor(-(-(len(trials) + how_many) // 2))
    beyond = (best.lr == max(rates)) - (best.lr == min(rates))
    parts = [n / 2**level for level in range(1, 12) for n in range(1, 2**level, 2)]
    steps = [step for part in parts for step in (part, -part)]
    if beyond:
        steps[:0] = [beyond, beyond / 2, 2 * beyond]
    nearby = dict.fromkeys(_rounded(best.lr * factor**step) for step in steps)
    return [lr for lr in nearby if lr not in rates][:how_many]


def _factor(how_many: int) -> float:
    return 4.0 if how_many < 7 else 1024 ** (1 / (how_many - 1))


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def lams_of(config: RebalanceConfig) -> tuple[float, ...]:
    """Return about √trials of the configured λ, evenly spread, because λ and learning rate share the trials."""
    lams = parse_lam(config.lam) or LAMS
    most = max(1, min(len(lams), math.isqrt(config.trials)))
    return tuple(lams[(2 * i + 1) * len(lams) // (2 * most)] for i in range(most))


def edges(head: HeadId, trials: Sequence[HeadId]) -> list[str]:
    """Return the values of a head at the border of the trials: `lr 0.32 (0.00016 … 0.32)`, of three values or more."""
    texts = []
    for name, value in numbers(head).items():
        values = sorted({numbers(t)[name] for t in trials if t.loss == head.loss and _kind(t) == _kind(head)})
        if len(values) > 2 and value in (values[0], values[-1]):
            texts.append(f"{name} {value:g} ({values[0]:g} … {values[-1]:g})")
    return texts


def numbers(setting: HeadId) -> dict[str, float]:
    """Return λ, lr and the hyperparameters that are numbers."""
    values = {"λ": setting.lam, "lr": setting.lr} | dict(setting.values)
    return {name: value for name, value in values.items() if isinstance(value, float)}


def refuse_double_balancing(config: RebalanceConfig) -> None:
    """Raise ConfigError where two of the loss's prior, its class weights and the sampling compensate for class sizes."""
    if config.sampling is None and config.weighting is None:
        return
    for method in method_names(config.method):
        rule = RIVALS.get(method)
        if method in ENGINE:
            raise ConfigError(
                f"rebalance.sampling and rebalance.weighting are for the other trained methods; {method} samples "
                "instances and its loss says how classes weigh: name methods with --method, without it"
            )
        if rule is None or isinstance(rule, Free) or config.force_double_balancing:
            continue
        remedies = ["a loss with the class prior in it"] if rule.prior_in_loss else []
        if config.weighting == "class-balanced" or (config.weighting is None and rule.weights_classes):
            remedies.append("class weights")
        if (config.sampling or rule.sampling) == "class-balanced":
            remedies.append("class-balanced sampling")
        if len(remedies) > 1:
            raise ConfigError(
                f"{method}: {' and '.join(remedies)} together make up for the class sizes twice; leave one away, or insist "
                "with --force-double-balancing"
            )


def _kind(setting: HeadId) -> tuple:
    """Return the hyperparameters that are no numbers; grids of different kinds have separate borders."""
    return tuple(item for item in setting.values if isinstance(item[1], str))
