"""All heads of one run: fitted together and scored on what selects among them, which the test split is not."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks
from pipeline.errors import PipelineError
from pipeline.metrics import Scores, scores_of
from pipeline.rebalance.candidates import ENGINE, head_of, is_trained, schedule_of
from pipeline.rebalance.engine.features import Features, FeatureSplit
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.folds import stratified_folds
from pipeline.rebalance.methods import RIVALS, Free
from pipeline.rebalance.methods.fit import Trial, fit, solve
from pipeline.rebalance.methods.iwb_la import with_means
from pipeline.rebalance.methods.training_free import nearest_mean
from pipeline.results.head_id import BASELINE, HeadId
from pipeline.results.heads import Linear, Scorer, is_finite, predict
from pipeline.results.selection import Choice, select

NEAREST_MEAN = Free("ncm", nearest_mean)
Key = tuple[HeadId, int | None]  # what is not trained has no seed
Fitted = dict[Key, Scorer]
Scored = dict[Key, Scores]


@dataclass
class Sweep:
    """The fitted heads of every setting and seed; `add` fits more.

    Arguments:
        ranks: processes that share the work; each has the same sweep and gets the same heads.
        folds: score out-of-fold training samples too.
        scored: scores by split: `val` where there is one, `kfold` with folds.
        diverged: trials at whose learning rate fitting diverged; they have no heads and no scores.
    """

    features: Features
    val: FeatureSplit | None
    config: RebalanceConfig
    ranks: Ranks
    folds: bool
    heads: Fitted = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    diverged: set[HeadId] = field(default_factory=set)
    fit_seconds: float = 0.0
    fitted: int = 0

    def __post_init__(self):
        self.heads[BASELINE, None] = Linear(self.features.weight, self.features.bias)
        self._score(self.heads)

    def seeds_of(self, setting: HeadId) -> Sequence[int | None]:
        return self.config.seeds if is_trained(setting) else (None,)

    def add(self, settings: Sequence[HeadId]) -> None:
        """Fit and score the settings that are not fitted yet, in every batch order."""
        new = [s for s in dict.fromkeys(settings) if (s, self.seeds_of(s)[0]) not in self.heads]
        if new:
            fitted = self._fit(new, None)
            self.heads |= fitted
            self.fitted += len(fitted)
            self._score(fitted)

    def keep_only(self, settings: Collection[HeadId], *, trials: Sequence[HeadId]) -> None:
        """Drop the heads and scores of all trials that are not among the settings."""
        dropped = set(trials) - set(settings)
        self.heads = {key: head for key, head in self.heads.items() if key[0] not in dropped}
        for split, rows in self.scored.items():
            self.scored[split] = {key: scores for key, scores in rows.items() if key[0] not in dropped}

    def choose(self, settings: Sequence[HeadId], split: str) -> Choice:
        """Return the choice among the settings by their scores on a split."""
        scored = self.scored[split]
        seeds = self.config.seeds
        scores = [[scored[s, seed if is_trained(s) else None] for seed in seeds] for s in settings]
        means = np.array([[single.summary["all"] for single in of_seeds] for of_seeds in scores], np.float64)
        errors = [float(np.mean([single.standard_error for single in of_seeds])) for of_seeds in scores]
        return select(means, sampling_error=errors, methods=[s.method for s in settings])

    def _fit(self, settings: Sequence[HeadId], rows: np.ndarray | None) -> Fitted:
        started = time.perf_counter()
        shared = [s for s in settings if s.method in ENGINE and self.config.spread == "rows"]
        spread = [s for s in settings if s not in shared]
        share = spread[self.ranks.rank :: self.ranks.world]
        parts = self.ranks.gathered(self.ranks.together(lambda: self._fit_here(share, rows, None)))
        parts += [self._fit_here(shared, rows, self.ranks)]
        heads = {key: head for part in parts for key, head in part.items()}
        fitted = {(s, seed): heads[s, seed] for s in settings for seed in self.seeds_of(s)}
        self.fit_seconds += time.perf_counter() - started
        diverged = dict.fromkeys(s for (s, _), head in fitted.items() if not is_finite(head))
        if names := [str(s) for s in diverged if s.lr is None]:
            raise PipelineError(
                f"{', '.join(names)}: fitting diverged; lower the learning rate: --lr {self.config.lr / 10:g}"
            )
        self.diverged.update(diverged)
        return {key: head for key, head in fitted.items() if key[0] not in diverged}

    def _fit_here(self, settings: Sequence[HeadId], rows: np.ndarray | None, ranks: Ranks | None) -> Fitted:
        """Return the heads of the settings, fitted by this rank alone or by all ranks that share their batches."""
        fitted: Fitted = {}
        schedules: dict[Schedule, list[HeadId]] = {}  # the engine fits what has one schedule
        rivals: dict[str, list[HeadId]] = {}  # a rival brings all of its trials
        for s in settings:
            if s.method in ENGINE:
                schedules.setdefault(schedule_of(self.config, lr=s.lr, method=s.method), []).append(s)
            else:
                rivals.setdefault(s.method, []).append(s)
        for schedule, group in schedules.items():
            fitted |= self._fit_engine(schedule, group, rows, ranks)
        for rival, group in rivals.items():
            fitted |= self._fit_rival(rival, group, rows)
        return fitted

    def _fit_engine(
        self, schedule: Schedule, settings: Sequence[HeadId], rows: np.ndarray | None, ranks: Ranks | None
    ) -> Fitted:
        heads: list[Head] = list(dict.fromkeys(head_of(s, self.config) for s in settings))
        seeds, device = self.config.seeds, self.ranks.device
        weight, bias = fit_heads(
            self.features, heads, seeds=seeds, schedule=schedule, rows=rows, device=device, ranks=ranks
        )
        shares = [dict(s.values).get("means", 0.0) for s in settings]
        means = solve(NEAREST_MEAN, [{}], self.features, rows=rows, device=device)[0] if any(shares) else None
        fitted: Fitted = {}
        for s, share in zip(settings, shares, strict=True):
            k = heads.index(head_of(s, self.config))
            for i, seed in enumerate(seeds):
                head = weight[i, k], bias[i, k]
                if means is not None and share:
                    head = with_means(*head, means.weight, means.bias, float(share))
                fitted[s, seed] = Linear(*head)
        return fitted

    def _fit_rival(self, method: str, settings: Sequence[HeadId], rows: np.ndarray | None) -> Fitted:
        rule, config = RIVALS[method], self.config
        if isinstance(rule, Free):
            solved = solve(rule, [dict(s.values) for s in settings], self.features, rows=rows, device=self.ranks.device)
            return {(s, None): head for s, head in zip(settings, solved, strict=True)}
        heads = fit(
            rule,
            [Trial(config.lr if s.lr is None else s.lr, dict(s.values)) for s in settings],
            self.features,
            seeds=config.seeds,
            schedule=schedule_of(config),
            sampling=config.sampling,
            weighting=config.weighting,
            rows=rows,
            device=self.ranks.device,
        )
        return {
            (s, seed): head
            for s, of_seeds in zip(settings, heads, strict=True)
            for seed, head in zip(config.seeds, of_seeds, strict=True)
        }

    def _score(self, fitted: Fitted) -> None:
        counts = self.features.counts
        if self.val is not None:
            self.scored.setdefault("val", {}).update(score(fitted, self.val, counts, self.ranks.device))
        if self.folds:
            self.scored.setdefault("kfold", {}).update(self._out_of_fold(list(fitted)))

    def _out_of_fold(self, keys: Sequence[Key]) -> Scored:
        """Return scores on every training sample by heads that were fitted without it."""
        features, labels = self.features.views[0], self.features.labels
        fold = stratified_folds(labels)
        settings = [s for s in dict.fromkeys(setting for setting, _ in keys) if s != BASELINE]
        answers: dict[Key, list[tuple[np.ndarray, np.ndarray]]] = {key: [] for key in keys}
        held_out = [np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])]
        for rows in held_out:
            fitted: Fitted = {(BASELINE, None): self.heads[BASELINE, None]}
            if settings:
                fitted |= self._fit(settings, np.setdiff1d(np.arange(len(labels)), rows))
            inputs = _inputs(features[rows], self.ranks.device)
            for key in keys:
                if key[0] not in self.diverged:
                    answers[key].append(predict(fitted[key], inputs))
        held_out_labels = labels[np.concatenate(held_out)]
        return {
            key: scores_of(
                np.concatenate([p for p, _ in a]),
                np.concatenate([c for _, c in a]),
                held_out_labels,
                self.features.counts,
            )
            for key, a in answers.items()
            if key[0] not in self.diverged
        }


def score(fitted: Fitted, split: FeatureSplit, counts: np.ndarray, device: torch.device) -> Scored:
    """Return the scores of every head on a split."""
    inputs = _inputs(split.features, device)
    return {key: scores_of(*predict(head, inputs), split.labels, counts) for key, head in fitted.items()}


def _inputs(features: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(features).to(device=device, dtype=torch.float32)
