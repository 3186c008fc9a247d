"""Accuracy and gradient norm of every class, measured after epochs on the same clean training images.

The gradient is that of cross-entropy with respect to the features that enter the classifier: for a linear classifier
∂L_i/∂z_i = (p_i − y_i)·W, p = softmax(W·z_i + b), y_i one-hot. Nothing is mixed or augmented, batch normalisation and
dropout are in evaluation mode.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.backbone.arithmetic import Arithmetic
from pipeline.backbone.build import encode
from pipeline.backbone.image_classifier import ImageClassifier
from pipeline.seeds import derive, uniform

HEADER = "epoch,class,images,measured,accuracy,gradient\n"


def fixed_rows(labels: np.ndarray, ids: np.ndarray, *, per_class: int, seed: int) -> np.ndarray:
    """Return sorted positions of min(per_class, N_c) training images of every class: a function of (seed, id) alone."""
    draws = uniform(derive(seed, "diagnose"), ids, 1)[:, 0]
    order = np.lexsort((draws, labels))
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[rank < per_class])


def class_sums(
    network: ImageClassifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    arithmetic: Arithmetic,
) -> np.ndarray:
    """Return (3, C) float64 sums by class: correct predictions, ‖∂L/∂z‖, samples.

    Arguments:
        network: in evaluation mode.
        batches: (pixels, labels); a negative label stands for an image that could not be read.
    """
    sums = np.zeros((3, classes))
    for pixels, labels in batches:
        with torch.no_grad(), arithmetic.autocast(pixels.device):
            features = encode(network.model, pixels)
        norms, guess = gradient_norms(network, features.float(), labels.clamp(min=0))
        read = (labels >= 0).cpu().numpy()
        truth = labels.cpu().numpy()[read]
        columns = ((guess == labels).double(), norms.double(), torch.ones_like(norms, dtype=torch.float64))
        for row, values in zip(sums, columns, strict=True):
            row += np.bincount(truth, values.cpu().numpy()[read], classes)
    return sums


def gradient_norms(network: ImageClassifier, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (‖∂L_i/∂z_i‖₂ of cross-entropy (B,), predicted class (B,)) at features z (B, D)."""
    with torch.enable_grad():
        z = features.detach().requires_grad_()
        logits = network.score(z)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), labels, reduction="sum"), z)
    return gradient.norm(dim=1), logits.detach().argmax(1)


def lines(epoch: int, sums: np.ndarray, counts: np.ndarray) -> str:
    """Return the lines of diagnostics.csv for one epoch: one a class, accuracy in %, empty where no image could be read."""
    right, gradient, total = sums
    text = []
    for c, n in enumerate(total):
        values = f"{float(100 * right[c] / n)!r},{float(gradient[c] / n)!r}" if n else ","
        text.append(f"{epoch},{c},{counts[c]},{round(n)},{values}\n")
    return "".join(text)
