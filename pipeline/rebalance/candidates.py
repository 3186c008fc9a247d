"""The heads that a configuration asks for: its λ, its methods, and what the engine fits for each of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import RebalanceConfig, nearest
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS, RECOMMENDED, RENAMED
from pipeline.rebalance.engine.fit import NO_PENALTY, Head, Schedule
from pipeline.rebalance.engine.objective import Penalty, penalty, preset_cb
from pipeline.rebalance.methods import RIVALS, Trained, methods_in
from pipeline.rebalance.methods.external import HEAD_FILES
from pipeline.rebalance.methods.iwb_la import iwb_la_head, iwb_la_schedule
from pipeline.rebalance.selection import AUTO
from pipeline.results.head_id import BASELINE, CB_ONLY, HeadId

LAM_FORMS = "expected λ in [0, 1]: 0.05, 0.01,0.05,0.1, 0.01:0.5:log:32, 0.1:0.5:lin:5 or auto"
ENGINE = ("ce", "cb", "iwb", "iwb-la")  # methods that the stacked engine fits
GROUPS_OF_METHODS: dict[str, Callable[[], Sequence[str]]] = {
    "recommended": lambda: RECOMMENDED,
    "all": lambda: tuple(METHODS),
}
LA_ONLY = HeadId("balanced-softmax", values=(("tau", 1.0),))  # the logit-adjusted loss without a norm term
REFERENCES = {"baseline": BASELINE, "cb": CB_ONLY}  # rows that the selected one is always compared with


def parse_lam(text: str) -> tuple[float, ...] | None:
    """Return the λ of a text, ascending and each once; None for `auto`.

    Arguments:
        text: 0.05 | 0.01,0.05,0.1 | FROM:TO:log:NUMBER | FROM:TO:lin:NUMBER | auto.
    Raises: ConfigError: it names the wrong value and the valid forms.
    """
    if text.strip() == "auto":
        return None
    lams = [lam for grid in _grids(text) for lam in grid.lams()]
    return tuple(sorted({float(f"{lam:.6g}") for lam in lams}))


def count_lam(text: str) -> int:
    """Return how many λ a text asks for, for `auto` at most, without making them; raise as parse_lam does."""
    return 2 * len(AUTO) if text.strip() == "auto" else sum(grid.steps for grid in _grids(text))


class Grid(NamedTuple):
    """`steps` λ from low to high."""

    low: float
    high: float
    steps: int
    logarithmic: bool = False

    def lams(self) -> list[float]:
        space = np.geomspace if self.logarithmic else np.linspace
        return space(self.low, self.high, self.steps).tolist()


def _grids(text: str) -> list[Grid]:
    numbers = [part if ":" in part else _number(part, text) for part in text.strip().split(",")]
    return [_grid(part) if isinstance(part, str) else Grid(part, part, 1) for part in numbers]


def _grid(part: str) -> Grid:
    fields = part.split(":")
    if len(fields) != 4 or fields[2] not in ("log", "lin") or not fields[3].strip().isdigit() or int(fields[3]) < 2:
        raise ConfigError(f"--lam {part}: {LAM_FORMS}")
    low, high, steps = _number(fields[0], part), _number(fields[1], part), int(fields[3])
    if low >= high or (fields[2] == "log" and low == 0):
        raise ConfigError(f"--lam {part}: FROM must be less than TO, and more than 0 on a log grid; {LAM_FORMS}")
    return Grid(low, high, steps, fields[2] == "log")


def _number(part: str, text: str) -> float:
    try:
        lam = float(part)
    except ValueError:
        lam = math.nan
    if not 0 <= lam <= 1:  # also false for nan
        raise ConfigError(f"--lam {text!r}: {part.strip() or 'nothing'} is no λ; {LAM_FORMS}")
    return lam


def is_trained(head: HeadId) -> bool:
    """Return true where a head depends on a batch order."""
    return head.method in ENGINE or isinstance(RIVALS.get(head.method), Trained)


def method_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the methods that a configuration names, each once.

    `recommended` stands for the methods of RECOMMENDED, `all` for every one, FILE.py for those it defines, a
    file of a head for the method that `add_external_heads` makes of it.

    Raises: ConfigError: unknown name, or none.
    """
    methods: list[str] = []
    for name in names:
        if name in GROUPS_OF_METHODS:
            methods += GROUPS_OF_METHODS[name]()
        elif name.endswith(".py"):
            methods += methods_in(Path(name))
        elif name.endswith(HEAD_FILES):
            methods.append(Path(name).stem)
        elif (method := RENAMED.get(name, name)) in METHODS:
            methods.append(method)
        else:
            valid = (*METHODS, *GROUPS_OF_METHODS)
            raise ConfigError(f"--method {name}: unknown; known: {', '.join(valid)}, FILE.py{nearest(name, valid)}")
    if not methods:
        raise ConfigError(f"no method; known: {', '.join((*METHODS, *GROUPS_OF_METHODS))}")
    return tuple(dict.fromkeys(methods))


