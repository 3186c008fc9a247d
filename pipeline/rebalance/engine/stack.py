"""Heads that advance together: one step of SGD for S batch orders × K heads, gradients by hand (DESIGN §6).

A head is a matrix (C, D+1) whose last column is the bias, and a batch carries one row more than it has samples: the
mean of the unit features, with 0 where samples have the 1 that multiplies the bias. So one product gives all logits
and, in its last row, the batch mean of W_c·x/|x|, which is all that a fixed target needs (pull.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.distributed import Ranks
from pipeline.rebalance.engine.batches import Batch
from pipeline.rebalance.engine.head import Form
from pipeline.rebalance.engine.norm_gradient import EveryTarget, MeanTarget


class Stack:
    """S × K heads of one form with their momentum.

    weight (S, K, C, D+1) is the start and belongs to the stack from then on. half_target (K, C) is λ·NC/2. kl_weight (K,).
    prior (K, C): what is added to the bias while fitting. slices: (first head, last head + 1, weighting), in order,
    together all heads. ranks: who shares every batch; each then has the same heads. fused: end each step with the one
    kernel of fused.py, for float32 on a GPU.
    """

    def __init__(
        self,
        form: Form,
        weight: Tensor,
        half_target: Tensor,
        kl_weight: Tensor,
        prior: Tensor,
        slices: Sequence[tuple[int, int, int]],
        *,
        momentum: float,
        weight_decay: float,
        ranks: Ranks | None = None,
        fused: bool = False,
    ):
        self.fused = fused
        self.ranks = ranks or Ranks(0, 1, weight.device)
        self.form, self.weight, self.slices = form, weight, slices
        self.half_target, self.kl_weight = half_target[None], kl_weight[None, :, None]
        self.momentum, self.weight_decay, self.prior = momentum, weight_decay, prior
        self.weight[..., -1] += prior
        self.has_prior = bool(prior.any())
        self.penalised = bool((kl_weight > 0).any())
        self.seeds, self.heads, self.classes, self.width = *weight.shape[:3], weight.shape[3] - 1
        self.velocity = torch.zeros_like(weight)
        self.vectors, self.velocity_of_vectors = weight[..., : self.width], self.velocity[..., : self.width]
        self.tiny, self.eps = torch.finfo(weight.dtype).tiny, torch.finfo(weight.dtype).eps
        self.norms = torch.linalg.vector_norm(self.vectors, dim=-1).clamp_min_(self.tiny)
        self.pull = torch.zeros_like(self.norms)  # the factor of a class vector in the gradient of the penalty
        self.minus_lr = weight.new_zeros(())  # a tensor, so that a recorded step goes on with the lr of another epoch
        self._steps: dict[int, Step] = {}

    def step(self, batch: Batch) -> None:
        """One step as torch.optim.SGD takes it, without nesterov and dampening, with the learning rate in minus_lr."""
        if batch.size not in self._steps:  # two sizes at most: the full batch and the short last one
            self._steps[batch.size] = Step(self, batch.size, batch.labels.shape[1])
        self._steps[batch.size].run(batch)


class Step:
    """The buffers of a stack for one batch size, and the arithmetic on them: nothing is allocated after this.

    total: samples of the batch; size: those of them that this rank has.
    """

    def __init__(self, stack: Stack, total: int, size: int):
        self.stack, self.total, self.size = stack, total, size
        # what is in the velocity of rank 0 before the sum over ranks is in that of all after it
        self.momentum = stack.momentum if stack.ranks.first else 0.0
        s, k, c, w = stack.seeds, stack.heads, stack.classes, stack.weight
        self.logits = w.new_empty(s, size + 1, k, c)
        self.residual = torch.empty_like(self.logits)
        if stack.form.cb == "bce":
            self.ratio, self.ratio_sum = torch.empty_like(self.logits), w.new_empty(s, size + 1, k, 1)
        rows = torch.arange(s, device=w.device)[:, None] * (size + 1) + torch.arange(size, device=w.device)
        self.row_start = (rows[..., None] * k + torch.arange(k, device=w.device)) * c
        self.truth = torch.empty_like(self.row_start)
        self.minus_one = w.new_full((self.truth.numel(),), -1)
        self.pull = (EveryTarget if stack.form.needs_every_target else MeanTarget)(self) if stack.penalised else None
        # views that every step takes
        self.logits_flat, residual_flat = self.logits.flatten(2), self.residual.flatten(2)
        self.residual_line, self.truth_line = self.residual.view(-1), self.truth.view(-1)
        self.matrix = w.flatten(1, 2).transpose(1, 2)
        self.velocity = stack.velocity.flatten(1, 2)
        self.products = [
            (self.velocity[:, a * c : b * c], residual_flat[:, :, a * c : b * c].transpose(1, 2), weighting)
            for a, b, weighting in stack.slices
        ]

    def run(self, batch: Batch) -> None:
        stack = self.stack
        torch.bmm(batch.x, self.matrix, out=self.logits_flat)
        torch.add(self.row_start, batch.labels, out=self.truth)
        self.compute_residual()
        for velocity, residual, weighting in self.products:
            torch.baddbmm(velocity, residual, batch.weighted[weighting], beta=self.momentum, out=velocity)
        if stack.weight_decay and stack.has_prior and stack.ranks.first:  # the prior is no part of what decays
            stack.velocity[..., -1].sub_(stack.prior, alpha=stack.weight_decay)
        if self.pull is not None:
            if not stack.fused:
                torch.linalg.vector_norm(stack.vectors, dim=-1, out=stack.norms)
                stack.norms.clamp_min_(stack.tiny)
            self.pull.add(batch)
        if stack.fused:
            self.finish()
            return
        stack.ranks.add_up(stack.velocity)
        if stack.weight_decay:
            stack.velocity.add_(stack.weight, alpha=stack.weight_decay)
        stack.weight.addcmul_(stack.velocity, stack.minus_lr)

    def finish(self) -> None:
        from pipeline.rebalance.engine.triton_kernel import update

        stack = self.stack
        update(stack.weight, stack.velocity, stack.pull, stack.norms, stack.minus_lr, weight_decay=stack.weight_decay)

    def compute_residual(self) -> None:
        """residual = ∂(classification loss of one sample)/∂logits, before the sample's weight."""
        p = self.residual
        torch.softmax(self.logits, -1, out=p)
        if self.stack.form.cb == "softmax":
            self.residual_line.index_add_(0, self.truth_line, self.minus_one)
            return
        # r = p·∂l/∂p is −1 for the true class and p/(1 − p) for the others; ∂l/∂z = r − p·Σr
        torch.neg(p, out=self.ratio).add_(1).clamp_min_(self.stack.eps)
        torch.div(p, self.ratio, out=self.ratio)
        self.ratio.view(-1).index_fill_(0, self.truth_line, -1)
        torch.sum(self.ratio, -1, keepdim=True, out=self.ratio_sum)
        torch.sub(self.ratio, p.mul_(self.ratio_sum), out=p)
