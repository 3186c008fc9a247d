"""A classifier for an encoder that has none for these classes: multinomial logistic regression on its frozen features."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.linear.logistic import logistic_regression

L2 = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
UNCHOSEN = 3e-3  # L2 where there is nothing to choose it on
FOLDS = 3
TOLERANCE = 1e-6  # largest entry of the gradient: equal up to rounding whatever the blocks
RARER = 20.0  # nats by which a class without samples lies below the rarest of the others
SETTINGS = (
    "multinomial logistic regression on the clean, standardised training features, L2 chosen among "
    f"{', '.join(f'{l2:g}' for l2 in L2)}"
)

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe.

    Arguments:
        weight, bias: (C, D) and (C,) float32, for features as they are.
        l2: the chosen strength of the penalty l2/2 · ‖W‖² beside the mean loss of standardised features.
        chosen_on: `validation`, `folds` of the training samples, or `nothing` where there were no other samples to choose on.
        accuracies: l2 → mean over classes of the accuracy there in %; empty where nothing was compared.
    """

    weight: np.ndarray
    bias: np.ndarray
    l2: float
    chosen_on: str
    accuracies: dict[float, float]

    def to_dict(self) -> dict[str, object]:
        """Return the choice, JSON-ready."""
        tried = {f"{l2:g}": round(accuracy, 2) for l2, accuracy in self.accuracies.items()}
        return {"l2": self.l2, "chosen_on": self.chosen_on, "accuracies": tried}

    def __str__(self) -> str:
        if not self.accuracies:
            return f"multinomial logistic regression, L2 {self.l2:g}, not chosen: there were no samples to choose on"
        tried = ", ".join(f"{l2:g}: {accuracy:.1f}" for l2, accuracy in self.accuracies.items())
        return f"multinomial logistic regression, L2 {self.l2:g}, chosen on {self.chosen_on} (accuracy in % by L2: {tried})"


def fit_probe(
    blocks: Blocks,
    *,
    classes: int,
    width: int,
    validation: Blocks | None = None,
    l2: float | None = None,
    resident: bool = True,
    stop: Callable[[], object] = lambda: None,
) -> Probe:
    """Return the linear probe: deterministic, no seed, no learning rate.

    The loss is mean cross-entropy + L2/2 · ‖W‖² of standardised features. L2 is the one with the highest mean of the classes'
    accuracies on the validation samples, of several the one with the lower loss there; without validation samples, on FOLDS
    folds of the training samples, each predicted by a fit without it.

    Arguments:
        blocks, validation: yield all rows at each call, as (features (n, D) float32, labels (n,)) on the device that computes.
        l2: the penalty, which then is not chosen.
        resident: hold the standardised training features in memory; False reads the blocks for every evaluation.
        stop: is called before every evaluation and may raise.
    """

    def fits(kept: Blocks, l2s: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        return _fits(kept, l2s, classes=classes, width=width, resident=resident, stop=stop)

    scores, chosen_on, heads = ProbeScores(classes), "folds", None
    if l2 is not None:
        weight, bias = fits(blocks, (l2,))
        return _probe(weight[0], bias[0], l2, "nothing", {})
    if validation is not None:
        chosen_on, heads = "validation", fits(blocks, L2)
        for features, labels in validation():
            scores.add(features, labels, *heads)
    else:
        folds = _folds(torch.cat([labels.cpu() for _, labels in blocks()]), classes)
        for fold in range(FOLDS if (folds >= 0).any() else 0):
            parts = fits(lambda fold=fold: _selected(blocks, folds != fold), L2)  # type: ignore[misc]
            for features, labels in _selected(blocks, folds == fold):
                scores.add(features, labels, *parts)
    if not scores.samples:
        weight, bias = fits(blocks, (UNCHOSEN,))
        return _probe(weight[0], bias[0], UNCHOSEN, "nothing", {})
    best = scores.best()
    weight, bias = (part[best] for part in heads) if heads else (part[0] for part in fits(blocks, (L2[best],)))
    return _probe(weight, bias, L2[best], chosen_on, scores.accuracies())


class ProbeScores:
    """Hits and losses of the heads of all L2, by class."""

    def __init__(self, classes: int):
        self.number = torch.zeros(classes, dtype=torch.float64)
        self.hits = torch.zeros(len(L2), classes, dtype=torch.float64)
        self.losses = torch.zeros(len(L2), dtype=torch.float64)

    @property
    def samples(self) -> int:
        """Samples that were scored."""
        return int(self.number.sum())

    def add(self, features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Count the answers of heads (L, C, D), (L, C) for samples (n, D), (n,)."""
        truth = labels.cpu()
        self.number += torch.bincount(truth, minlength=len(self.number))
        for i, (w, b) in enumerate(zip(weight, bias, strict=True)):
            logits = features.float() @ w.T.float() + b.float()
            right = (logits.argmax(1) == labels).cpu()
            self.hits[i] += torch.bincount(truth[right], minlength=len(self.number))
            self.losses[i] += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))

    def accuracies(self) -> dict[float, float]:
        """Return L2 → mean in % over the classes that have samples of their accuracy."""
        measured = self.number > 0
        means = (self.hits[:, measured] / self.number[measured]).mean(1)
        return {l2: 100 * float(mean) for l2, mean in zip(L2, means, strict=True)}

    def best(self) -> int:
        """Return the position of the L2 with the highest accuracy, of several the one with the lowest loss."""
        accuracies = list(self.accuracies().values())
        return min(range(len(L2)), key=lambda i: (-round(accuracies[i], 6), float(self.losses[i])))


def _fits(
    blocks: Blocks, l2s: tuple[float, ...], *, classes: int, width: int, resident: bool, stop: Callable[[], object]
) -> tuple[Tensor, Tensor]:
    """Return the regressions (L, C, D), (L, C) in float64; a class without samples is never the answer."""
    counts = sum((torch.bincount(y, minlength=classes) for _, y in blocks()), torch.zeros((), dtype=torch.long))
    present = counts.nonzero().flatten()
    number = torch.full((classes,), -1, device=counts.device).scatter(
        0, present, torch.arange(len(present)).to(present)
    )

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels in blocks():
            yield features, number[labels]

    def checked(tensor: Tensor) -> Tensor:
        stop()
        return tensor

    heads = logistic_regression(
        samples,
        counts[present],
        width,
        rhos=(0.0,),
        l2s=l2s,
        prior=False,
        resident=resident,
        reduce=checked,
        tolerance=TOLERANCE,
    )
    weight = heads.weight[0].mean(1, keepdim=True).repeat(1, classes, 1)
    bias = heads.bias[0].amin(1, keepdim=True).repeat(1, classes) - RARER
    weight[:, present], bias[:, present] = heads.weight[0], heads.bias[0]
    return weight, bias


def _folds(labels: Tensor, classes: int) -> Tensor:
    """Return the fold of each sample: by turns within its class, −1 for a class of one, which is always trained on."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels, minlength=classes)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    folds = torch.empty_like(labels)
    folds[order] = torch.where(counts[labels[order]] > 1, rank % FOLDS, -1)
    return folds


def _selected(blocks: Blocks, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the samples of the blocks for which a mask (N,) over all of them is true."""
    start = 0
    for features, labels in blocks():
        rows = mask[start : start + len(labels)].to(labels.device)
        start += len(labels)
        if rows.any():
            yield features[rows], labels[rows]


def _probe(weight: Tensor, bias: Tensor, l2: float, chosen_on: str, accuracies: dict[float, float]) -> Probe:
    return Probe(weight.float().cpu().numpy(), bias.float().cpu().numpy(), l2, chosen_on, accuracies)
