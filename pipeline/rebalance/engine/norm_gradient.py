"""The gradient of the norm penalty, added to the velocity of a stack.

With g_ic the cosine, H = λ·NC/2 and P_ic = H_c·(1 − g_ic) (vector), H_c·(1 − g_iy) (scalar) or 2·H_c (none):
∂KL(s‖q)/∂n_c = s_c·(ln s_c − ln q_c − KL), ∂KL(q‖s)/∂n_c = s_c − q_c, ∂mse/∂n_c = 2·(n_c − P_c)/C, ∂n_c/∂W_c = W_c/n_c.
"""

import torch
from torch import Tensor

from pipeline.rebalance.engine.batches import Batch
from pipeline.rebalance.engine.stack import Buffers, Stack


class TrueCosine:
    """Cosine (S, B, K) of every sample with its true class, from the logits without the bias."""

    def __init__(self, stack: Stack, buffers: Buffers):
        s, k, c = stack.norms.shape
        self.stack, self.buffers = stack, buffers
        device = stack.norms.device
        heads = torch.arange(s, device=device)[:, None, None] * k + torch.arange(k, device=device)
        self.head_start = (heads * c).expand(s, buffers.size, k).contiguous()
        self.position = torch.empty_like(self.head_start)  # of (seed, head, true class) in (S, K, C)
        self.value, self.class_value = (stack.norms.new_empty(s, buffers.size, k) for _ in range(2))
        self.bias = torch.empty_like(stack.norms)

    def compute(self, batch: Batch) -> Tensor:
        position, class_value = self.position.view(-1), self.class_value.view(-1)
        torch.add(self.head_start, batch.labels, out=self.position)
        torch.index_select(self.buffers.logits.view(-1), 0, self.buffers.truth.view(-1), out=self.value.view(-1))
        self.bias.copy_(self.stack.weight[..., self.stack.width])
        torch.index_select(self.bias.view(-1), 0, position, out=class_value)
        self.value.sub_(self.class_value).mul_(batch.inverse_norm)
        torch.index_select(self.stack.norms.view(-1), 0, position, out=class_value)
        return self.value.div_(self.class_value)


class MeanTarget:
    """The gradient of a fixed target in the paper's direction or mse, which needs only the batch mean of the target.

    softmax ignores a shift common to all classes, so mean_i ln q_ic is the mean of P_ic less a constant that cancels in
    the gradient: no exponential of P. The mean of P_ic comes with the last row of the logits.
    """

    def __init__(self, stack: Stack, buffers: Buffers):
        self.stack, self.buffers = stack, buffers
        n = stack.norms
        summed = self.stack.form.penalty.kl_weight == "batch"  # turns the batch mean into the sum over this batch
        self.scale = self.stack.kl_weight * (buffers.total if summed else 1)
        self.slope, self.share = (torch.empty_like(n) for _ in range(2))
        self.factor, self.factor_column = stack.norm_factor, stack.norm_factor[..., None]
        self.total = n.new_empty(*n.shape[:2], 1)
        self.mean_logits = buffers.logits[:, -1]
        if self.stack.form.penalty.hardness == "scalar":
            self.true_cosine, self.mean_cosine = TrueCosine(stack, buffers), n.new_empty(n.shape[:2])

    def add(self, batch: Batch) -> None:
        self.compute_slope(batch)
        if self.stack.ranks.first:
            self.slope.mul_(self.scale)
            self.add_slope()

    def compute_slope(self, batch: Batch) -> None:
        """Compute slope (S, K, C) = ∂(batch mean of the divergence)/∂n_c and, for kl, share = softmax of the norms."""
        stack, n, slope = self.stack, self.stack.norms, self.slope
        rule = stack.form.penalty
        # slope = n − mean of P
        if rule.hardness == "none":
            torch.sub(n, stack.half_target, alpha=2, out=slope)
        elif rule.hardness == "scalar":
            torch.sum(self.true_cosine.compute(batch), dim=1, out=self.mean_cosine).div_(self.buffers.total)
            stack.ranks.add_up(self.mean_cosine)
            torch.addcmul(n, stack.half_target, self.mean_cosine.sub_(1)[..., None], out=slope)
        else:
            torch.div(self.mean_logits, n, out=self.factor)
            torch.addcmul(n, stack.half_target, self.factor.sub_(1), out=slope)
        if rule.divergence == "mse":
            slope.mul_(2 / stack.classes)
        else:
            torch.softmax(n, -1, out=self.share)
            torch.mul(self.share, slope, out=self.factor)
            torch.sum(self.factor, -1, keepdim=True, out=self.total)
            slope.sub_(self.total).mul_(self.share)

    def add_slope(self) -> None:
        torch.div(self.slope, self.stack.norms, out=self.factor)
        if not self.stack.fused:
            self.stack.velocity_of_vectors.addcmul_(self.stack.vectors, self.factor_column)


