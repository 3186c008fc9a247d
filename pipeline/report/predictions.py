"""Predictions of the kept heads on the test samples, computed again from the store for figures that need them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.study import PRODUCTS_FOR_A_FIGURE, Backbone, Study
from pipeline.results.head_id import BASELINE, HeadId
from pipeline.results.heads import predict_array


@dataclass(frozen=True, eq=False)
class Answers:
    """The predictions of one head on the M test samples that have features.

    Arguments:
        labels, predicted: (M,) class numbers.
        confidence: (M,) probability of the predicted class, in 0…1.
    """

    backbone: str
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        return self.predicted == self.labels


@dataclass(frozen=True, eq=False)
class ComparedAnswers:
    """The same test samples before and after: what stage 2 started from, and the selected heads of every backbone."""

    start: Sequence[Answers]
    selected: Sequence[Answers]

    def mean(self, answers: Sequence[Answers], measured: Sequence[np.ndarray | float]) -> np.ndarray:
        """Mean over backbones of the means over their heads, as in the table; nan only where all are."""
        names = [head.backbone for head in answers]
        backbone_means = [
            _mean([m for n, m in zip(names, measured, strict=True) if n == name]) for name in dict.fromkeys(names)
        ]
        return _mean(backbone_means)


def read_compared(study: Study) -> ComparedAnswers | None:
    """Before and after on test; None where a backbone has no test sample, a head was not kept, or it would take minutes."""
    start_answers, selected_answers = [], []
    for backbone in study.backbones:
        pair = answers(backbone, BASELINE), answers(backbone, backbone.selected)
        if not all(pair):
            return None
        start_answers += pair[0]
        selected_answers += pair[1]
    return ComparedAnswers(start_answers, selected_answers)


def answers(backbone: Backbone, kind: HeadId, split: str = "test") -> list[Answers]:
    """One for every head of a kind that was kept, of as many batch orders as take seconds; linear or not."""
    store = backbone.store
    if split not in store.splits or not store.valid(split).any():
        return []
    heads = [head for head_id, head in backbone.scorers if kind.matches(head_id)]
    products = store.rows(split) * sum(head.arrays[0].size for head in heads[:1])
    heads = heads[: PRODUCTS_FOR_A_FIGURE // max(products, 1)]
    valid, parts = store.valid(split), []
    for chunk in store.chunks(split) if heads else ():
        features = store.read_chunk(chunk)[valid[chunk.start : chunk.stop]].astype(np.float32)
        parts.append([predict_array(head, features) for head in heads])
    labels = store.labels(split)[valid]
    return [
        Answers(backbone.name, labels, np.concatenate([p for p, _ in by_head]), np.concatenate([c for _, c in by_head]))
        for by_head in zip(*parts, strict=True)
    ]


def _mean(values: Sequence[np.ndarray | float]) -> np.ndarray:
    """Mean over the first axis of what is not nan; nan where nothing is left."""
    stacked = np.asarray(values, np.float64)
    present = ~np.isnan(stacked)
    total, number = np.where(present, stacked, 0).sum(0), present.sum(0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
