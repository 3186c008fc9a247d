"""One step of SGD for all heads of a stack, with gradients by hand (DESIGN §6)."""

import torch

from pipeline.rebalance.engine.batches import Batch
from pipeline.rebalance.engine.norm_gradient import EveryTarget, MeanTarget
from pipeline.rebalance.engine.stack import Buffers, Stack


class Steps:
    """The steps of a stack, one StackStep for each batch size: the full batch and the short last one."""

    def __init__(self, stack: Stack):
        self.stack = stack
        self._steps: dict[int, StackStep] = {}

    def __call__(self, batch: Batch) -> None:
        """Take one step as torch.optim.SGD does, without nesterov and dampening, at the learning rate in minus_lr."""
        if batch.size not in self._steps:
            self._steps[batch.size] = StackStep(self.stack, batch.size, batch.labels.shape[1])
        self._steps[batch.size].run(batch)


class StackStep:
    """The arithmetic of a step for one batch size; arguments as of Buffers."""

    def __init__(self, stack: Stack, total: int, size: int):
        self.stack, self.buffers = stack, Buffers(stack, total, size)
        # the velocity of rank 0 before the sum over ranks is that of all ranks after it
        self.momentum = stack.momentum if stack.ranks.first else 0.0
        logits, residual, c = self.buffers.logits, self.buffers.residual, stack.classes
        if stack.form.cb == "bce":
            self.ratio, self.ratio_sum = torch.empty_like(logits), logits.new_empty(*logits.shape[:3], 1)
        self.minus_one = logits.new_full((self.buffers.truth.numel(),), -1)
        gradient = EveryTarget if stack.form.needs_every_target else MeanTarget
        self.norm_gradient = gradient(stack, self.buffers) if stack.penalised else None
        # views that every step takes
        self.logits_flat, residual_flat = logits.flatten(2), residual.flatten(2)
        self.residual_line, self.truth_line = residual.view(-1), self.buffers.truth.view(-1)
        self.matrix = stack.weight.flatten(1, 2).transpose(1, 2)
        self.products = [
            (self.buffers.velocity[:, a * c : b * c], residual_flat[:, :, a * c : b * c].transpose(1, 2), weighting)
            for a, b, weighting in stack.slices
        ]

    def run(self, batch: Batch) -> None:
        stack = self.stack
        torch.bmm(batch.x, self.matrix, out=self.logits_flat)
        torch.add(self.buffers.row_start, batch.labels, out=self.buffers.truth)
        self.compute_residual()
        for velocity, residual, weighting in self.products:
            torch.baddbmm(velocity, residual, batch.weighted[weighting], beta=self.momentum, out=velocity)
        if stack.weight_decay and stack.has_prior and stack.ranks.first:  # the prior does not decay
            stack.velocity[..., -1].sub_(stack.prior, alpha=stack.weight_decay)
        if self.norm_gradient is not None:
            if not stack.fused:
                torch.linalg.vector_norm(stack.vectors, dim=-1, out=stack.norms)
                stack.norms.clamp_min_(stack.tiny)
            self.norm_gradient.add(batch)
        if stack.fused:
            self.finish()
            return
        stack.ranks.add_up(stack.velocity)
        if stack.weight_decay:
            stack.velocity.add_(stack.weight, alpha=stack.weight_decay)
        stack.weight.addcmul_(stack.velocity, stack.minus_lr)

    def finish(self) -> None:
        from pipeline.rebalance.engine.triton_kernel import update

        stack, decay = self.stack, self.stack.weight_decay
        update(stack.weight, stack.velocity, stack.norm_factor, stack.norms, stack.minus_lr, weight_decay=decay)

    def compute_residual(self) -> None:
        """Write ∂(classification loss of one sample)/∂logits, before the sample's weight, into the residual."""
        p = self.buffers.residual
        torch.softmax(self.buffers.logits, -1, out=p)
        if self.stack.form.cb == "softmax":
            self.residual_line.index_add_(0, self.truth_line, self.minus_one)
            return
        # r = p·∂l/∂p is −1 for the true class and p/(1 − p) for the others; ∂l/∂z = r − p·Σr
        torch.neg(p, out=self.ratio).add_(1).clamp_min_(self.stack.eps)
        torch.div(p, self.ratio, out=self.ratio)
        self.ratio.view(-1).index_fill_(0, self.truth_line, -1)
        torch.sum(self.ratio, -1, keepdim=True, out=self.ratio_sum)
        torch.sub(self.ratio, p.mul_(self.ratio_sum), out=p)
