"""Multinomial logistic regression for many settings (ρ, l2) at once, by a truncated Newton method.

    minimise over W, b    Σ w_y·CE(W x + b + (1−ρ)·ln π, y) / Σ w  +  l2/2·‖W‖²,    w_c ∝ N_c^(−ρ)

ρ = 1 is balanced logistic regression, ρ = 0 balanced softmax; every ρ between them is consistent for the balanced error
(Menon et al., ICLR 2021). The bias is not penalised, so the prior inside the loss only shifts it: W is that of weighted
logistic regression, and b is its bias minus (1−ρ)·ln π. Without that shift (`prior=False`) ρ = 0 is the plain regression.

Features are standardised over the training samples and rotated onto their principal axes, which leaves ‖W‖ as it is. The
settings of one l2 advance together, in one matrix product of all of them; the next smaller l2 starts where the last ones lead
to. A Newton step is found by conjugate gradients. Their preconditioner is the Hessian's diagonal on the principal axes, with
the few samples of each class that matter most added exactly. Their products may be in bfloat16: they only shape the step, the
loss and gradient that decide are in the precision asked for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.linear.moments import Moments, Reduce, Samples, class_moments, one_rank

L2 = (4.0, 1.0, 0.2, 0.05, 0.01, 2e-3, 5e-4)
RHO = (0.0, 0.5, 1.0)
TOLERANCE = 1e-4  # as scikit-learn; accuracies are those of 1e-6 to .1 points
ROWS = 1024  # of a product: logits of so many samples stay in the cache
FIRST_RESIDUAL, RESIDUAL = 0.2, (0.1, 0.3)  # of conjugate gradients, relative to the gradient, and bounds of later ones
MOST_PRODUCTS, MOST_STEPS = 200, 50
CACHED_BYTES = 2 << 30  # most that probabilities kept between two products take
SAMPLES = 32  # of each class that the preconditioner holds exactly
PRECONDITIONER_BYTES = 1 << 30  # most that they take


@dataclass(frozen=True)
class LogisticHeads:
    """Heads of all settings for features as they are.

    Arguments:
        weight, bias: (R, L, C, D) and (R, L, C) float64, by ρ and l2 in the order asked for.
        gradient: (R, L) largest entry of the gradient where the solver stopped, on standardised features.
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
        tolerance: largest entry of the gradient (C, D + 1) at which a setting is done, by magnitude.
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
        path = [*path[-1:], (math.log(l2), theta)]
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
        self.cached_bytes, self.ranks = cached_bytes, float(reduce(self.weights.new_ones(1)))
        self.tick = getattr(data.samples, "tick", lambda products: None)  # as of `Blocks` of stage 2

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
        self.tick(2 * len(theta))
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
        self.tick(2 * len(direction))
        output = self._rotated(self.reduce(output).view_as(direction))
        output[..., :-1] += l2 * direction[..., :-1]
        return output

    def preconditioner(self, l2: float, point: Point) -> "Preconditioner":
        """Return an approximate inverse of the Hessian at a point.

        The block of a class is its diagonal on the principal axes, in which the SAMPLES samples of largest curvature p·(1 − p/w)
        stand exactly. They are found in one pass over the blocks and collected in a second one.
        """
        settings, classes, width = point.theta.shape
        most = min(SAMPLES, PRECONDITIONER_BYTES // point.theta.nbytes)
        diagonal = torch.zeros_like(point.theta).flatten(0, 1)
        largest = point.theta.new_zeros(0, settings, classes)
        number = torch.zeros_like(largest, dtype=torch.int64)
        start = 0
        for x, low, y, probability in self._probabilities(point):
            low = low if self.data.resident else (x @ self.data.rotation).to(low)
            curvature = torch.addcdiv(probability, probability.square(), self._weights(point.settings, y), value=-1)
            diagonal += curvature.flatten(1).to(low).T @ low.square()
            numbers = torch.arange(start, start + len(x), device=x.device)[:, None, None].expand_as(curvature)
            candidates = torch.cat([largest, curvature])
            largest, order = candidates.topk(min(most, len(candidates)), 0)
            number = torch.cat([number, numbers]).gather(0, order)
            start += len(x)
        diagonal = self.reduce(diagonal).view_as(point.theta)
        diagonal[..., :-1] += l2
        number, samples = number.permute(1, 2, 0), point.theta.new_zeros(settings, classes, len(number), width)
        start = 0
        for x, _, _ in self.data.blocks():
            inside = (number >= start) & (number < start + len(x))
            samples[inside] = x[number[inside] - start]
            start += len(x)
        samples = samples if self.data.resident else samples @ self.data.rotation
        samples *= largest.permute(1, 2, 0).clamp_min(0).sqrt()[..., None]
        return Preconditioner.of(diagonal, samples, self.ranks, self.reduce)

    def largest(self, gradient: Tensor) -> Tensor:
        """Return the largest entry (S,) of a gradient (S, C, D + 1) on standardised features, by magnitude."""
        return (gradient @ self.data.rotation.T).abs().amax((1, 2)).double()

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


@dataclass(frozen=True)
class Preconditioner:
    """Multiplication by (Δ + AᵀA)⁻¹ = Δ⁻¹ − VᵀV for every setting and class, Δ diagonal, A of few rows.

    Several ranks have samples A of their own; the mean of their inverses is the same on all of them, and positive definite.

    Arguments:
        inverse: (S, C, D + 1), 1/Δ.
        factor: (S, C, m, D + 1), V = L⁻¹AΔ⁻¹ with LLᵀ = 1 + AΔ⁻¹Aᵀ (Woodbury's identity).
    """

    inverse: Tensor
    factor: Tensor
    ranks: float
    reduce: Reduce

    @classmethod
    def of(cls, diagonal: Tensor, samples: Tensor, ranks: float, reduce: Reduce) -> "Preconditioner":
        """Return the preconditioner where Δ + diag(AᵀA) is `diagonal` (S, C, D + 1), A = `samples` (S, C, m, D + 1)."""
        tiny = torch.finfo(diagonal.dtype).tiny
        rest = (diagonal - samples.square().sum(2)).maximum(1e-2 * diagonal).clamp_min(tiny)
        scaled = samples / rest[:, :, None]
        gram = scaled @ samples.mT
        gram.diagonal(dim1=2, dim2=3).add_(1)
        factor = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), scaled, upper=False)
        return cls(1 / rest, factor, ranks, reduce)

    def __call__(self, residual: Tensor) -> Tensor:
        """Return the product with a residual (S, C, D + 1)."""
        projected = self.factor @ residual[..., None]
        product = self.inverse * residual - (self.factor.mT @ projected)[..., 0]
        return self.reduce(product) / self.ranks

    def select(self, rows: Tensor) -> "Preconditioner":
        """Return the preconditioner of some of its settings."""
        return replace(self, inverse=self.inverse[rows], factor=self.factor[rows])


