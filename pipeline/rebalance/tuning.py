"""The settings that are tried for each method when methods compete: everything trained gets the same number of them.

A trial is a learning rate with one of the method's own values; λ is an own value of iwb. Methods without training try as many
values as they like, since a trial costs them one evaluation and they have no learning rate to get wrong.
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
    """Whether each method is tuned: where that is asked for, and wherever a rival competes."""
    return config.tune or any(method in RIVALS or method == "iwb-la" for method in method_names(config.method))


def next_trials(
    method: str, config: RebalanceConfig, tried: Sequence[HeadId] = (), best: HeadId | None = None
) -> list[HeadId]:
    """The settings to try next for one method, after those tried, of which `best` is the best; none once it is tuned.

    Half of the trials go to a ladder of learning rates with the first of the method's own values, which are the
    literature's; then the other values get one at the best rate each, and what is left goes to rates around the best, beyond
    the ladder where it lies at an end. A method without training gets all its values at once.
    """
    if best is None:
        ladder = learning_rates(centre_of(method, config), -(-config.trials // 2))
        first, *others = settings_of(method, config)
        return [replace(first, lr=lr) for lr in ladder] if is_trained(first) else [first, *others]
    left = config.trials - len(tried)
    if not is_trained(best) or left <= 0:
        return []
    known = {replace(s, lr=None) for s in tried}
    if others := [replace(s, lr=best.lr) for s in settings_of(method, config) if s not in known]:
        return others[:left]
    return [replace(best, lr=lr) for lr in rates_around(best, tried, left)]


def settings_of(method: str, config: RebalanceConfig) -> list[HeadId]:
    """A method with each of its own values, λ among them, and no learning rate yet; the literature's come first."""
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
    """The literature's learning rate, scaled in proportion to the batch; the configuration's where it names none."""
    rule = RIVALS.get(method)
    if method == "iwb-la":
        return config.lr * RATE
    if not isinstance(rule, Trained) or rule.lr is None:
        return config.lr
    return rule.lr * config.batch_size / rule.batch


def learning_rates(centre: float, how_many: int) -> tuple[float, ...]:
    """A ladder around `centre`, ascending, a factor of 4 apart, less where there are more than six; an odd one out lies
    below.
    """
    factor = _factor(how_many)
    return tuple(_rounded(centre * factor**i) for i in range(-(how_many // 2), how_many - how_many // 2))


def rates_around(best: HeadId, tried: Sequence[HeadId], how_many: int) -> list[float]:
    """New learning rates near the best: one factor beyond it where it is the last of all tried, else ever finer."""
    assert best.lr is not None
    rates, factor = {s.lr for s in tried if s.lr is not None}, _factor(-(-(len(tried) + how_many) // 2))
    beyond = (best.lr == max(rates)) - (best.lr == min(rates))
    parts = [n / 2**level for level in range(1, 12) for n in range(1, 2**level, 2)]
    steps = [step for part in parts for step in (part, -part)]
    if beyond:
        steps[:0] = [beyond, beyond / 2, 2 * beyond]
    found = dict.fromkeys(_rounded(best.lr * factor**step) for step in steps)
    return [lr for lr in found if lr not in rates][:how_many]


def _factor(how_many: int) -> float:
    return 4.0 if how_many < 7 else 1024 ** (1 / (how_many - 1))


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def lams_of(config: RebalanceConfig) -> tuple[float, ...]:
    """About √trials of the λ asked for, from the middle of as many equal parts of them: λ and learning rate share the
    trials.
    """
    asked = parse_lam(config.lam) or LAMS
    most = max(1, min(len(asked), math.isqrt(config.trials)))
    return tuple(asked[(2 * i + 1) * len(asked) // (2 * most)] for i in range(most))


def edges(chosen: HeadId, tried: Sequence[HeadId]) -> list[str]:
    """What lies at the border of its grid: `lr 0.32 (0.00016 … 0.32)`. A grid of fewer than three values has none."""
    found = []
    for name, value in numbers(chosen).items():
        values = sorted({numbers(t)[name] for t in tried if t.loss == chosen.loss and _kind(t) == _kind(chosen)})
        if len(values) > 2 and value in (values[0], values[-1]):
            found.append(f"{name} {value:g} ({values[0]:g} … {values[-1]:g})")
    return found


def numbers(setting: HeadId) -> dict[str, float]:
    """λ, lr and own values that are numbers."""
    told = {"λ": setting.lam, "lr": setting.lr} | dict(setting.values)
    return {name: value for name, value in told.items() if isinstance(value, float)}


def refuse_double_balancing(config: RebalanceConfig) -> None:
    """ConfigError where class sizes would be made up for twice: by two of the loss's prior, its class weights and the
    sampling.
    """
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


def _kind(setting: HeadId) -> tuple:
    """Own values that are no numbers; grids of different kinds have borders of their own."""
    return tuple(item for item in setting.values if isinstance(item[1], str))
