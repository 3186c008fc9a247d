"""Counts, means and covariances of features by class, in one pass over blocks and summed over ranks.

Every closed-form and convex head starts from these numbers: standardisation, class means, Gaussian discriminants.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Samples = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # blocks (features (n, D), labels (n,)), anew at each call
Reduce = Callable[[Tensor], Tensor]  # the sum of a tensor over all ranks
CONSTANT = 1e-10  # share of a feature's mean square below which its variance is rounding


def one_rank(tensor: Tensor) -> Tensor:
    """Return the tensor: the sum over a single rank."""
    return tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments in float64.

    Arguments:
        number: (C,) samples of each class.
        means: (C, D) mean feature of each class; 0 for a class without a sample.
        within: (D, D) covariance within classes where every sample weighs the same.
        within_by_class: (D, D) mean over classes of their covariances, so that every class weighs the same.
    """

    number: Tensor
    means: Tensor
    within: Tensor
    within_by_class: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean feature (D,) over all samples."""
        return self.number @ self.means / self.number.sum()

    @property
    def total(self) -> Tensor:
        """Covariance (D, D) of all samples."""
        centred = (self.number / self.number.sum()).sqrt()[:, None] * (self.means - self.mean)
        return self.within + centred.T @ centred

    @property
    def scale(self) -> Tensor:
        """Standard deviation (D,) of each feature over all samples; 1 where the feature is constant."""
        variance = self.total.diagonal()
        constant = variance <= CONSTANT * (variance + self.mean.square())
        return torch.where(constant, 1.0, variance.clamp_min(0).sqrt())


def class_moments(samples: Samples, counts: Tensor, width: int, *, reduce: Reduce = one_rank) -> Moments:
    """Return the moments of all samples in one pass.

    Products are computed in the features' precision around the mean of the first block and summed in float64.

    Arguments:
        samples: yields blocks (features (n, D), labels (n,)) of this rank, perhaps none.
        counts: (C,) samples of each class on all ranks.
        width: D.
        reduce: sum over ranks.
    """
    counts = counts.double()
    first = next((block for block in samples() if len(block[0])), None)
    start = counts.new_zeros(width + 1)
    if first is not None:
        start[:-1], start[-1] = first[0].double().mean(0), 1
    start = reduce(start)
    shift = start[:-1] / start[-1]
    sums = counts.new_zeros(len(counts), width)
    by_image, by_class = counts.new_zeros(2, width, width)
    root = counts.clamp_min(1).rsqrt()  # so that the product of two rows weighs 1 / N_c
    for x, y in samples():
        x = x - shift.to(x)
        sums.index_add_(0, y, x.double())
        by_image += x.T @ x
        x = x * root[y, None].to(x)
        by_class += x.T @ x
    sums, by_image, by_class = reduce(sums), reduce(by_image), reduce(by_class)
    means = sums / counts.clamp_min(1)[:, None]
    present = counts > 0
    return Moments(
        number=counts,
        means=torch.where(present[:, None], means + shift, 0.0),
        within=(by_image - (counts[:, None] * means).T @ means) / counts.sum(),
        within_by_class=(by_class - means.T @ means) / present.sum(),
    )
