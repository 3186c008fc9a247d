"""Class sizes of a long-tailed data set and what follows from them alone: groups, priors, class weights, margins.

Both stages use it. Functions of tensors keep dtype and device; importing this loads no torch.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = ("many", "medium", "few")
BOUNDS = {"many": "> 100", "medium": "20–100", "few": "< 20"}  # training images of each class of a group


def class_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mask (C,) of the classes in each of GROUPS.

    Arguments:
        counts: (C,) training images of each class.
    Source: Liu et al., CVPR 2019: more than 100, 20 to 100, fewer than 20 training images.
    """
    counts = np.asarray(counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}


def group_index(counts: np.ndarray) -> np.ndarray:
    """Return (C,) the position in GROUPS of the group of each class; counts as in `class_groups`."""
    return np.argmax(list(class_groups(counts).values()), axis=0)


def log_prior(counts: "Tensor") -> "Tensor":
    """Return ln π (C,), π_c = N_c/N, of counts (C,)."""
    return (counts / counts.sum()).log()


def class_balanced_weights(counts: "Tensor", *, beta: float = 0.9999) -> "Tensor":
    """Return class weights v (C,) = (1 − β) / (1 − β^N_c), scaled so that they sum to C.

    They are computed through expm1, so that counts of millions and β near 1 lose no digits.

    Arguments:
        counts: (C,) training images of each class, floating point.
        beta: β in 0…1; 0 weighs all classes alike.
    Source: Cui et al., CVPR 2019.
    """
    if beta == 0:
        return counts.new_ones(counts.shape)
    v = 1 / -(counts * counts.new_tensor(beta).log()).expm1()
    return v * (len(counts) / v.sum())


def inverse_prior_weights(counts: "Tensor", rho: "float | Tensor") -> "Tensor":
    """Return class weights π_c^(−ρ) with mean 1.

    Arguments:
        counts: (C,) training images of each class.
        rho: ρ, one number or one of each trial (T, 1).
    Returns: (C,) or (T, C).
    Source: generalised re-weighting; Zhang et al., CVPR 2021.
    """
    return (-rho * log_prior(counts)).softmax(-1) * len(counts)


def ldam_margins(counts: "Tensor", largest: "float | Tensor") -> "Tensor":
    """Return margins ∝ N_c^(−1/4), that of the smallest class being `largest`.

    Arguments:
        counts: (C,) training images of each class.
        largest: one number or one of each trial (T, 1).
    Returns: (C,) or (T, C).
    Source: Cao et al., NeurIPS 2019.
    """
    m = counts**-0.25
    return largest * (m / m.max())
