"""`--method iwb-la`: inverse weight-balancing with the logit-adjusted loss and a share of class means in the class vectors.

Chosen among some two hundred combinations of loss, penalty, start, schedule and post-processing by validation accuracy on two
encoders; docs/results.md says how far it held on others. The logit-adjusted loss finds the balance, the KL term moves accuracy to
small classes by λ, and class means, which need few samples to be good, steady what was fitted on few.
"""

from dataclasses import replace

import numpy as np

from pipeline.rebalance.engine.formulation import penalty
from pipeline.rebalance.engine.head import Head, Schedule

RATE = 0.4  # of the configuration's learning rate, in the middle of what is tried
TRIALS = ((0.3, 0.25), (0.6, 0.25), (1.0, 0.25), (0.6, 0.5))  # λ, share of means


def iwb_la_head(lam: float) -> Head:
    """What the engine fits: the logit-adjusted loss at τ = 1 and the paper's penalty."""
    return Head("ce", lam, penalty("paper"), tau=1.0)


def iwb_la_schedule(schedule: Schedule) -> Schedule:
    """The clean view alone: what augmentation adds here is noise."""
    return replace(schedule, augmented=False)


def with_means(
    weight: np.ndarray, bias: np.ndarray, means: np.ndarray, offset: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """A head (C, D), (C,) with `share` times its mean norm of the nearest-mean classifier added.

    means (C, D): unit means of the centred, normalised features of each class; offset (C,): −means·(mean feature). Both
    classifiers are linear, so their sum is.
    """
    scale = np.float32(share * np.linalg.norm(weight, axis=1).mean())
    return weight + scale * means, bias + scale * offset
