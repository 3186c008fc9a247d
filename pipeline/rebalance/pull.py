"""How the penalty pulls at the class vectors, and its gradient added to the velocity of a stack.

With g_ic the cosine, H = λ·NC/2 and P_ic = H_c·(1 − g_ic) (vector), H_c·(1 − g_iy) (scalar) or 2·H_c (none):
∂KL(s‖q)/∂n_c = s_c·(ln s_c − ln q_c − KL), ∂KL(q‖s)/∂n_c = s_c − q_c, ∂mse/∂n_c = 2·(n_c − P_c)/C, ∂n_c/∂W_c = W_c/n_c.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.rebalance.stack import Batch, Step


class TrueCosine:
    """Cosine (S, B, K) of every sample with its true class, read from the logits less the bias."""

    def __init__(self, step: "Step"):
        stack = step.stack
        s, k, c = stack.norms.shape
        self.step, self.stack = step, stack
        device = stack.norms.device
        heads = torch.arange(s, device=device)[:, None, None] * k + torch.arange(k, device=device)
        self.head_start = (heads * c).expand(s, step.size, k).contiguous()
        self.own = torch.empty_like(self.head_start)  # where (seed, head, true class) lies in (S, K, C)
        self.value, self.of_class = (stack.norms.new_empty(s, step.size, k) for _ in range(2))
        self.bias = torch.empty_like(stack.norms)

    def compute(self, batch: "Batch") -> Tensor:
        own, of_class = self.own.view(-1), self.of_class.view(-1)
        torch.add(self.head_start, batch.labels[:, :, None], out=self.own)
        torch.index_select(self.step.logits.view(-1), 0, self.step.truth.view(-1), out=self.value.view(-1))
        self.bias.copy_(self.stack.weight[..., self.stack.width])
        torch.index_select(self.bias.view(-1), 0, own, out=of_class)
        self.value.sub_(self.of_class).mul_(batch.inverse_norm[..., None])
        torch.index_select(self.stack.norms.view(-1), 0, own, out=of_class)
        return self.value.div_(self.of_class)


class MeanTarget:
    """The target held fixed, in the paper's direction or mse: only its mean over the batch is needed.

    softmax ignores a shift common to all classes, so mean_i ln q_ic is the mean of P_ic less a constant that cancels in
    the gradient: no exponential of P. The mean of P_ic comes with the last row of the logits.
    """

    def __init__(self, step: "Step"):
        self.step, self.stack = step, step.stack
        n = self.stack.norms
        self.scale = _scale(step)
        self.slope, self.pull, self.share = (torch.empty_like(n) for _ in range(3))
        self.total = n.new_empty(*n.shape[:2], 1)
        if self.stack.form.penalty.hardness == "scalar":
            self.true_cosine, self.mean_cosine = TrueCosine(step), n.new_empty(n.shape[:2])

    def add(self, batch: "Batch") -> None:
        stack, n, slope, pull = self.stack, self.stack.norms, self.slope, self.pull
        rule = stack.form.penalty
        # slope = n − mean of P
        if rule.hardness == "none":
            torch.sub(n, stack.half_target, alpha=2, out=slope)
        elif rule.hardness == "scalar":
            torch.mean(self.true_cosine.compute(batch), dim=1, out=self.mean_cosine)
            torch.addcmul(n, stack.half_target, self.mean_cosine.sub_(1)[..., None], out=slope)
        else:
            torch.div(self.step.logits[:, -1], n, out=pull)
            torch.addcmul(n, stack.half_target, pull.sub_(1), out=slope)
        if rule.divergence == "mse":
            slope.mul_(2 / stack.classes)
        else:
            torch.softmax(n, -1, out=self.share)
            torch.mul(self.share, slope, out=pull)
            torch.sum(pull, -1, keepdim=True, out=self.total)
            slope.sub_(self.total).mul_(self.share)
        torch.div(slope.mul_(self.scale), n, out=pull)
        stack.velocity[..., : stack.width].addcmul_(stack.vectors, pull[..., None])


class EveryTarget:
    """Whatever needs P of every sample: the code's direction, and targets that the gradient passes through."""

    def __init__(self, step: "Step"):
        self.step, self.stack = step, step.stack
        form, n = self.stack.form, self.stack.norms
        s, k, c = n.shape
        self.rows = 1 if form.penalty.hardness == "none" else step.size
        self.scale = _scale(step)
        self.slope, self.pull, self.share = (torch.empty_like(n) for _ in range(3))
        self.total = n.new_empty(s, k, 1)
        self.p, self.q = (n.new_empty(s, self.rows, k, c) for _ in range(2))
        if form.penalty.hardness == "scalar":
            self.true_cosine, self.slack = TrueCosine(step), n.new_empty(s, step.size, k)
        if form.penalty.hardness == "vector":
            self.cosine = n.new_empty(s, step.size, k, c)
        if form.moving_target:
            self.log_q, self.kl = n.new_empty(s, step.size, k, c), n.new_empty(s, step.size, k, 1)

    def add(self, batch: "Batch") -> None:
        stack, n, slope = self.stack, self.stack.norms, self.slope
        rule = stack.form.penalty
        cosine = self.compute_targets(batch)
        if rule.divergence == "kl":
            torch.softmax(n, -1, out=self.share)
            torch.softmax(self.p, -1, out=self.q)
        if rule.divergence == "kl" and rule.direction == "target-to-norms":
            torch.mean(self.q, dim=1, out=slope)
            torch.sub(self.share, slope, out=slope)
        else:
            torch.mean(self.p, dim=1, out=slope)
            torch.sub(n, slope, out=slope)
            if rule.divergence == "mse":
                slope.mul_(2 / stack.classes)
            else:
                torch.mul(self.share, slope, out=self.pull)
                torch.sum(self.pull, -1, keepdim=True, out=self.total)
                slope.sub_(self.total).mul_(self.share)
        slope.mul_(self.scale)
        if stack.form.moving_target:
            assert cosine is not None
            self.add_through_target(batch, cosine)
        torch.div(slope, n, out=self.pull)
        stack.velocity[..., : stack.width].addcmul_(stack.vectors, self.pull[..., None])

    def compute_targets(self, batch: "Batch") -> Tensor | None:
        """Fills p; returns the cosines it was made of, (S, B, K, C) for vector and (S, B, K) for scalar."""
        stack, half = self.stack, self.stack.half_target
        if stack.form.penalty.hardness == "none":
            self.p.copy_(half[:, None]).mul_(2)
            return None
        if stack.form.penalty.hardness == "scalar":
            cosine = self.true_cosine.compute(batch)
            torch.neg(cosine, out=self.slack).add_(1)
            torch.mul(self.slack[..., None], half[:, None], out=self.p)
            return cosine
        torch.sub(self.step.logits[:, :-1], stack.weight[:, None, ..., stack.width], out=self.cosine)
        self.cosine.mul_(batch.inverse_norm[..., None, None]).div_(stack.norms[:, None])
        torch.neg(self.cosine, out=self.p).add_(1).mul_(half[:, None])
        return self.cosine

    def add_through_target(self, batch: "Batch", cosine: Tensor) -> None:
        """What reaches W through the cosines in P: ∂g_ic/∂W_c = (x̂_i − g_ic·Ŵ_c)/n_c, x̂ and Ŵ unit vectors."""
        assert batch.unit is not None
        stack, rule, n, e = self.stack, self.stack.form.penalty, self.stack.norms, self.q
        # e = ∂(batch mean of the divergence)/∂P · B
        if rule.divergence == "mse":
            torch.sub(self.p, n[:, None], out=e).mul_(2 / stack.classes)
        elif rule.direction == "norms-to-target":
            e.sub_(self.share[:, None])
        else:
            torch.log_softmax(self.p, -1, out=self.log_q)
            torch.log_softmax(n, -1, out=self.pull)
            self.log_q.sub_(self.pull[:, None])
            torch.mul(e, self.log_q, out=self.p)
            torch.sum(self.p, -1, keepdim=True, out=self.kl)
            e.mul_(self.log_q.sub_(self.kl))
        # then ∂/∂g, as ∂P_ic/∂g is −H_c
        e.mul_(stack.half_target[:, None]).mul_(self.scale[:, None]).div_(-self.step.size)
        if rule.hardness == "scalar":
            torch.sum(e, -1, out=self.slack)
            own = self.true_cosine.own.view(-1)
            e.zero_().view(-1).index_copy_(0, self.true_start(), self.slack.view(-1))
            self.slack.mul_(cosine)
            self.pull.zero_().view(-1).index_add_(0, own, self.slack.view(-1))
        else:
            torch.mul(e, cosine, out=self.p)
            torch.sum(self.p, 1, out=self.pull)
        self.slope.sub_(self.pull.div_(n))
        e.div_(n[:, None])
        self.step.velocity.baddbmm_(e.flatten(2).transpose(1, 2), batch.unit)

    def true_start(self) -> Tensor:
        """Where (seed, sample, head, true class) lies in (S, B, K, C): truth is counted in batches of one row more."""
        s, k, c = self.stack.norms.shape
        shift = torch.arange(s, device=self.q.device)[:, None, None] * (k * c)
        return (self.step.truth - shift).view(-1)


def _scale(step: "Step") -> Tensor:
    """Weight of the batch mean, (1, K, 1): `batch` turns the mean into the sum over this batch."""
    summed = step.stack.form.penalty.kl_weight == "batch"
    return step.stack.kl_weight * (step.size if summed else 1)
