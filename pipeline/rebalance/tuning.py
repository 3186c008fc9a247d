"""The settings that are tried for each method when methods compete: everything trained gets the same number of them.

`trials` settings a method: its learning rates × its own values. λ counts as an own value of iwb. Methods without training
try as many values as they like, since a trial costs them one evaluation and they have no learning rate to get wrong.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError
from pipeline.rebalance.methods import BASELINE, Setting, asked_methods
from pipeline.rebalance.rivals import RIVALS, Free
from pipeline.rebalance.selection import parse_lam

LAMS = (0.05, 0.15, 0.5)  # of `--lam auto`


def is_comparison(config: RebalanceConfig) -> bool:
    """Whether each method is tuned: where that is asked for, and wherever a rival competes."""
    return config.tune or any(method in RIVALS for method in asked_methods(config.method))


def trials_of(method: str, config: RebalanceConfig) -> list[Setting]:
    """The settings tried for one method; the first has the literature's own values."""
    if method == "baseline":
        return [BASELINE]
    if method in ("ce", "cb"):
        return [Setting(method, method, None, lr) for lr in learning_rates(config.lr, config.trials)]
    if method == "iwb":
        lams = lams_of(config)
        rates = learning_rates(config.lr, config.trials // len(lams))
        return [Setting(method, config.loss, lam, lr) for lam in lams for lr in rates]
    rule = RIVALS[method]
    if isinstance(rule, Free):
        return [Setting(method, own=tuple(own.items())) for own in rule.own]
    values = rule.own[: config.trials]
    centre = config.lr if rule.lr is None else rule.lr * config.batch_size / rule.batch
    rates = learning_rates(centre, config.trials // len(values))
    return [Setting(method, None, None, lr, tuple(own.items())) for own in values for lr in rates]


def learning_rates(centre: float, how_many: int) -> tuple[float, ...]:
    """A ladder around `centre`, ascending: a factor of 2 apart from eight on, of 3 below; an odd one out lies below."""
    factor, first = (2 if how_many >= 8 else 3), -(how_many // 2)
    return tuple(float(f"{centre * factor**i:.3g}") for i in range(first, first + how_many))


def lams_of(config: RebalanceConfig) -> tuple[float, ...]:
    """About √trials of the λ asked for, evenly spread over them, so that as many learning rates are tried as λ."""
    asked = parse_lam(config.lam) or LAMS
    most = max(1, min(len(asked), math.isqrt(config.trials)))
    if most == 1:
        return (asked[len(asked) // 2],)
    return tuple(asked[round(i * (len(asked) - 1) / (most - 1))] for i in range(most))


def edges(chosen: Setting, tried: Sequence[Setting]) -> list[str]:
    """What lies at the border of its grid: `lr 0.32 (0.00016 … 0.32)`. A grid of fewer than three values has none."""
    found = []
    for name, value in numbers(chosen).items():
        values = sorted({numbers(t)[name] for t in tried if t.loss == chosen.loss and _kind(t) == _kind(chosen)})
        if len(values) > 2 and value in (values[0], values[-1]):
            found.append(f"{name} {value:g} ({values[0]:g} … {values[-1]:g})")
    return found


def numbers(setting: Setting) -> dict[str, float]:
    """λ, lr and own values that are numbers."""
    told = {"λ": setting.lam, "lr": setting.lr} | dict(setting.own)
    return {name: value for name, value in told.items() if isinstance(value, float)}


def parameters(setting: Setting) -> dict[str, Any]:
    """lr and own values, JSON-ready."""
    return ({} if setting.lr is None else {"lr": setting.lr}) | dict(setting.own)


def refuse_double_balancing(config: RebalanceConfig) -> None:
    """ConfigError where class sizes would be made up for twice: by two of the loss's prior, its class weights and the
    sampling.
    """
    if config.sampling is None and config.weighting is None:
        return
    for method in asked_methods(config.method):
        rule = RIVALS.get(method)
        if method in ("ce", "cb", "iwb"):
            raise ConfigError(
                f"rebalance.sampling and rebalance.weighting are for the other trained methods; {method} samples "
                "instances and its loss says how classes weigh: name methods with --method, without it"
            )
        if rule is None or isinstance(rule, Free) or config.force_double_balancing:
            continue
        ways = ["a loss with the class prior in it"] if rule.prior_in_loss else []
        if config.weighting == "class-balanced" or (config.weighting is None and rule.weights_classes):
            ways.append("class weights")
        if (config.sampling or rule.sampling) == "class-balanced":
            ways.append("class-balanced sampling")
        if len(ways) > 1:
            raise ConfigError(
                f"{method}: {' and '.join(ways)} together make up for the class sizes twice; leave one away, or insist "
                "with --force-double-balancing"
            )


def _kind(setting: Setting) -> tuple:
    """Own values that are no numbers; grids of different kinds have borders of their own."""
    return tuple(item for item in setting.own if isinstance(item[1], str))
