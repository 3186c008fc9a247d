"""The classifiers that inverse weight-balancing is compared with, over the same cached features (METHODS §3).

api.py defines a method; training_free.py and trained.py hold the methods, losses.py their formulas; fit.py fits any of
them; registry.py adds those of users.
"""

from pipeline.rebalance.methods.api import Free, Rule, Stage1, Trained
from pipeline.rebalance.methods.registry import RIVALS, add_method, methods_in
from pipeline.rebalance.methods.trained import TRAINED
from pipeline.rebalance.methods.training_free import FREE

__all__ = ["FREE", "RIVALS", "TRAINED", "Free", "Rule", "Stage1", "Trained", "add_method", "methods_in"]
