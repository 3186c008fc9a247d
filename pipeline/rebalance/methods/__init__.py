"""The classifiers that inverse weight-balancing is measured against, over the same cached features (METHODS §3).

rule.py says what a method is; free.py has those without training, trained.py the others, losses.py their formulas, fit.py
fits any of them, own.py adds those of other people.
"""

from pipeline.rebalance.methods.api import Free, Given, Rule, Trained
from pipeline.rebalance.methods.registry import RIVALS, add_method, methods_in
from pipeline.rebalance.methods.trained import TRAINED
from pipeline.rebalance.methods.training_free import FREE

__all__ = ["FREE", "RIVALS", "TRAINED", "Free", "Given", "Rule", "Trained", "add_method", "methods_in"]
