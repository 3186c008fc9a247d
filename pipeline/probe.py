"""A classifier for an encoder that has none for these classes: multinomial logistic regression on its frozen features."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

L2, EVALUATIONS = 1e-3, 100
SETTINGS = (
    f"multinomial logistic regression on the clean training features, L2 {L2:g}, L-BFGS of {EVALUATIONS} evaluations"
)

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def fit_probe(
    blocks: Blocks, *, classes: int, width: int, stop: Callable[[], object] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight (C, D) and bias (C,), float32, of a linear probe: deterministic, no seed, no learning rate.

    The loss is mean cross-entropy + L2/2 · ‖W‖² of features that are centred and divided by one number, their root mean
    square, which is folded back into weight and bias: without it a step's length would depend on the encoder's scale.

    Arguments:
        blocks: yields all training rows at each call, as (features (n, D) float32, labels (n,)) on the device that computes.
        stop: is called before every evaluation and may raise.
    """
    rows, mean, scale = _moments(blocks, width)
    device = mean.device
    weight = torch.zeros(classes, width, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)

    def evaluate() -> Tensor:
        """Return the loss and leave its gradient in the parameters; autograd would keep every block's logits."""
        stop()
        with torch.no_grad():
            loss = torch.zeros((), dtype=torch.float64, device=device)
            slope, offset = weight * L2, torch.zeros_like(bias)
            for features, labels in blocks():
                x = (features - mean) / scale
                logits = torch.addmm(bias, x, weight.T)
                loss += F.cross_entropy(logits, labels, reduction="sum").double() / rows
                residual = logits.softmax(1)
                residual[torch.arange(len(labels), device=device), labels] -= 1
                slope.addmm_(residual.T, x, alpha=1 / rows)
                offset += residual.sum(0) / rows
            weight.grad, bias.grad = slope, offset
            return loss + L2 / 2 * weight.double().square().sum()

    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=EVALUATIONS, max_eval=EVALUATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    optimiser.step(evaluate)
    scaled = (weight.detach() / scale).double()
    shift = bias.detach().double() - scaled @ mean.double()
    return scaled.float().cpu().numpy(), shift.float().cpu().numpy()


def _moments(blocks: Blocks, width: int) -> tuple[int, Tensor, Tensor]:
    """Return (rows N, mean (D,), root mean square of the centred features: one number), float32 on the blocks' device."""
    rows, sums, squares = 0, torch.zeros(width, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    device = torch.device("cpu")
    for features, _ in blocks():
        device, x = features.device, features.double()
        rows, sums, squares = rows + len(x), sums.to(device) + x.sum(0), squares.to(device) + x.square().sum()
    mean = sums / max(rows, 1)
    spread = (squares / max(rows * width, 1) - mean.square().mean()).clamp_min(0).sqrt()
    return rows, mean.float().to(device), torch.where(spread > 0, spread, 1.0).float().to(device)
