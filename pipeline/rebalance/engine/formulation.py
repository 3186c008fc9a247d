"""The switches that the paper's text and the authors' released code set differently, and their presets."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.config import nearest
from pipeline.errors import ConfigError
from pipeline.rebalance.engine.target import Hardness, LogBase

Direction = Literal["norms-to-target", "target-to-norms"]
Divergence = Literal["kl", "mse"]
CBLoss = Literal["softmax", "bce"]


@dataclass(frozen=True)
class Penalty:
    """The divergence of the norms of the class vectors from the target P, and its weight beside the classification loss.

    Arguments:
        log_base: base of the logarithm in NC.
        direction: norms-to-target is KL(softmax n ‖ softmax P).
        kl_weight: factor on the batch mean; `batch` makes it the sum over the batch.
        detach_target: let no gradient pass through P into the class vectors.
        hardness: HC by class (vector), by the true class (scalar), or 1 (none).
        number: False replaces NC by 1.
    Source: IWB, AAAI 2024, Eq. 3–8.
    """

    log_base: LogBase = "2"
    direction: Direction = "norms-to-target"
    kl_weight: float | Literal["batch"] = 1.0
    detach_target: bool = True
    hardness: Hardness = "vector"
    number: bool = True
    divergence: Divergence = "kl"


PRESETS: dict[str, tuple[Penalty, CBLoss]] = {
    "mixed": (Penalty(), "bce"),  # penalty of the text, loss of the code: see docs/results.md
    "paper": (Penalty(), "softmax"),
    "code": (Penalty(log_base="e", direction="target-to-norms", kl_weight="batch", detach_target=False), "bce"),
}
_VALUES: dict[str, tuple] = {
    "log_base": ("2", "e"),
    "direction": ("norms-to-target", "target-to-norms"),
    "hardness": ("vector", "scalar", "none"),
    "divergence": ("kl", "mse"),
    "detach_target": (True, False),
    "number": (True, False),
}


def penalty(formulation: str = "paper", **switches: Any) -> Penalty:
    """Return the penalty of a preset, changed by the switches that are not None.

    Raises: ConfigError: unknown formulation or value.
    """
    return replace(_preset(formulation)[0], **{k: _checked(k, v) for k, v in switches.items() if v is not None})


def preset_cb(formulation: str) -> CBLoss:
    """Return the form of the class-balanced loss of a formulation."""
    return _preset(formulation)[1]


def _preset(formulation: str) -> tuple[Penalty, CBLoss]:
    if formulation not in PRESETS:
        raise ConfigError(f"no formulation {formulation!r}; known: {', '.join(PRESETS)}{nearest(formulation, PRESETS)}")
    return PRESETS[formulation]


def _checked(name: str, value: Any) -> Any:
    if name == "kl_weight":
        if value == "batch" or (isinstance(value, int | float) and 0 <= value < float("inf")):
            return value
        raise ConfigError(f"kl_weight {value!r}: expected a number of 0 or more, or 'batch'")
    if value not in _VALUES[name]:
        raise ConfigError(f"{name} {value!r}: expected one of {', '.join(map(str, _VALUES[name]))}")
    return value
