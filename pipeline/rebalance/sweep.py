"""All heads of one run: fitted together and scored on what selects among them, which the test split is not."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch

from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks
from pipeline.errors import PipelineError
from pipeline.metrics import Scores, scores, scores_of
from pipeline.probe import fit_probe
from pipeline.rebalance.candidates import ENGINE, head_of, is_trained, schedule_of
from pipeline.rebalance.engine.features import Features, FeatureSplit
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.folds import stratified_folds
from pipeline.rebalance.methods import RIVALS, Free
from pipeline.rebalance.methods.fit import Blocks, Trial, fit, solve
from pipeline.rebalance.methods.iwb_la import with_means
from pipeline.rebalance.methods.training_free import nearest_mean
from pipeline.results.head_id import BASELINE, HeadId
from pipeline.results.heads import Linear, Scorer, is_finite, predict
from pipeline.results.selection import Choice, select

NEAREST_MEAN = Free("ncm", nearest_mean)
LOGITS_KEPT = 1 << 22  # most logits of one head by which it is compared and mixed with others
Key = tuple[HeadId, int | None]  # what is not trained has no seed
Fitted = dict[Key, Scorer]
Scored = dict[Key, Scores]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Training samples that heads are fitted on.

    Arguments:
        features: of all samples, and the head to start from.
        rows: (M,) of those that are fitted on, None for all.
        samples: their clean features in blocks, and what methods have computed from them.
    """

    features: Features
    rows: np.ndarray | None
    samples: Blocks


