"""The classifiers that inverse weight-balancing is measured against, over the same cached features (METHODS §3).

rule.py says what a method is; free.py has those without training, trained.py the others, losses.py their formulas, fit.py
fits any of them.
"""

from pipeline.rebalance.rivals.free import FREE
from pipeline.rebalance.rivals.rule import Free, Given, Rule, Trained
from pipeline.rebalance.rivals.trained import TRAINED

RIVALS: dict[str, Rule] = {rule.name: rule for rule in (*TRAINED, *FREE)}

__all__ = ["FREE", "RIVALS", "TRAINED", "Free", "Given", "Rule", "Trained"]
