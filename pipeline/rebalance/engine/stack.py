"""Heads that advance together: S batch orders × K heads of one form, and the buffers of their steps (DESIGN §6).

A head is a matrix (C, D+1) whose last column is the bias, and a batch carries one row more than it has samples: the
mean of the unit features, with 0 where samples have the 1 that multiplies the bias. So one product gives all logits
and, in its last row, the batch mean of W_c·x/|x|, which is all that a fixed target needs (norm_gradient.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.distributed import Ranks
from pipeline.rebalance.engine.head import Form


class Stack:
    """S × K heads of one form with their momentum.

    Arguments:
        weight: (S, K, C, D+1) the start; it belongs to the stack from then on.
        half_target: (K, C) λ·NC/2.
        kl_weight: (K,).
        prior: (K, C) term that is in the bias while the heads are fitted.
        slices: (first head, last head + 1, weighting), in order, together all heads.
        ranks: processes that share every batch; each has the same heads.
        fused: end each step with the one kernel of triton_kernel.py, for float32 on a GPU.
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
        self.norm_factor = torch.zeros_like(self.norms)  # the factor of a class vector in the gradient of the penalty
        self.minus_lr = weight.new_zeros(())  # a tensor, so that a recorded step goes on with the lr of another epoch


class Buffers:
    """Logits, residuals and index tensors of a stack for one batch size; no step allocates beyond them.

    Arguments:
        total: samples of the batch.
        size: samples of it that this rank has.
    """

    def __init__(self, stack: Stack, total: int, size: int):
        self.total, self.size = total, size
        s, k, c, w = stack.seeds, stack.heads, stack.classes, stack.weight
        self.logits = w.new_empty(s, size + 1, k, c)
        self.residual = torch.empty_like(self.logits)
        rows = torch.arange(s, device=w.device)[:, None] * (size + 1) + torch.arange(size, device=w.device)
        self.row_start = (rows[..., None] * k + torch.arange(k, device=w.device)) * c
        self.truth = torch.empty_like(self.row_start)  # position of (seed, sample, head, true class) in the logits
        self.velocity = stack.velocity.flatten(1, 2)
