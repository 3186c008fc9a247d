"""Linear changes of a head that exists: logit adjustment and a share of class means."""

import torch
from torch import Tensor

from pipeline.linear.moments import Moments, Reduce, one_rank
from pipeline.rebalance.methods.api import Samples

TAU = tuple(round(0.25 * i, 2) for i in range(11))
SHARE = (0.0, 0.25, 0.5, 1.0)


def adjusted(bias: Tensor, counts: Tensor, tau: Tensor | float) -> Tensor:
    """Return bias (…, C) − τ·ln π: logit adjustment after training (Menon et al., ICLR 2021, Eq. 9)."""
    return bias - tau * (counts.double() / counts.sum()).log()


def mean_directions(samples: Samples, moments: Moments, *, reduce: Reduce = one_rank) -> tuple[Tensor, Tensor]:
    """Return the nearest-class-mean classifier as a linear layer: weight (C, D) of unit rows and bias (C,), in float64.

    Row c is the unit mean of (x − m)/|x − m| over the samples of class c, m the mean feature; the bias is −weight·m. The cosine
    itself would divide by |x − m| too, which is not linear, but the same for all classes: the largest is the same.
    """
    sums, centre = torch.zeros_like(moments.means), moments.mean
    for x, y in samples():
        sums.index_add_(0, y, torch.nn.functional.normalize(x.double() - centre, dim=1))
    weight = torch.nn.functional.normalize(reduce(sums), dim=1)
    return weight, -(weight @ centre)


def with_directions(
    weight: Tensor, bias: Tensor, directions: tuple[Tensor, Tensor], share: float
) -> tuple[Tensor, Tensor]:
    """Return a head (C, D), (C,) plus `share` times its mean row norm of the layer from `mean_directions`."""
    scale = share * weight.norm(dim=1).mean()
    return weight + scale * directions[0].to(weight), bias + scale * directions[1].to(bias)
