"""Stage 2: re-balance the linear classifier on cached features. Nothing heavy is imported before it is used."""

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.text import callable_as

if TYPE_CHECKING:
    from pipeline.rebalance.ablation import AblationResult, ablate
    from pipeline.rebalance.engine.objective import iwb_objective
    from pipeline.rebalance.evaluation import EvaluateResult, evaluate
    from pipeline.rebalance.run import rebalance
    from pipeline.results.rebalance_result import RebalanceResult

_MODULE_OF = {
    "AblationResult": "pipeline.rebalance.ablation",
    "EvaluateResult": "pipeline.rebalance.evaluation",
    "RebalanceResult": "pipeline.results.rebalance_result",
    "ablate": "pipeline.rebalance.ablation",
    "evaluate": "pipeline.rebalance.evaluation",
    "iwb_objective": "pipeline.rebalance.engine.objective",
    "rebalance": "pipeline.rebalance.run",
}

__all__ = ["AblationResult", "EvaluateResult", "RebalanceResult", "ablate", "evaluate", "iwb_objective", "rebalance"]


def __getattr__(name: str) -> Any:
    if name == "__wrapped__":  # the function that the module can be called as
        name = "rebalance"
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


callable_as(__name__)
