"""Measures of a classifier on unbalanced classes: pure functions of arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.longtail import class_groups


def group_means(class_accuracy: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
    """all, many, medium, few in %: means over the classes of a group of their accuracies (C,) in 0…1.

    Classes without a sample (nan) are left out; None where nothing is left.
    """

    def mean(mask: np.ndarray) -> float | None:
        measured = class_accuracy[mask & ~np.isnan(class_accuracy)]
        return float(100 * measured.mean()) if len(measured) else None

    return {"all": mean(np.ones(len(class_accuracy), dtype=bool))} | {
        g: mean(m) for g, m in class_groups(counts).items()
    }


def scarce(labels: np.ndarray, counts: np.ndarray, *, below: int = 30) -> list[str]:
    """Return remarks on groups with fewer than `below` test samples of these labels (N,), and on classes with one."""
    samples = np.bincount(labels, minlength=len(counts))
    remarks = []
    for group, mask in class_groups(counts).items():
        if 0 < samples[mask].sum() < below:
            rests = f"{group} rests on {samples[mask].sum()} test image(s) of {(samples[mask] > 0).sum()} class(es)"
            remarks.append(f"{rests}: its differences and their intervals mean little")
    if single := int((samples == 1).sum()):
        remarks.append(
            f"{single} class(es) have a single test image: how much other images of them would change is not in the intervals"
        )
    return remarks


def unmeasured(samples: np.ndarray, class_names: Sequence[str], split: str, *, most: int = 5) -> list[str]:
    """Return a remark on classes without a sample in a split; samples (C,): those it has of each class."""
    without = [name for name, n in zip(class_names, samples, strict=True) if not n]
    if not without:
        return []
    kind = f"{len(without)} class(es) without a {split} image"
    return [f"{kind}, left out of balanced {split} accuracy: {', '.join(without[:most])}"]


def sampling_error(class_accuracy: np.ndarray, total: np.ndarray) -> float:
    """Return the standard error in % of the mean over classes of their accuracy: √(Σ p(1−p)/(n−1)) / C.

    Arguments:
        class_accuracy: p (C,) in 0…1; classes without a sample (nan) are left out.
        total: n (C,) samples of each class. A single one has no variance to estimate and takes the mean of the others;
            where no class has two, the error is that of p = 1/2.
    """
    measured = (total > 0) & ~np.isnan(class_accuracy)
    p, n = class_accuracy[measured], total[measured]
    several = n > 1
    variance = np.divide(p * (1 - p), n - 1, out=np.zeros(len(p)), where=several)
    variance[~several] = (p * (1 - p))[several].mean() if several.any() else 0.25
    return float(100 * np.sqrt(variance.sum()) / max(measured.sum(), 1))


@dataclass(frozen=True, eq=False)
class Scores:
    """One classifier on one split.

    Arguments:
        correct, total: (C,) samples by true class.
        counts: (C,) training samples, which decide the groups.
        ece: expected calibration error in %.
        hit: (M,) whether each sample is classified correctly.
    """

    correct: np.ndarray
    total: np.ndarray
    counts: np.ndarray
    ece: float
    hit: np.ndarray

    @property
    def per_class(self) -> np.ndarray:
        """Accuracy (C,) in 0…1, nan for a class without a sample."""
        return np.where(self.total > 0, self.correct / np.maximum(self.total, 1), np.nan)

    @property
    def summary(self) -> dict[str, float | None]:
        """all, many, medium, few and ece, in %."""
        return group_means(self.per_class, self.counts) | {"ece": self.ece}

    @property
    def standard_error(self) -> float:
        """Return the standard error of `all`, in %: over other samples of the same classes, binomial in each class."""
        return sampling_error(self.per_class, self.total)


def scores(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> Scores:
    """Scores of logits (M, C) against labels (M,); counts (C,) training images decide the groups."""
    exponent = logits - logits.max(1, keepdims=True)
    return scores_of(logits.argmax(1), 1 / np.exp(exponent).sum(1), labels, counts)


def scores_of(predicted: np.ndarray, confidence: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> Scores:
    """Scores of predicted classes (M,) and their probabilities (M,)."""
    hit = predicted == labels
    classes = len(counts)
    return Scores(
        correct=np.bincount(labels[hit], minlength=classes),
        total=np.bincount(labels, minlength=classes),
        counts=np.asarray(counts),
        ece=expected_calibration_error(confidence, hit),
        hit=hit,
    )


def confidence_bins(
    confidence: np.ndarray, hit: np.ndarray, *, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples, right ones, sum of confidences), each (bins,), of equally wide bins of confidence.

    confidence (M,): probability of the predicted class; hit (M,): whether it was right. A bin holds its upper edge.
    """
    bin_of = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(int) - 1, 0, bins - 1)
    return np.bincount(bin_of, minlength=bins), np.bincount(bin_of, hit, bins), np.bincount(bin_of, confidence, bins)


def expected_calibration_error(confidence: np.ndarray, hit: np.ndarray, *, bins: int = 15) -> float:
    """ECE in %: |accuracy − confidence| of the bins of confidence_bins, weighted by their samples (Guo et al., ICML
    2017).
    """
    _, right, sure = confidence_bins(confidence, hit, bins=bins)
    return float(100 * np.abs(right - sure).sum() / max(len(hit), 1))


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts (C, C): row the true class, column the predicted one."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
