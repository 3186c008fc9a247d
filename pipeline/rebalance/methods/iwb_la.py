"""`--method iwb-la`: inverse weight-balancing with the logit-adjusted loss and a share of class means in the class vectors.

Chosen among some two hundred combinations of loss, penalty, start, schedule and post-processing by validation accuracy on two
encoders; docs/results.md says how far it held on others. The logit-adjusted loss finds the balance, the KL term moves accuracy to
small classes by λ, and class means, which need few samples to be good, steady what was fitted on few.
"""

from dataclasses import replace

import numpy as np

from pipeline.rebalance.engine.head import Head, Schedule
from pipeline.rebalance.engine.objective import penalty

RATE = 0.4  # of the configuration's learning rate, in the middle of what is tried
TRIALS = ((0.3, 0.25), (0.6, 0.25), (1.0, 0.25), (0.6, 0.5))  # λ, share of means


def iwb_la_head(lam: float) -> Head:
    """Return what the engine fits: the logit-adjusted loss at τ = 1 with the paper's penalty."""
    return Head("ce", lam, penalty("paper"), tau=1.0)


def iwb_la_schedule(schedule: Schedule) -> Schedule:
    """Return the schedule on the clean view; augmentation adds only noise here."""
    return replace(schedule, augmented=False)


def with_means(
    weight: np.ndarray, bias: np.ndarray, means: np.ndarray, offset: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a head to which the nearest-mean classifier is added, times `share` and the mean norm of the head.

    Arguments:
        weight: (C, D) of the head.
        bias: (C,).
        means: (C, D) unit means of the centred, normalised features of each class.
        offset: (C,) −means·(mean feature).
    """
    scale = np.float32(share * np.linalg.norm(weight, axis=1).mean())
    return weight + scale * means, bias + scale * offset
