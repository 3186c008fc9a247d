"""The end of a step on a GPU in one pass over weight and velocity, where single operations would take seven."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# a·b + c in one instruction; Triton 3.9 warns that this default will change
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@triton.jit
def _update(weight, velocity, norm_factor, norms, minus_lr, decay, width, tiny, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor, rate = tl.load(norm_factor + row), tl.load(minus_lr)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width + 1, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column <= width
        at = row * (width + 1) + column
        w = tl.load(weight + at, mask=inside, other=0.0)
        v = tl.load(velocity + at, mask=inside, other=0.0)
        v += (tl.where(column < width, factor, 0.0) + decay) * w
        w += rate * v
        tl.store(velocity + at, v, mask=inside)
        tl.store(weight + at, w, mask=inside)
        squares += tl.where(column < width, w * w, 0.0)
    tl.store(norms + row, tl.maximum(tl.sqrt(tl.sum(squares)), tiny))


def update(
    weight: Tensor, velocity: Tensor, norm_factor: Tensor, norms: Tensor, minus_lr: Tensor, *, weight_decay: float
) -> None:
    """Compute velocity += (norm_factor + weight_decay)·weight, weight += minus_lr·velocity and the new norms, in place.

    Arguments (contiguous, float32):
        weight, velocity: (…, C, D+1); the last column is the bias, for which norm_factor and norms do not count.
        norm_factor, norms: (…, C).
        minus_lr: a scalar.
    """
    width, tiny = weight.shape[-1] - 1, torch.finfo(weight.dtype).tiny
    _update[(norms.numel(),)](weight, velocity, norm_factor, norms, minus_lr, weight_decay, width, tiny, BLOCK=BLOCK)
