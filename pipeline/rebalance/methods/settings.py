"""The rows of a results table: the settings a configuration asks for, and those that always stand beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import RebalanceConfig, nearest
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS
from pipeline.rebalance.engine.fit import ALONE, Head, Schedule
from pipeline.rebalance.engine.formulation import Penalty, penalty, preset_cb
from pipeline.rebalance.methods import RIVALS, Trained, methods_in
from pipeline.rebalance.methods.iwb_la import best_head, best_schedule

Value = float | str


@dataclass(frozen=True)
class Setting:
    """One row of the table, before its seeds: loss None for what has a loss of its own, lam None where there is no λ.

    lr None: the configuration's; own: names and values that this method alone has.
    """

    method: str
    loss: str | None = None
    lam: float | None = None
    lr: float | None = None
    own: tuple[tuple[str, Value], ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What names the row; of several settings that differ in lr or own values only one comes into a table."""
        return {"method": self.method, "loss": self.loss, "lam": self.lam}

    @property
    def trained(self) -> bool:
        """Whether it depends on a batch order."""
        return self.method in ENGINE or isinstance(RIVALS.get(self.method), Trained)

    def __str__(self) -> str:
        loss = f"+{self.loss}" if self.method == "iwb" else ""
        told = [] if self.lam is None else [("λ", self.lam)]
        told += [] if self.lr is None else [("lr", self.lr)]
        values = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in [*told, *self.own])
        return f"{self.method}{loss} {values}".rstrip()


ENGINE = ("ce", "cb", "iwb", "best")  # what the stacked engine fits
BASELINE = Setting("baseline")
LA_ALONE = Setting("balanced-softmax", own=(("tau", 1.0),))  # the logit-adjusted loss without a norm term
REFERENCES = {"baseline": BASELINE, "cb": Setting("cb", "cb")}  # what a selected row is always measured against


def asked_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods a configuration names, each once; `all` is every one, FILE.py those it defines. ConfigError for an
    unknown name.
    """
    names = [name for given in names for name in (methods_in(Path(given)) if given.endswith(".py") else (given,))]
    for name in names:
        if name not in (*METHODS, "all"):
            known = ", ".join(METHODS)
            raise ConfigError(
                f"--method {name}: unknown; known: {known}, all, FILE.py{nearest(name, (*METHODS, 'all'))}"
            )
    if not names:
        raise ConfigError(f"no method; known: {', '.join(METHODS)}, all")
    return tuple(METHODS) if "all" in names else tuple(dict.fromkeys(names))


def candidates(config: RebalanceConfig, lams: Sequence[float]) -> list[Setting]:
    """The settings one of which is selected: those of the methods asked for."""
    found: list[Setting] = []
    for method in asked_methods(config.method):
        if method == "iwb":
            found += [Setting("iwb", config.loss, lam) for lam in lams]
        else:
            found.append(Setting(method, method if method in ("ce", "cb") else None))
    return found


def references(config: RebalanceConfig) -> list[Setting]:
    """Rows of every table: the stage-1 head, the classification loss alone, and equal target norms (λ = 0)."""
    alone = {"ce": [Setting("ce", "ce")], "la": [LA_ALONE]}.get(config.loss, [])
    return [BASELINE, *alone, Setting("cb", "cb"), Setting("iwb", config.loss, 0.0)]


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


def head_of(setting: Setting, config: RebalanceConfig) -> Head:
    """What the engine fits for ce, cb, iwb and best."""
    if setting.method == "best":
        return best_head(setting.lam or 0.0)
    form = "ce" if setting.loss in ("ce", "la") else f"cb-{cb_form(config)}"
    rule, tau = penalty_of(config) if setting.method == "iwb" else ALONE, float(setting.loss == "la")
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
    return best_schedule(schedule) if method == "best" else schedule


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