def candidates(config: RebalanceConfig, lams: Sequence[float] | None = None) -> list[HeadId]:
    """Return the heads one of which is selected: those of the methods asked for.

    Arguments:
        lams: λ of iwb, by default those of the configuration, for `auto` the coarse grid.
    """
    if lams is None:
        lams = parse_lam(config.lam) or AUTO
    heads: list[HeadId] = []
    for method in method_names(config.method):
        if method == "iwb":
            heads += [HeadId("iwb", config.loss, lam) for lam in lams]
        else:
            heads.append(HeadId(method, method if method in ("ce", "cb") else None))
    return heads


def references(config: RebalanceConfig) -> list[HeadId]:
    """Return the rows of every table: the stage-1 head, the classification loss only, and equal norms (λ = 0)."""
    loss_only = {"ce": [HeadId("ce", "ce")], "la": [LA_ONLY]}.get(config.loss, [])
    return [BASELINE, *loss_only, CB_ONLY, HeadId("iwb", config.loss, 0.0)]


def penalty_of(config: RebalanceConfig) -> Penalty:
    """Return the norm term of a configuration."""
    return penalty(config.formulation, **{switch.name: getattr(config, switch.name) for switch in fields(Penalty)})


def cb_form(config: RebalanceConfig) -> str:
    """Return the form of class-balanced loss of a configuration: softmax or bce."""
    return config.cb or preset_cb(config.formulation)


def head_of(head: HeadId, config: RebalanceConfig) -> Head:
    """Return what the engine fits for a head of ce, cb, iwb or iwb-la."""
    if head.method == "iwb-la":
        return iwb_la_head(head.lam or 0.0)
    form = "ce" if head.loss in ("ce", "la") else f"cb-{cb_form(config)}"
    rule, tau = penalty_of(config) if head.method == "iwb" else NO_PENALTY, float(head.loss == "la")
    if "kl_weight" in dict(head.values):
        rule = replace(rule, kl_weight=float(dict(head.values)["kl_weight"]))
    return Head(form, head.lam or 0.0, rule, config.beta, tau)  # type: ignore[arg-type]


def schedule_of(config: RebalanceConfig, head: HeadId | None = None) -> Schedule:
    """Return the schedule by which a configuration trains a head, whose tuned values replace the configuration's."""
    values = {} if head is None else dict(head.values)
    schedule = Schedule(
        epochs=config.epochs,
        lr=config.lr if head is None or head.lr is None else head.lr,
        momentum=config.momentum,
        weight_decay=float(values.get("weight_decay", config.weight_decay)),
        batch_size=config.batch_size,
        augmented=values.get("views", config.views) == "augmented",
    )
    return iwb_la_schedule(schedule) if head is not None and head.method == "iwb-la" else schedule


def resolved(config: RebalanceConfig) -> dict[str, Any]:
    """Return every switch of stage 2 with its value after presets, JSON-ready."""
    rule = penalty_of(config)
    return config.model_dump(mode="json", exclude={"method", "lam", "select_on", "variants"}) | {
        "cb": cb_form(config),
        "log_base": rule.log_base,
        "direction": rule.direction,
        "kl_weight": rule.kl_weight,
        "detach_target": rule.detach_target,
    }
