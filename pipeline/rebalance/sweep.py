"""All heads of one run: fitted together, scored on what may choose among them. The test split does not come in here."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.config import RebalanceConfig
from pipeline.errors import PipelineError
from pipeline.metrics import Scores, scores_of
from pipeline.rebalance.engine import Head, fit_heads
from pipeline.rebalance.features import Features, Split
from pipeline.rebalance.folds import stratified_folds
from pipeline.rebalance.methods import BASELINE, Setting, head_of, schedule_of
from pipeline.rebalance.selection import Choice, select

LOGITS_AT_ONCE = 1 << 24
Key = tuple[Setting, int | None]  # the stage-1 head has no seed
Fitted = dict[Key, tuple[np.ndarray, np.ndarray]]
Scored = dict[Key, Scores]


@dataclass
class Sweep:
    """Grows by `add`; heads: (weight (C, D), bias (C,)) of every setting and seed.

    scored: by split, `val` where there is one and `kfold` (out-of-fold training samples) where folds are asked for.
    """

    features: Features
    val: Split | None
    config: RebalanceConfig
    device: torch.device
    folds: bool
    heads: Fitted = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    fit_seconds: float = 0.0

    def __post_init__(self):
        self.heads[BASELINE, None] = (self.features.weight, self.features.bias)
        self._score(self.heads)

    def add(self, settings: Sequence[Setting]) -> None:
        """Fits and scores the settings that are not there yet, in every batch order."""
        new = [s for s in dict.fromkeys(settings) if s != BASELINE and (s, self.config.seeds[0]) not in self.heads]
        if new:
            fitted = self._fit(new, None)
            self.heads |= fitted
            self._score(fitted)

    def choose(self, settings: Sequence[Setting], split: str) -> Choice:
        """The best of the settings on a split that has been scored."""
        found = self.scored[split]
        each = [[found[s, seed if s != BASELINE else None] for seed in self.config.seeds] for s in settings]
        means = np.array([[scores.summary["all"] for scores in of] for of in each], np.float64)
        errors = [float(np.mean([s.standard_error for s in of])) for of in each]
        return select(means, sampling_error=errors, methods=[s.method for s in settings])

    def _fit(self, settings: Sequence[Setting], rows: np.ndarray | None) -> Fitted:
        started = time.perf_counter()
        heads: list[Head] = [head_of(s, self.config) for s in settings]
        seeds = self.config.seeds
        schedule = schedule_of(self.config)
        weight, bias = fit_heads(self.features, heads, seeds=seeds, schedule=schedule, rows=rows, device=self.device)
        self.fit_seconds += time.perf_counter() - started
        finite = np.isfinite(weight).all((0, 2, 3)) & np.isfinite(bias).all((0, 2))
        if not finite.all():
            lost = ", ".join(str(s) for s, good in zip(settings, finite, strict=True) if not good)
            raise PipelineError(f"{lost}: fitting diverged; lower the learning rate: --lr {self.config.lr / 10:g}")
        return {(s, seed): (weight[i, k], bias[i, k]) for k, s in enumerate(settings) for i, seed in enumerate(seeds)}

    def _score(self, fitted: Fitted) -> None:
        counts = self.features.counts
        if self.val is not None:
            self.scored.setdefault("val", {}).update(score(fitted, self.val, counts, self.device))
        if self.folds:
            self.scored.setdefault("kfold", {}).update(self._out_of_fold(list(fitted)))

    def _out_of_fold(self, keys: Sequence[Key]) -> Scored:
        """Scores of every training sample by a head that was fitted without it."""
        features, labels = self.features.views[0], self.features.labels
        fold = stratified_folds(labels)
        settings = [s for s in dict.fromkeys(setting for setting, _ in keys) if s != BASELINE]
        answers: dict[Key, list[tuple[np.ndarray, np.ndarray]]] = {key: [] for key in keys}
        held_out = [np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])]
        for rows in held_out:
            fitted: Fitted = {(BASELINE, None): self.heads[BASELINE, None]}
            if settings:
                fitted |= self._fit(settings, np.setdiff1d(np.arange(len(labels)), rows))
            inputs = _inputs(features[rows], self.device)
            for key in keys:
                answers[key].append(predict(*fitted[key], inputs))
        seen = labels[np.concatenate(held_out)]
        return {
            key: scores_of(
                np.concatenate([p for p, _ in a]), np.concatenate([c for _, c in a]), seen, self.features.counts
            )
            for key, a in answers.items()
        }


def score(fitted: Fitted, split: Split, counts: np.ndarray, device: torch.device) -> Scored:
    """Scores of every head on a split."""
    inputs = _inputs(split.features, device)
    return {key: scores_of(*predict(*head, inputs), split.labels, counts) for key, head in fitted.items()}


@torch.no_grad()
def predict(weight: np.ndarray, bias: np.ndarray, inputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(class (M,), its probability (M,)) of inputs (M, D) by a head (C, D), (C,)."""
    w, b = (torch.as_tensor(a, device=inputs.device, dtype=inputs.dtype) for a in (weight, bias))
    classes, probabilities = [], []
    for rows in inputs.split(max(1, LOGITS_AT_ONCE // len(w))):
        logits = torch.addmm(b, rows, w.T)
        top = logits.max(1)
        classes.append(top.indices)
        probabilities.append((top.values - logits.logsumexp(1)).exp())
    return torch.cat(classes).cpu().numpy(), torch.cat(probabilities).cpu().numpy()


def _inputs(features: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(features).to(device=device, dtype=torch.float32)
