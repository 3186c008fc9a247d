"""Stage 2: re-balance the linear classifier on cached features."""

from pipeline.rebalance.ablation import AblationResult, ablate
from pipeline.rebalance.engine.objective import iwb_objective
from pipeline.rebalance.evaluate import EvaluateResult, evaluate
from pipeline.rebalance.run import rebalance
from pipeline.results.rebalance_result import RebalanceResult
from pipeline.text import callable_as

__all__ = ["AblationResult", "EvaluateResult", "RebalanceResult", "ablate", "evaluate", "iwb_objective", "rebalance"]

callable_as(__name__, rebalance)
