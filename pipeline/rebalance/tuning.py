"""The trials of each method when methods compete: every trained method may try the same number of settings.

A trained method is searched one hyperparameter after the other: first a ladder of learning rates, then every value of each
`axis` (views, weight decay, the method's own grid, λ and the weight of the norm term) at the best setting so far, then learning
rates around the best. Methods without training try their whole grid, since a trial costs one evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError
from pipeline.method_names import MEMBERS
from pipeline.rebalance.candidates import ENGINE, is_trained, method_names, parse_lam, penalty_of, references
from pipeline.rebalance.methods import RIVALS, Free, Trained
from pipeline.rebalance.methods.iwb_la import RATE, TRIALS
from pipeline.results.head_id import BASELINE, HeadId, Value

LAMS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of `--lam auto`
WEIGHT_DECAYS = (0.003, 0.03)  # beside the configuration's
KL_WEIGHTS = (4.0, 16.0)  # beside the formulation's
UNTUNED = {"weight_decay": 0.0, "kl_weight": 1.0}  # values of trials that do not name them
RUNGS = 5  # most learning rates of the ladder
RATES = 3  # most learning rates around the best


@dataclass(frozen=True)
class Axis:
    """The values that a trained method tries in one place of its setting, at the best of everything else.

    Arguments:
        names: of the hyperparameters; `λ` is the field of `HeadId`.
        points: values of these names; a point that lacks a name leaves the method's default in its place.
    """

    names: tuple[str, ...]
    points: tuple[dict[str, Value], ...]

    def at(self, head: HeadId, point: dict[str, Value]) -> HeadId:
        """Return a head with the values of a point in place of its own."""
        values = {name: value for name, value in head.values if name not in self.names}
        values |= {name: value for name, value in point.items() if name != "λ"}
        lam = point.get("λ", head.lam)
        assert lam is None or isinstance(lam, float)
        return replace(head, lam=lam, values=tuple(values.items()))

    def point_of(self, head: HeadId) -> dict[str, Value]:
        """Return the values of a head on this axis."""
        lam = {} if head.lam is None else {"λ": head.lam}
        return {name: value for name, value in (dict(head.values) | lam).items() if name in self.names}


def is_comparison(config: RebalanceConfig) -> bool:
    """Return true where each method is tuned: where `tune` is set, and wherever a method competes that is always tuned."""
    return config.tune or any(method not in ("baseline", "ce", "cb", "iwb") for method in method_names(config.method))


def tuned_methods(config: RebalanceConfig) -> list[str]:
    """Return the methods that are tuned, in this order: the reference rows, members of the ensemble, those asked for."""
    asked = method_names(config.method)
    reference = [head.method for head in references(config) if head.method not in ("baseline", "iwb")]
    members = MEMBERS if "ensemble" in asked else ()
    return [method for method in dict.fromkeys([*reference, *members, *asked]) if method != "ensemble"]


def next_trials(
    method: str, config: RebalanceConfig, trials: Sequence[HeadId] = (), best: HeadId | None = None
) -> list[HeadId]:
    """Return the next trials of one method, none once it is tuned.

    Arguments:
        trials: those before.
        best: the best of them.
    """
    first = first_trial(method, config)
    if not is_trained(first):
        return [] if trials else [replace(first, values=tuple(p.items())) for p in grid_of(method)]
    if best is None:
        ladder = learning_rates(centre_of(method, config), min(RUNGS, -(-config.trials // 2)))
        return [replace(first, lr=lr) for lr in ladder]
    left = config.trials - len(trials)
    for axis in axes_of(method, config):
        tried = [axis.point_of(trial) for trial in trials]
        if new := [axis.at(best, point) for point in axis.points if point not in tried]:
            return new[:left]
    around = sum(trial.lr not in {t.lr for t in trials[:RUNGS]} for trial in trials)
    return [replace(best, lr=lr) for lr in rates_around(best, trials, min(left, RATES - around))]


def first_trial(method: str, config: RebalanceConfig) -> HeadId:
    """Return a method at the setting of the literature, without a learning rate."""
    if method == "baseline":
        return BASELINE
    if method in ("ce", "cb"):
        return HeadId(method, method)
    if method == "iwb":
        lams = lams_of(config)
        return HeadId(method, config.loss, lams[len(lams) // 2])
    if method == "iwb-la":
        lam, share = TRIALS[0]
        return HeadId(method, "la", lam, values=(("means", share),))
    return HeadId(method, values=tuple(grid_of(method)[0].items()))


def grid_of(method: str) -> tuple[dict[str, Value], ...]:
    """Return the points of a method's own grid; the literature's first."""
    return RIVALS[method].grid if method in RIVALS else ({},)


def axes_of(method: str, config: RebalanceConfig) -> list[Axis]:
    """Return what a trained method tries beside learning rates, in this order.

    Views and weight decay are tried where the configuration leaves them open and the method does not fix them.
    """
    axes, rule = [], RIVALS.get(method)
    if config.views == "augmented" and "views" not in config.model_fields_set and method != "iwb-la":
        axes.append(Axis(("views",), ({"views": "clean"},)))
    if method == "iwb":
        axes.append(Axis(("λ",), tuple({"λ": lam} for lam in lams_of(config))))
    own = {name for point in grid_of(method) for name in point}
    decides = isinstance(rule, Trained) and rule.weight_decay is not None
    if "weight_decay" not in config.model_fields_set and "weight_decay" not in own and not decides:
        axes.append(Axis(("weight_decay",), tuple({"weight_decay": value} for value in WEIGHT_DECAYS)))
    if own:
        axes.append(Axis(tuple(sorted(own)), grid_of(method)))
    if method == "iwb-la":
        axes.append(Axis(("λ", "means"), tuple({"λ": lam, "means": share} for lam, share in TRIALS)))
    if method == "iwb" and config.kl_weight is None and penalty_of(config).kl_weight == UNTUNED["kl_weight"]:
        axes.append(Axis(("kl_weight",), tuple({"kl_weight": weight} for weight in KL_WEIGHTS)))
    return axes


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
    """Return the λ that a tuned iwb tries: those of the configuration, evenly thinned to two fifths of the trials."""
    lams = parse_lam(config.lam) or LAMS
    most = max(1, min(len(lams), round(config.trials * 0.4)))
    return tuple(lams[(2 * i + 1) * len(lams) // (2 * most)] for i in range(most))


def edges(head: HeadId, trials: Sequence[HeadId]) -> list[str]:
    """Return the values of a head at the border of the trials: `lr 0.32 (0.00016 … 0.32)`, of three values or more."""
    texts = []
    for name, value in numbers(head).items():
        comparable = [numbers(t) for t in trials if t.loss == head.loss and _kind(t) == _kind(head)]
        named = [t.get(name, UNTUNED.get(name)) for t in comparable]
        values = sorted({number for number in named if number is not None})
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
    return tuple(item for item in setting.values if isinstance(item[1], str) and item[0] != "views")
