"""Multinomial logistic regression for many settings (ρ, l2) at once, by a truncated Newton method.

    minimise over W, b    Σ w_y·CE(W x + b + (1−ρ)·ln π, y) / Σ w  +  l2/2·‖W‖²,    w_c ∝ N_c^(−ρ)

ρ = 1 is balanced logistic regression, ρ = 0 balanced softmax; every ρ between them is consistent for the balanced error
(Menon et al., ICLR 2021). The bias is not penalised, so the prior inside the loss only shifts it: W is that of weighted
logistic regression, and b is its bias minus (1−ρ)·ln π. Without that shift (`prior=False`) ρ = 0 is the plain regression.

Features are standardised over the training samples and rotated onto their principal axes, which leaves ‖W‖ as it is and makes
the diagonal of the Hessian a good preconditioner. The settings of one l2 advance together, in one matrix product of all of
them; the next smaller l2 starts where the last ones lead to. A Newton step is found by conjugate gradients, whose products
may be in bfloat16: they only shape the step, the loss and gradient that decide are in the precision asked for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.linear.moments import Moments, Reduce, Samples, class_moments, one_rank

L2 = (1.0, 0.2, 0.05, 0.01, 2e-3, 5e-4, 1e-4)
RHO = (0.0, 0.5, 1.0)
TOLERANCE = 1e-6
ROWS = 1024  # of a product: logits of so many samples stay in the cache
RESIDUAL = 0.1  # of conjugate gradients, relative to the gradient in the norm of the preconditioner
MOST_PRODUCTS, MOST_STEPS = 200, 50
CACHED_BYTES = 2 << 30  # most that probabilities kept between two products take


@dataclass(frozen=True)
class LogisticHeads:
    """Heads of all settings for features as they are.

    Arguments:
        weight, bias: (R, L, C, D) and (R, L, C) float64, by ρ and l2 in the order asked for.
        gradient: (R, L) largest norm of a class's row of the gradient where the solver stopped, on standardised features.
    """

    weight: Tensor
    bias: Tensor
    gradient: Tensor


def logistic_regression(
    samples: Samples,
    counts: Tensor,
    width: int,
    *,
    rhos: Sequence[float] = RHO,
    l2s: Sequence[float] = L2,
    prior: bool = True,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
    product_dtype: torch.dtype | None = None,
    resident: bool = True,
    moments: Moments | None = None,
    reduce: Reduce = one_rank,
) -> LogisticHeads:
    """Return the optimum of every (ρ, l2).

    Arguments:
        samples: yields blocks (features (n, D), labels (n,)) of this rank; it is called once for every pass.
        counts: (C,) samples of each class on all ranks, on the device of the features; every class has one.
        width: D.
        prior: shift the bias by −(1−ρ)·ln π; False gives weighted logistic regression.
        tolerance: largest norm of a class's row of the gradient (C, D + 1) at which a setting is done.
        dtype: of loss and gradient, float32 or float64.
        product_dtype: of the products inside conjugate gradients, `dtype` by default.
        resident: hold standardised features in memory; False standardises each block whenever it is read.
        moments: of the same samples, where they are known.
        reduce: sum over ranks.
    Raises: ValueError: a class has no sample.
    """
    if counts.min() < 1:
        raise ValueError(f"class {int(counts.argmin())} has no sample; fit on the classes that have some")
    moments = moments or class_moments(samples, counts, width, reduce=reduce)
    data = Standardised(samples, moments, dtype, product_dtype or dtype, resident=resident)
    counts = counts.double()
    log_weight = -torch.tensor(rhos, dtype=torch.float64, device=counts.device)[:, None] * counts.log()
    log_weight -= (log_weight + counts.log()).logsumexp(1, keepdim=True)  # the weights of all samples sum to 1
    objective = Objective(data, log_weight.exp(), reduce)
    log_mass = log_weight + counts.log()
    theta = torch.zeros(len(rhos), len(counts), width + 1, dtype=dtype, device=counts.device)
    theta[..., -1] = log_mass - log_mass.mean(1, keepdim=True)
    path: list[tuple[float, Tensor]] = []
    solved: dict[float, tuple[Tensor, Tensor, Tensor]] = {}
    log_prior = (counts / counts.sum()).log()
    for l2 in sorted(set(l2s), reverse=True):
        theta, gradient = newton(objective, extrapolated(path, l2, theta), l2, tolerance)
        path = [*path[-2:], (math.log(l2), theta)]
        weight, bias = data.folded(theta)
        if prior:
            bias = bias - (1 - bias.new_tensor(rhos))[:, None] * log_prior
        solved[l2] = weight, bias, gradient
    return LogisticHeads(*(torch.stack([solved[l2][i] for l2 in l2s], 1) for i in range(3)))


class Standardised:
    """Blocks of (x − μ)/σ on the principal axes of the training samples, with a last feature of 1 that carries the bias.

    Blocks in memory hold the rotated features. Blocks that are read again for each pass are only standardised, and the class
    vectors are rotated instead: C·D² operations rather than N·D².
    """

    def __init__(
        self, samples: Samples, moments: Moments, dtype: torch.dtype, product_dtype: torch.dtype, *, resident: bool
    ):
        self.samples, self.dtype, self.product_dtype = samples, dtype, product_dtype
        self.mean, self.scale = moments.mean, moments.scale
        correlation = moments.total / self.scale / self.scale[:, None]
        self.axes = torch.linalg.eigh(correlation).eigenvectors
        self.rotation = torch.block_diag(self.axes, self.axes.new_ones(1, 1)).to(dtype)
        self.resident = resident
        self.memory = list(self._read()) if resident else None

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (features (n, D + 1), the same for products of conjugate gradients, labels (n,)), n at most ROWS."""
        return iter(self.memory) if self.memory is not None else self._read()

    def _read(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for features, labels in self.samples():
            for rows, y in zip(features.split(ROWS), labels.split(ROWS), strict=True):
                x = rows.to(self.dtype)
                x = (x - self.mean.to(x)) / self.scale.to(x)
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
                x = x @ self.rotation if self.resident else x
                yield x, x.to(self.product_dtype), y

    def folded(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (S, C, D) and bias (S, C) in float64 for features as they are."""
        weight = theta[..., :-1].double() @ self.axes.T / self.scale
        return weight, theta[..., -1].double() - weight @ self.mean


@dataclass(frozen=True)
class Point:
    """Loss (S,) in float64 and gradient (S, C, D + 1) of S settings at theta (S, C, D + 1).

    Arguments:
        settings: (S,) numbers of the settings.
        memory: weighted probabilities (n, S, C) of every block; None where they take too much and are computed anew.
    """

    theta: Tensor
    settings: Tensor
    loss: Tensor
    gradient: Tensor
    memory: list[Tensor] | None

    def select(self, rows: Tensor) -> "Point":
        """Return the point of some of its settings."""
        memory = None if self.memory is None else [block[:, rows] for block in self.memory]
        return Point(self.theta[rows], self.settings[rows], self.loss[rows], self.gradient[rows], memory)


class Objective:
    """Loss, gradient and Hessian of weighted regressions; parameters are (S, C, D + 1), the bias last.

    Arguments:
        weights: (S, C) weight of a sample by its class; they sum to 1 over all samples.
        cached_bytes: most that probabilities held between two products may take.
    """

    def __init__(self, data: Standardised, weights: Tensor, reduce: Reduce, cached_bytes: int = CACHED_BYTES):
        self.data, self.weights, self.reduce = data, weights.to(data.dtype), reduce
        self.cached_bytes = cached_bytes

    def at(self, theta: Tensor, l2: float, settings: Tensor) -> Point:
        """Return loss and gradient of some settings at theta."""
        loss, gradient = theta.new_zeros(len(theta), dtype=torch.float64), torch.zeros_like(theta).flatten(0, 1)
        columns, memory, free = self._columns(theta, theta.dtype), [], self.cached_bytes
        for x, _, y in self.data.blocks():
            logits = (x @ columns).view(len(x), *theta.shape[:2]).log_softmax(2)
            true_class, weight = y.view(-1, 1, 1).expand(-1, len(theta), 1), self._weights(settings, y)
            loss -= (logits.gather(2, true_class) * weight).sum((0, 2)).double()
            residual = logits.exp_().mul_(weight)
            free -= residual.nbytes
            if free >= 0:
                memory.append(residual.clone())
            residual.scatter_add_(2, true_class, -weight)
            gradient.addmm_(residual.flatten(1).T, x)
        loss, gradient = self.reduce(loss), self._rotated(self.reduce(gradient).view_as(theta))
        gradient[..., :-1] += l2 * theta[..., :-1]
        loss += l2 / 2 * theta[..., :-1].double().square().sum((1, 2))
        return Point(theta, settings, loss, gradient, memory if free >= 0 else None)

    def product(self, direction: Tensor, l2: float, point: Point, *, fast: bool) -> Tensor:
        """Return the Hessian at a point times a direction (S, C, D + 1).

        The part of a sample with weighted probabilities p (C,), Σp = w, is (p∘u − p·(p·u)/w) xᵀ for u = direction·x. The middle
        is never rounded to bfloat16: there confident samples cancel, and the Hessian would no longer be positive semidefinite.

        Arguments:
            fast: let both matrix products be in the product's dtype.
        """
        dtype = self.data.product_dtype if fast else self.data.dtype
        output, columns = torch.zeros_like(direction).flatten(0, 1), self._columns(direction, dtype)
        for x, low, y, probability in self._probabilities(point):
            x = low if fast else x
            u = (x @ columns).view(probability.shape).to(probability.dtype).mul_(probability)
            mean = u.sum(2, keepdim=True).div_(self._weights(point.settings, y))
            output += u.addcmul_(probability, mean, value=-1).flatten(1).to(dtype).T @ x
        output = self._rotated(self.reduce(output).view_as(direction))
        output[..., :-1] += l2 * direction[..., :-1]
        return output

    def diagonal(self, l2: float, point: Point) -> Tensor:
        """Return the Hessian's diagonal (S, C, D + 1) at a point."""
        output = torch.zeros_like(point.theta).flatten(0, 1)
        for x, _, y, probability in self._probabilities(point):
            x = x if self.data.resident else x @ self.data.rotation
            curvature = torch.addcdiv(probability, probability.square(), self._weights(point.settings, y), value=-1)
            output.addmm_(curvature.flatten(1).T, x.square())
        output = self.reduce(output).view_as(point.theta)
        output[..., :-1] += l2
        return output.clamp_min(torch.finfo(output.dtype).tiny)

    def _probabilities(self, point: Point) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield the two kinds of features of each block, labels (n,) and weighted probabilities (n, S, C)."""
        columns = self._columns(point.theta, point.theta.dtype)
        for i, (x, low, y) in enumerate(self.data.blocks()):
            if point.memory is not None:
                yield x, low, y, point.memory[i]
            else:
                logits = (x @ columns).view(len(x), *point.theta.shape[:2])
                yield x, low, y, logits.softmax(2).mul_(self._weights(point.settings, y))

    def _weights(self, settings: Tensor, labels: Tensor) -> Tensor:
        """Return the weight (n, S, 1) of each sample."""
        return self.weights[settings][:, labels].T[..., None]

    def _columns(self, theta: Tensor, dtype: torch.dtype) -> Tensor:
        """Return class vectors as columns (D + 1, S·C) that the blocks are multiplied with."""
        theta = theta if self.data.resident else theta @ self.data.rotation.T
        return theta.flatten(0, 1).to(dtype).T

    def _rotated(self, gradient: Tensor) -> Tensor:
        """Return a gradient on the principal axes."""
        return gradient if self.data.resident else gradient @ self.data.rotation


def newton(objective: Objective, theta: Tensor, l2: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the minimum (S, C, D + 1) of every setting at one l2, and its largest row norm of the gradient (S,).

    Settings advance together and leave when they are done; each has its own step length. Where a step from products in reduced
    precision lowers neither gradient nor loss, later products are exact.
    """
    theta, fast = theta.clone(), True
    point = objective.at(theta, l2, torch.arange(len(theta), device=theta.device))
    error = row_norm(point.gradient)
    for _ in range(MOST_STEPS):
        rows = (error[point.settings] > tolerance).nonzero().flatten()
        if not len(rows):
            break
        if len(rows) < len(point.settings):
            point = point.select(rows)
        inverse = 1 / objective.diagonal(l2, point)
        direction = conjugate_gradients(objective, l2, point, inverse, fast=fast)
        new = line_search(objective, l2, point, direction)
        lower = (row_norm(new.gradient) < 0.5 * row_norm(point.gradient)) | (
            new.loss < point.loss - 1e-4 * point.loss.abs()
        )
        if not (fast or lower.any()):
            break  # neither gets any lower: this is the precision of the features
        fast, point = fast and bool(lower.all()), new
        theta[point.settings], error[point.settings] = point.theta, row_norm(point.gradient)
    return theta, error


def conjugate_gradients(objective: Objective, l2: float, point: Point, inverse: Tensor, *, fast: bool) -> Tensor:
    """Return a direction near the Newton step −H⁻¹·gradient, of every setting of a point.

    Arguments:
        inverse: (S, C, D + 1) inverse of the preconditioner's diagonal.
        fast: allow products in reduced precision.
    """
    step, residual = torch.zeros_like(point.gradient), -point.gradient
    scaled = inverse * residual
    direction, size = scaled.clone(), inner(residual, scaled)
    goal = RESIDUAL**2 * size
    for _ in range(MOST_PRODUCTS):
        product = objective.product(direction, l2, point, fast=fast)
        curvature = inner(direction, product)
        alive = (size > goal) & (curvature > 0)  # rounding may leave a direction without curvature
        if not alive.any():
            break
        length = torch.where(alive, size / curvature, 0).to(step)[:, None, None]
        step += length * direction
        residual -= length * product
        scaled = inverse * residual
        new_size = inner(residual, scaled)
        direction = scaled + torch.where(alive, new_size / size, 0).to(step)[:, None, None] * direction
        size = torch.where(alive, new_size, 0)
        if not (size > goal).any():
            break
    return step


def line_search(objective: Objective, l2: float, point: Point, direction: Tensor) -> Point:
    """Return the point along a direction where each loss is sufficiently lower, up to the rounding of the loss."""
    slope, length = inner(point.gradient, direction), direction.new_ones(len(direction))
    rounding = 4 * torch.finfo(direction.dtype).eps * point.loss.abs()
    for _ in range(30):
        trial = objective.at(point.theta + length[:, None, None] * direction, l2, point.settings)
        high = trial.loss > point.loss + 1e-4 * length * slope + rounding
        if not high.any():
            break
        length[high] *= 0.5
    return trial


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product (S,) in float64 of each setting's tensors (S, C, D + 1)."""
    return (a * b).sum((1, 2), dtype=torch.float64)


def row_norm(gradient: Tensor) -> Tensor:
    """Return the largest norm (S,) of a class's row; no entry is larger, on whatever axes."""
    return gradient.norm(dim=2).amax(1)


def extrapolated(path: Sequence[tuple[float, Tensor]], l2: float, start: Tensor) -> Tensor:
    """Return parameters where the last ones lead to: the polynomial in ln l2 through up to three of them."""
    if not path:
        return start
    at = [log_l2 for log_l2, _ in path]
    x = math.log(l2)
    factors = [math.prod((x - b) / (a - b) for b in at if b != a) for a in at]
    return sum((factor * theta for factor, (_, theta) in zip(factors, path, strict=True)), torch.zeros_like(start))
