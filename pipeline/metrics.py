"""Measures of a classifier on unbalanced classes: pure functions of arrays."""

import numpy as np

GROUPS = ("many", "medium", "few")


def class_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Boolean masks (C,) of the classes with more than 100, 20 to 100, and fewer than 20 training images (Liu et al., CVPR 2019)."""
    counts = np.asarray(counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}


def group_means(class_accuracy: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
    """all, many, medium, few in %: means over the classes of a group of their accuracies (C,) in 0…1.

    Classes without a sample (nan) are left out; None where nothing is left.
    """

    def mean(mask: np.ndarray) -> float | None:
        known = class_accuracy[mask & ~np.isnan(class_accuracy)]
        return float(100 * known.mean()) if len(known) else None

    return {"all": mean(np.ones(len(class_accuracy), dtype=bool))} | {
        g: mean(m) for g, m in class_groups(counts).items()
    }
