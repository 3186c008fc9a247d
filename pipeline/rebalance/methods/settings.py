"""The rows of a results table: the settings a configuration asks for, and those that always stand beside them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import RebalanceConfig, nearest
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS, RENAMED
from pipeline.rebalance.engine.fit import NO_PENALTY, Head, Schedule
from pipeline.rebalance.engine.formulation import Penalty, penalty, preset_cb
from pipeline.rebalance.methods import RIVALS, Trained, methods_in
from pipeline.rebalance.methods.iwb_la import best_head, best_schedule
from pipeline.results.head_id import BASELINE, CB_ONLY, HeadId

ENGINE = ("ce", "cb", "iwb", "iwb-la")  # what the stacked engine fits
LA_ONLY = HeadId("balanced-softmax", values=(("tau", 1.0),))  # the logit-adjusted loss without a norm term
REFERENCES = {"baseline": BASELINE, "cb": CB_ONLY}  # what a selected row is always measured against


def is_trained(head: HeadId) -> bool:
    """Return true where a head depends on a batch order."""
    return head.method in ENGINE or isinstance(RIVALS.get(head.method), Trained)


def asked_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods a configuration names, each once; `all` is every one, FILE.py those it defines. ConfigError for an
    unknown name.
    """
    names = [name for given in names for name in (methods_in(Path(given)) if given.endswith(".py") else (given,))]
    names = [RENAMED.get(name, name) for name in names]
    for name in names:
        if name not in (*METHODS, "all"):
            known = ", ".join(METHODS)
            raise ConfigError(
                f"--method {name}: unknown; known: {known}, all, FILE.py{nearest(name, (*METHODS, 'all'))}"
            )
    if not names:
        raise ConfigError(f"no method; known: {', '.join(METHODS)}, all")
    return tuple(METHODS) if "all" in names else tuple(dict.fromkeys(names))


def candidates(config: RebalanceConfig, lams: Sequence[float]) -> list[HeadId]:
    """The settings one of which is selected: those of the methods asked for."""
    found: list[HeadId] = []
    for method in asked_methods(config.method):
        if method == "iwb":
            found += [HeadId("iwb", config.loss, lam) for lam in lams]
        else:
            found.append(HeadId(method, method if method in ("ce", "cb") else None))
    return found


def references(config: RebalanceConfig) -> list[HeadId]:
    """Rows of every table: the stage-1 head, the classification loss alone, and equal target norms (λ = 0)."""
    alone = {"ce": [HeadId("ce", "ce")], "la": [LA_ONLY]}.get(config.loss, [])
    return [BASELINE, *alone, CB_ONLY, HeadId("iwb", config.loss, 0.0)]


def penalty_of(config: RebalanceConfig) -> Penalty:
    """The norm term a configuration means."""
    return penalty(
        config.formulation,
        log_base=config.log_base,
        direction=config.direction,
        kl_weight=config.kl_weight,
        detach_target=config.detach_target,
        hardness=config.hardness,
        number=config.number,
        divergence=config.divergence,
    )


def cb_form(config: RebalanceConfig) -> str:
    """softmax or bce: the form of class-balanced loss that a configuration means."""
    return config.cb or preset_cb(config.formulation)


def head_of(setting: HeadId, config: RebalanceConfig) -> Head:
    """What the engine fits for ce, cb, iwb and iwb-la."""
    if setting.method == "iwb-la":
        return best_head(setting.lam or 0.0)
    form = "ce" if setting.loss in ("ce", "la") else f"cb-{cb_form(config)}"
    rule, tau = penalty_of(config) if setting.method == "iwb" else NO_PENALTY, float(setting.loss == "la")
    return Head(form, setting.lam or 0.0, rule, config.beta, tau)  # type: ignore[arg-type]


def schedule_of(config: RebalanceConfig, *, lr: float | None = None, method: str = "") -> Schedule:
    """How a configuration trains a method; lr: in place of its learning rate."""
    schedule = Schedule(
        epochs=config.epochs,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        augmented=config.views == "augmented",
    )
    schedule = schedule if lr is None else replace(schedule, lr=lr)
    return best_schedule(schedule) if method == "iwb-la" else schedule


def resolved(config: RebalanceConfig) -> dict[str, Any]:
    """Every switch of stage 2 with the value it really has, JSON-ready."""
    rule = penalty_of(config)
    return config.model_dump(mode="json", exclude={"method", "lam", "select_on", "variants"}) | {
        "cb": cb_form(config),
        "log_base": rule.log_base,
        "direction": rule.direction,
        "kl_weight": rule.kl_weight,
        "detach_target": rule.detach_target,
    }