def newton(objective: Objective, theta: Tensor, l2: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the minimum (S, C, D + 1) of every setting at one l2, and the largest entry of its gradient (S,).

    Settings advance together and leave when they are done; each has its own step length. The next step is as accurate as the
    last one was good: far from the minimum, where logits of a few samples jump, the best step would be no better than a rough
    one. Where a step from products in reduced precision lowers neither gradient nor loss, later products are exact.
    """
    theta, fast = theta.clone(), True
    point = objective.at(theta, l2, torch.arange(len(theta), device=theta.device))
    error = objective.largest(point.gradient)
    goals = torch.full_like(point.loss, FIRST_RESIDUAL)
    preconditioner = objective.preconditioner(l2, point)
    for _ in range(MOST_STEPS):
        rows = (error[point.settings] > tolerance).nonzero().flatten()
        if not len(rows):
            break
        if len(rows) < len(point.settings):
            point, preconditioner = point.select(rows), preconditioner.select(rows)
        direction = conjugate_gradients(objective, l2, point, preconditioner, goals[point.settings], fast=fast)
        new = line_search(objective, l2, point, direction)
        new_error = objective.largest(new.gradient)
        lower = (new_error < 0.5 * error[point.settings]) | (new.loss < point.loss - 1e-4 * point.loss.abs())
        if not (fast or lower.any()):
            break  # neither gets any lower: this is the precision of the features
        goals[point.settings] = (new_error / error[point.settings]).clamp(*RESIDUAL)
        fast, point = fast and bool(lower.all()), new
        theta[point.settings], error[point.settings] = point.theta, new_error
    return theta, error


def conjugate_gradients(
    objective: Objective, l2: float, point: Point, preconditioner: Preconditioner, goal: Tensor, *, fast: bool
) -> Tensor:
    """Return a direction near the Newton step −H⁻¹·gradient, of every setting of a point.

    Arguments:
        goal: (S,) residual over the gradient, in the norm of the preconditioner, at which a setting is done.
        fast: allow products in reduced precision.
    """
    step, residual = torch.zeros_like(point.gradient), -point.gradient
    scaled = preconditioner(residual)
    direction, size = scaled.clone(), inner(residual, scaled)
    goal = goal**2 * size
    for _ in range(MOST_PRODUCTS):
        product = objective.product(direction, l2, point, fast=fast)
        curvature = inner(direction, product)
        alive = (size > goal) & (curvature > 0)  # rounding may leave a direction without curvature
        if not alive.any():
            break
        length = torch.where(alive, size / curvature, 0).to(step)[:, None, None]
        step += length * direction
        residual -= length * product
        scaled = preconditioner(residual)
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


def extrapolated(path: Sequence[tuple[float, Tensor]], l2: float, start: Tensor) -> Tensor:
    """Return parameters where the last two lead to, on a line in ln l2; a parabola overshoots on wide features."""
    if len(path) < 2:
        return path[-1][1] if path else start
    (before, second_last), (at, last) = path
    return last + (math.log(l2) - at) / (at - before) * (last - second_last)