@dataclass
class Sweep:
    """The fitted heads of every setting and seed; `add` fits more.

    Arguments:
        ranks: processes that share the work; each has the same sweep and gets the same heads.
        folds: score out-of-fold training samples too.
        probe: the heads start from a linear probe, which is fitted anew without the samples of a fold.
        scored: scores by split: `val` where there is one, `kfold` with folds.
        fold_logits: out-of-fold logits (M, C) in float16 of the samples `fold_rows`.
        diverged: trials at whose learning rate fitting diverged; they have no heads and no scores.
    """

    features: Features
    val: FeatureSplit | None
    config: RebalanceConfig
    ranks: Ranks
    folds: bool
    probe: bool = False
    heads: Fitted = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    diverged: set[HeadId] = field(default_factory=set)
    fit_seconds: float = 0.0
    fitted: int = 0
    fold_logits: dict[Key, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        self.training_set = TrainingSet(self.features, None, Blocks(self.features, None, self.ranks.device))
        self.heads[BASELINE, None] = Linear(self.features.weight, self.features.bias)
        self._score(self.heads)

    def seeds_of(self, setting: HeadId) -> Sequence[int | None]:
        return self.config.seeds if is_trained(setting) else (None,)

    def add(self, settings: Sequence[HeadId], *, seeds: Sequence[int] | None = None) -> None:
        """Fit and score the settings that are not fitted yet.

        Arguments:
            seeds: of the batch orders, by default all.
        """
        missing: dict[tuple[int | None, ...], list[HeadId]] = {}
        for setting in dict.fromkeys(settings):
            wanted = self.seeds_of(setting) if seeds is None or not is_trained(setting) else seeds
            new = tuple(seed for seed in wanted if (setting, seed) not in self.heads)
            if new and setting not in self.diverged:
                missing.setdefault(new, []).append(setting)
        for new_seeds, group in missing.items():
            fitted = self._fit(group, self.training_set, new_seeds)
            self.heads |= fitted
            self.fitted += len(fitted)
            self._score(fitted)

    def add_head(self, setting: HeadId, head: Scorer, out_of_fold: np.ndarray | None) -> None:
        """Add a head that was made of others, and score it.

        Arguments:
            out_of_fold: its logits (M, C) of the samples `fold_rows`; None without folds.
        """
        self.heads[setting, None] = head
        if out_of_fold is not None:
            labels = self.features.labels[self.fold_rows]
            self.scored["kfold"][setting, None] = scores(out_of_fold, labels, self.features.counts)
        self._score({(setting, None): head}, folds=False)

    def keep_only(self, settings: Collection[HeadId], *, trials: Sequence[HeadId]) -> None:
        """Drop the heads and scores of all trials that are not among the settings."""
        dropped = set(trials) - set(settings)
        self.heads = {key: head for key, head in self.heads.items() if key[0] not in dropped}
        self.fold_logits = {key: logits for key, logits in self.fold_logits.items() if key[0] not in dropped}
        for split, rows in self.scored.items():
            self.scored[split] = {key: row for key, row in rows.items() if key[0] not in dropped}

    def choose(
        self,
        settings: Sequence[HeadId],
        split: str,
        *,
        seeds: Sequence[int] | None = None,
        preferred: HeadId | None = None,
    ) -> Choice:
        """Return the choice among the settings by their scores on a split.

        Arguments:
            seeds: batch orders that were fitted, by default all.
            preferred: a setting that is taken where it is within one standard error of the best.
        """
        scored = self.scored[split]
        seeds = self.config.seeds if seeds is None else seeds
        of_settings = [[scored[s, seed if is_trained(s) else None] for seed in seeds] for s in settings]
        means = np.array([[single.summary["all"] for single in of_seeds] for of_seeds in of_settings], np.float64)
        errors = [float(np.mean([single.standard_error for single in of_seeds])) for of_seeds in of_settings]
        index = None if preferred is None else list(settings).index(preferred)
        return select(means, sampling_error=errors, methods=[s.method for s in settings], preferred=index)

    @cached_property
    def held_out(self) -> list[tuple[np.ndarray, TrainingSet]]:
        """The samples (M,) of each fold, and the training set of all others."""
        labels, classes = self.features.labels, len(self.features.counts)
        fold, parts, l2 = stratified_folds(labels), [], None  # the first fold's L2 serves all
        for rows in [np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])]:
            others = np.setdiff1d(np.arange(len(labels)), rows)
            features, samples = self.features, Blocks(self.features, others, self.ranks.device)
            if self.probe:
                blocks = partial(single_precision, samples)
                probe = fit_probe(blocks, classes=classes, width=features.weight.shape[1], l2=l2)
                l2, features = probe.l2, replace(features, weight=probe.weight, bias=probe.bias)
            parts.append((rows, TrainingSet(features, others, samples)))
        return parts

    @cached_property
    def fold_rows(self) -> np.ndarray:
        """Training samples (M,) that have out-of-fold logits, in the order in which folds are held out."""
        rows = np.concatenate([rows for rows, _ in self.held_out])
        return rows[evenly(self.features.labels[rows], LOGITS_KEPT // len(self.features.counts))]

    @cached_property
    def val_rows(self) -> FeatureSplit:
        """Validation samples (M, D) whose logits compare and mix heads."""
        assert self.val is not None
        rows = evenly(self.val.labels, LOGITS_KEPT // len(self.features.counts))
        return FeatureSplit(self.val.features[rows], self.val.labels[rows])

    def summaries(self, setting: HeadId, split: str) -> list[dict[str, float | None]]:
        """Return all, many, medium, few and ece in % of a setting on a split, one for each batch order that is fitted."""
        if setting in self.diverged:
            return []
        return [row.summary for (key, _), row in self.scored[split].items() if key == setting]

    def mean_layer(self, setting: HeadId) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight (C, D) and bias (C,) of a linear setting, the mean over its batch orders."""
        layers = [head.arrays for (key, _), head in self.heads.items() if key == setting]
        weight, bias = (np.mean([layer[i] for layer in layers], axis=0) for i in range(2))
        return torch.from_numpy(weight), torch.from_numpy(bias)

    def labels_chosen_on(self, split: str) -> np.ndarray:
        """Return the labels (M,) of all samples that scores on a split are made from."""
        if split == "val" and self.val is not None:
            return self.val.labels
        return self.features.labels[np.concatenate([rows for rows, _ in self.held_out])]

    def labels_of(self, split: str) -> np.ndarray:
        """Return the labels (M,) of the samples of `logits`."""
        return self.val_rows.labels if split == "val" else self.features.labels[self.fold_rows]

    def logits(self, setting: HeadId, split: str) -> torch.Tensor:
        """Return logits (M, C) of a setting on the samples it is chosen on, the mean over the batch orders that are fitted."""
        keys = [key for key in self.heads if key[0] == setting]
        if split == "kfold":
            return torch.from_numpy(np.mean([self.fold_logits[key].astype(np.float32) for key in keys], axis=0))
        inputs = _inputs(self.val_rows.features, torch.device("cpu"))
        return torch.stack([self.heads[key].logits(inputs) for key in keys]).mean(0)

    def _fit(self, settings: Sequence[HeadId], training_set: TrainingSet, seeds: Sequence[int | None]) -> Fitted:
        """Return the heads of the settings in these batch orders."""
        started = time.perf_counter()
        shared = [s for s in settings if s.method in ENGINE and self.config.spread == "rows"]
        spread = [s for s in settings if s not in shared]
        share = spread[self.ranks.rank :: self.ranks.world]
        orders = [seed for seed in seeds if seed is not None]
        part = self.ranks.together(lambda: self._fit_here(share, training_set, orders, None))
        parts = [*self.ranks.gathered(part), self._fit_here(shared, training_set, orders, self.ranks)]
        heads = {key: head for part in parts for key, head in part.items()}
        fitted = {(s, seed): heads[s, seed] for s in settings for seed in (orders if is_trained(s) else (None,))}
        self.fit_seconds += time.perf_counter() - started
        diverged = dict.fromkeys(s for (s, _), head in fitted.items() if not is_finite(head))
        if names := [str(s) for s in diverged if s.lr is None]:
            raise PipelineError(
                f"{', '.join(names)}: fitting diverged; lower the learning rate: --lr {self.config.lr / 10:g}"
            )
        self.diverged.update(diverged)
        return {key: head for key, head in fitted.items() if key[0] not in diverged}

    def _fit_here(
        self, settings: Sequence[HeadId], training_set: TrainingSet, seeds: Sequence[int], ranks: Ranks | None
    ) -> Fitted:
        """Return the heads of the settings, fitted by this rank alone or by all ranks that share their batches."""
        fitted: Fitted = {}
        schedules: dict[Schedule, list[HeadId]] = {}  # the engine fits what has one schedule
        rivals: dict[str, list[HeadId]] = {}  # a rival brings all of its trials
        for s in settings:
            if s.method in ENGINE:
                schedules.setdefault(schedule_of(self.config, s), []).append(s)
            else:
                rivals.setdefault(s.method, []).append(s)
        for schedule, group in schedules.items():
            fitted |= self._fit_engine(schedule, group, training_set, seeds, ranks)
        for rival, group in rivals.items():
            fitted |= self._fit_rival(rival, group, training_set, seeds)
        return fitted

    def _fit_engine(
        self,
        schedule: Schedule,
        settings: Sequence[HeadId],
        training_set: TrainingSet,
        seeds: Sequence[int],
        ranks: Ranks | None,
    ) -> Fitted:
        heads: list[Head] = list(dict.fromkeys(head_of(s, self.config) for s in settings))
        features, rows, device = training_set.features, training_set.rows, self.ranks.device
        weight, bias = fit_heads(features, heads, seeds=seeds, schedule=schedule, rows=rows, device=device, ranks=ranks)
        shares = [dict(s.values).get("means", 0.0) for s in settings]
        means = solve(NEAREST_MEAN, [{}], features, rows=rows, device=device)[0] if any(shares) else None
        fitted: Fitted = {}
        for s, share in zip(settings, shares, strict=True):
            k = heads.index(head_of(s, self.config))
            for i, seed in enumerate(seeds):
                head = weight[i, k], bias[i, k]
                if means is not None and share:
                    head = with_means(*head, means.weight, means.bias, float(share))
                fitted[s, seed] = Linear(*head)
        return fitted

    def _fit_rival(
        self, method: str, settings: Sequence[HeadId], training_set: TrainingSet, seeds: Sequence[int]
    ) -> Fitted:
        rule, config = RIVALS[method], self.config
        features, rows, samples = training_set.features, training_set.rows, training_set.samples
        if isinstance(rule, Free):
            grid = [dict(s.values) for s in settings]
            solved = solve(rule, grid, features, rows=rows, device=self.ranks.device, samples=samples)
            return {(s, None): head for s, head in zip(settings, solved, strict=True)}
        heads = fit(
            rule,
            [Trial(config.lr if s.lr is None else s.lr, dict(s.values)) for s in settings],
            features,
            seeds=seeds,
            schedule=schedule_of(config),
            sampling=config.sampling,
            weighting=config.weighting,
            rows=rows,
            device=self.ranks.device,
        )
        return {
            (s, seed): head
            for s, of_seeds in zip(settings, heads, strict=True)
            for seed, head in zip(seeds, of_seeds, strict=True)
        }

    def _score(self, fitted: Fitted, *, folds: bool = True) -> None:
        counts = self.features.counts
        if self.val is not None:
            self.scored.setdefault("val", {}).update(score(fitted, self.val, counts, self.ranks.device))
        if self.folds and folds:
            self.scored.setdefault("kfold", {}).update(self._out_of_fold(list(fitted)))

    def _out_of_fold(self, keys: Sequence[Key]) -> Scored:
        """Return scores on every training sample by heads that were fitted without it."""
        features, labels = self.features.views[0], self.features.labels
        settings = [s for s in dict.fromkeys(setting for setting, _ in keys) if s != BASELINE]
        seeds = tuple(dict.fromkeys(seed for _, seed in keys if seed is not None))
        answers: dict[Key, list[tuple[np.ndarray, np.ndarray]]] = {key: [] for key in keys}
        kept: dict[Key, list[np.ndarray]] = {key: [] for key in keys}
        for rows, others in self.held_out:
            fitted: Fitted = {(BASELINE, None): Linear(others.features.weight, others.features.bias)}
            if settings:
                fitted |= self._fit(settings, others, seeds or (None,))
            inputs = _inputs(features[rows], self.ranks.device)
            mixed = _inputs(features[self.fold_rows[np.isin(self.fold_rows, rows)]], self.ranks.device)
            for key in keys:
                if key[0] not in self.diverged:
                    answers[key].append(predict(fitted[key], inputs))
                    kept[key].append(fitted[key].logits(mixed).cpu().numpy().astype(np.float16))
        held_out_labels = labels[np.concatenate([rows for rows, _ in self.held_out])]
        alive = [key for key in keys if key[0] not in self.diverged]
        self.fold_logits |= {key: np.concatenate(kept[key]) for key in alive}
        return {
            key: scores_of(
                np.concatenate([p for p, _ in answers[key]]),
                np.concatenate([c for _, c in answers[key]]),
                held_out_labels,
                self.features.counts,
            )
            for key in alive
        }


def single_precision(samples: Blocks) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield features (n, D) in float32 with labels (n,)."""
    yield from ((x.float(), y) for x, y in samples())


def evenly(labels: np.ndarray, most: int) -> np.ndarray:
    """Return the positions (M,) of at most so many samples, ascending: the first of each class, then the second, and so on."""
    order = np.argsort(labels, kind="stable")
    number = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), np.int64)
    rank[order] = number
    return np.sort(np.argsort(rank, kind="stable")[:most])


def score(fitted: Fitted, split: FeatureSplit, counts: np.ndarray, device: torch.device) -> Scored:
    """Return the scores of every head on a split."""
    inputs = _inputs(split.features, device)
    return {key: scores_of(*predict(head, inputs), split.labels, counts) for key, head in fitted.items()}


def _inputs(features: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(features).to(device=device, dtype=torch.float32)
