"""Stage 2: re-balance the linear classifier on cached features."""

from pipeline.rebalance.ablation import AblationResult, ablate
from pipeline.rebalance.evaluate import EvaluateResult, evaluate
from pipeline.rebalance.objective import iwb_objective
from pipeline.rebalance.result import RebalanceResult
from pipeline.rebalance.run import rebalance
from pipeline.shown import callable_as

__all__ = ["AblationResult", "EvaluateResult", "RebalanceResult", "ablate", "evaluate", "iwb_objective", "rebalance"]

callable_as(__name__, rebalance)