class EveryTarget:
    """The gradient of a penalty that needs P of every sample: the code's direction, or a target that is not detached."""

    def __init__(self, stack: Stack, buffers: Buffers):
        self.stack, self.buffers, self.mean = stack, buffers, MeanTarget(stack, buffers)
        form, n = stack.form, stack.norms
        s, k, c = n.shape
        rows = 1 if form.penalty.hardness == "none" else buffers.size
        self.p, self.q = (n.new_empty(s, rows, k, c) for _ in range(2))
        self.per_class = torch.empty_like(n)
        if form.penalty.hardness == "scalar":
            self.slack, self.true_value = (n.new_empty(s, buffers.size, k) for _ in range(2))
            self.seed_start = torch.arange(s, device=n.device)[:, None, None] * (k * c)
            self.truth = torch.empty_like(buffers.truth)
        if form.penalty.hardness == "vector":
            self.projected = n.new_empty(s, buffers.size, k, c)
        if form.moving_target:
            self.factor = torch.empty_like(n)
            if form.penalty.divergence == "kl" and form.penalty.direction == "target-to-norms":
                self.log_q, self.kl = torch.empty_like(self.q), n.new_empty(s, rows, k, 1)

    def add(self, batch: Batch) -> None:
        rule, mean = self.stack.form.penalty, self.mean
        mean.compute_slope(batch)
        self.compute_targets(batch)
        if rule.divergence == "kl":
            torch.softmax(self.p, -1, out=self.q)
            if rule.direction == "target-to-norms":
                torch.sum(self.q, dim=1, out=mean.slope)
                if rule.hardness != "none":  # else all ranks have the one q of all samples
                    self.stack.ranks.add_up(mean.slope.div_(self.buffers.total))
                torch.sub(mean.share, mean.slope, out=mean.slope)
        if self.stack.ranks.first:
            mean.slope.mul_(mean.scale)
        else:
            mean.slope.zero_()
        if self.stack.form.moving_target:
            self.add_through_target(batch)
        mean.add_slope()

    def compute_targets(self, batch: Batch) -> None:
        """Compute p = P of every sample and, for vector, projected = W_c·x/|x|."""
        stack, half, n = self.stack, self.stack.half_target, self.stack.norms
        if stack.form.penalty.hardness == "none":
            self.p.copy_(half[:, None]).mul_(2)
        elif stack.form.penalty.hardness == "scalar":
            torch.neg(self.mean.true_cosine.value, out=self.slack).add_(1)
            torch.mul(self.slack[..., None], half[:, None], out=self.p)
        else:
            torch.sub(self.buffers.logits[:, :-1], stack.weight[:, None, ..., stack.width], out=self.projected)
            self.projected.mul_(batch.inverse_norm[..., None])
            torch.div(half, n, out=self.per_class)
            torch.addcmul(half[:, None], self.projected, self.per_class[:, None], value=-1, out=self.p)

    def add_through_target(self, batch: Batch) -> None:
        """Add the gradient through the cosines in P: ∂g_ic/∂W_c = (x̂_i − g_ic·Ŵ_c)/n_c, x̂ and Ŵ unit vectors.

        The part along x̂ goes to the velocity by a third product, the part along Ŵ into the slope of the norms.
        """
        assert batch.unit is not None
        stack, rule, mean, n, e = self.stack, self.stack.form.penalty, self.mean, self.stack.norms, self.q
        # factor = weight / B · ∂P_ic/∂g_ic, and for vector · 1/n_c
        self.factor.copy_(stack.half_target).mul_(mean.scale).div_(-self.buffers.total)
        if rule.hardness == "vector":
            self.factor.div_(n)
        if rule.divergence == "kl" and rule.direction == "target-to-norms":
            torch.log_softmax(self.p, -1, out=self.log_q)
            torch.log(mean.share, out=self.per_class)
            self.log_q.sub_(self.per_class[:, None])
            torch.mul(e, self.log_q, out=self.p)
            torch.sum(self.p, -1, keepdim=True, out=self.kl)
            e.mul_(self.log_q.sub_(self.kl)).mul_(self.factor[:, None])
        else:  # (q − s)·factor, or (P − n)·factor·2/C
            raw = rule.divergence == "mse"
            if raw:
                self.factor.mul_(2 / stack.classes)
            torch.mul(n if raw else mean.share, self.factor, out=self.per_class).neg_()
            torch.addcmul(self.per_class[:, None], self.p if raw else e, self.factor[:, None], out=e)
        if rule.hardness == "vector":
            torch.mul(e, self.projected, out=self.p)
            torch.sum(self.p, 1, out=self.per_class)
        else:
            self.move_to_true_class(e)
        mean.slope.sub_(self.per_class.div_(n))
        self.buffers.velocity.baddbmm_(e.flatten(2).transpose(1, 2), batch.unit)

    def move_to_true_class(self, e: Tensor) -> None:
        """For scalar, where all targets of a sample depend on its one cosine, collect the gradient at its true class."""
        true = self.mean.true_cosine
        torch.sum(e, -1, out=self.slack)
        torch.sub(self.buffers.truth, self.seed_start, out=self.truth)  # truth counts size + 1 rows a batch
        torch.div(self.slack, true.class_value, out=self.true_value)
        e.zero_().view(-1).index_copy_(0, self.truth.view(-1), self.true_value.view(-1))
        self.slack.mul_(true.value)
        self.per_class.zero_().view(-1).index_add_(0, true.position.view(-1), self.slack.view(-1))
