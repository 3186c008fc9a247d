"""The single switches that the paper's text and the authors' released code set differently, and how we set them."""

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
    """The term that pulls the norms to the target, and how it is weighed beside the classification loss.

    direction: KL(softmax n ‖ softmax P) is norms-to-target. kl_weight: a factor on the batch mean, or `batch`, which
    makes it the sum over this batch. detach_target: no gradient passes through P into the class vectors.
    """

    log_base: LogBase = "2"
    direction: Direction = "norms-to-target"
    kl_weight: float | Literal["batch"] = 1.0
    detach_target: bool = True
    hardness: Hardness = "vector"
    number: bool = True
    divergence: Divergence = "kl"


PRESETS: dict[str, tuple[Penalty, CBLoss]] = {
    "mixed": (Penalty(), "bce"),  # the text's penalty beside the code's loss: docs/results.md says what speaks for it
    "paper": (Penalty(), "softmax"),
    "code": (Penalty(log_base="e", direction="target-to-norms", kl_weight="batch", detach_target=False), "bce"),
}
_KNOWN: dict[str, tuple] = {
    "log_base": ("2", "e"),
    "direction": ("norms-to-target", "target-to-norms"),
    "hardness": ("vector", "scalar", "none"),
    "divergence": ("kl", "mse"),
    "detach_target": (True, False),
    "number": (True, False),
}


def penalty(formulation: str = "paper", **switches: Any) -> Penalty:
    """A preset with the given switches laid over it; None leaves what the preset says.

    Raises ConfigError for an unknown formulation or value.
    """
    return replace(_preset(formulation)[0], **{k: _checked(k, v) for k, v in switches.items() if v is not None})


def preset_cb(formulation: str) -> CBLoss:
    """Which class-balanced loss a formulation means."""
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
    if value not in _KNOWN[name]:
        raise ConfigError(f"{name} {value!r}: expected one of {', '.join(map(str, _KNOWN[name]))}")
    return value
