"""All heads of one run: fitted together and scored on what selects among them, which the test split is not."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch

from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks
from pipeline.errors import PipelineError
from pipeline.longtail import class_groups
from pipeline.metrics import Scores, scores_of
from pipeline.probe import fit_probe
from pipeline.rebalance.candidates import ENGINE, head_of, is_trained, schedule_of
from pipeline.rebalance.engine.features import Features, FeatureSplit
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.estimate import AUTOGRAD, FitProgress
from pipeline.rebalance.folds import stratified_folds
from pipeline.rebalance.halving import SubsetViews, subset_rows
from pipeline.rebalance.methods import RIVALS, Free
from pipeline.rebalance.methods.fit import Blocks, Trial, fit, solve
from pipeline.rebalance.methods.iwb_la import with_means
from pipeline.rebalance.methods.training_free import nearest_mean
from pipeline.results.head_id import BASELINE, HeadId
from pipeline.results.heads import Linear, Scorer, is_finite, predict
from pipeline.results.selection import Choice, select

NEAREST_MEAN = Free("ncm", nearest_mean)
MISSING = 0.1  # largest share of a group's classes that the choice may be blind to
LOGITS_KEPT = 1 << 22  # most logits of one head by which it is compared and mixed with others
Key = tuple[HeadId, int | None]  # what is not trained has no seed
Fitted = dict[Key, Scorer]
Scored = dict[Key, Scores]
Answers = tuple[np.ndarray, np.ndarray]  # classes (M,) and their probabilities (M,)


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
        chosen_on: `val` or `kfold`; None where nothing is chosen. On `val`, classes that are `missing` there are scored on
            their training samples, out of fold, so that the choice does not forget them; on `kfold` all classes are.
        probe: the heads start from a linear probe, which is fitted anew without the samples of a fold.
        scored: scores by split: `val` where there is one, `kfold` where that is chosen on.
        fold_logits: out-of-fold logits (M, C) in float16 of the samples `fold_rows`.
        group_counts: (C,) training images by which classes are grouped, by default those of the features.
        fraction: training rows of the features in those of the whole store.
        subsets: by share, sweeps on parts of the training rows (halving.py).
        progress: is told of the work that is done.
        diverged: trials at whose learning rate fitting diverged; they have no heads and no scores.
    """

    features: Features
    val: FeatureSplit | None
    config: RebalanceConfig
    ranks: Ranks
    chosen_on: str | None
    probe: bool = False
    heads: Fitted = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    diverged: set[HeadId] = field(default_factory=set)
    fit_seconds: float = 0.0
    fitted: int = 0
    fold_logits: dict[Key, np.ndarray] = field(default_factory=dict)
    group_counts: np.ndarray | None = None
    fraction: float = 1.0
    subsets: dict[float, "Sweep"] = field(default_factory=dict)
    progress: FitProgress = field(default_factory=lambda: FitProgress({}, lambda *moved: None))

    def __post_init__(self):
        self.training_set = TrainingSet(self.features, None, Blocks(self.features, None, self.ranks.device))
        self.heads[BASELINE, None] = Linear(self.features.weight, self.features.bias)
        self._score(self.heads)

    @property
    def training_sets(self) -> dict[str, TrainingSet]:
        """Return every set of samples that heads are fitted on, by name."""
        sets = {"all": self.training_set} | {f"fold {i}": part for i, (_, part) in enumerate(self.held_out)}
        for share, subset in self.subsets.items():
            sets |= {f"{share:.3f}, {name}": part for name, part in subset.training_sets.items()}
        return sets

    def subset(self, share: float) -> "Sweep":
        """Return the sweep on a share of the training rows, itself for all of them; losses then count these rows."""
        if share == 1:
            return self
        if share not in self.subsets:
            labels, counts = self.features.labels, self.features.counts
            rows = subset_rows(labels, counts, share)
            fewer = np.bincount(labels[rows], minlength=len(counts))
            features = replace(
                self.features, views=SubsetViews(self.features.views, rows), labels=labels[rows], counts=fewer
            )
            self.subsets[share] = Sweep(
                features,
                self.val,
                self.config,
                self.ranks,
                self.chosen_on,
                probe=self.probe,
                group_counts=np.asarray(counts),
                fraction=len(rows) / len(labels),
                progress=self.progress,
            )
        return self.subsets[share]

    @property
    def grouping(self) -> np.ndarray:
        """Return the training images (C,) by which classes are grouped."""
        return self.features.counts if self.group_counts is None else self.group_counts

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
            self.progress.tick(heads=sum(seed is not None for _, seed in fitted))
            self._score(fitted)

    def add_head(self, setting: HeadId, head: Scorer, logits: np.ndarray) -> None:
        """Add a head that was made of others, and score it.

        Arguments:
            logits: (M, C), as `logits` returns them.
        """
        key: Key = (setting, None)
        self.heads[key] = head
        out_of_fold = logits[len(logits) - len(self.fold_rows) :]
        exponent = out_of_fold - out_of_fold.max(1, keepdims=True)
        answers = out_of_fold.argmax(1), 1 / np.exp(exponent).sum(1)
        self._add_scores({key: head}, {key: answers}, self.fold_rows)

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
        """The samples (M,) of each fold, and the training set of all others; empty where nothing is scored out of fold."""
        labels, classes = self.features.labels, len(self.features.counts)
        fold, parts, l2 = stratified_folds(labels), [], None  # the first fold's L2 serves all
        if self.chosen_on != "kfold":
            fold[~self.missing[labels]] = -1
        for rows in [np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])]:
            others = np.setdiff1d(np.arange(len(labels)), rows)
            features, samples = self.features, Blocks(self.features, others, self.ranks.device)
            if self.probe:
                blocks = partial(single_precision, samples)
                probe = fit_probe(blocks, classes=classes, width=features.weight.shape[1], l2=l2)
                l2, features = probe.l2, replace(features, weight=probe.weight, bias=probe.bias)
            parts.append((rows, TrainingSet(features, others, samples)))
        return parts

    @property
    def missing(self) -> np.ndarray:
        """Return which classes (C,) are scored out of fold for want of a validation sample.

        None are as long as every group has a sample for nine tenths of its classes: so few hardly move the mean over classes,
        and folds take six times as long.
        """
        counts = self.grouping
        if self.chosen_on != "val" or self.val is None:
            return np.zeros(len(counts), bool)
        without = np.bincount(self.val.labels, minlength=len(counts)) == 0
        shares = [without[group].mean() for group in class_groups(counts).values() if group.any()]
        return without & (max(shares) > MISSING)

    @cached_property
    def held_out_rows(self) -> np.ndarray:
        """Training samples (M,) that are scored out of fold, in the order in which folds are held out."""
        return np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in self.held_out)])

    @cached_property
    def fold_rows(self) -> np.ndarray:
        """Those of `held_out_rows` that have out-of-fold logits, in the same order."""
        rows = self.held_out_rows
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

    def labels_chosen_on(self) -> np.ndarray:
        """Return the labels (M,) of all samples that are chosen on."""
        return self._joined(self.val, self.held_out_rows)

    def labels_of_logits(self) -> np.ndarray:
        """Return the labels (M,) of the samples of `logits`."""
        return self._joined(self.val and self.val_rows, self.fold_rows)

    def logits(self, setting: HeadId) -> torch.Tensor:
        """Return logits (M, C) of a setting on samples it is chosen on, the mean over the batch orders that are fitted."""
        keys = [key for key in self.heads if key[0] == setting]
        parts = []
        if self.chosen_on == "val":
            inputs = _inputs(self.val_rows.features, torch.device("cpu"))
            parts.append(torch.stack([self.heads[key].logits(inputs) for key in keys]).mean(0))
        if self.held_out:
            out_of_fold = np.mean([self.fold_logits[key].astype(np.float32) for key in keys], axis=0)
            parts.append(torch.from_numpy(out_of_fold))
        return torch.cat(parts)

    def _joined(self, val: FeatureSplit | None, rows: np.ndarray) -> np.ndarray:
        """Return the labels of validation samples, where they are chosen on, and of training samples `rows` after them."""
        out_of_fold = self.features.labels[rows]
        return out_of_fold if self.chosen_on == "kfold" or val is None else np.concatenate([val.labels, out_of_fold])

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
        weight, bias = fit_heads(
            features,
            heads,
            seeds=seeds,
            schedule=schedule,
            rows=rows,
            device=device,
            ranks=ranks,
            tick=lambda epochs: self.progress.tick(epochs=self.fraction * epochs),
        )
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
            samples.tick = lambda products: self.progress.tick(passes=self.fraction * products)
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
            tick=lambda epochs: self.progress.tick(epochs=self.fraction * AUTOGRAD * epochs),
        )
        return {
            (s, seed): head
            for s, of_seeds in zip(settings, heads, strict=True)
            for seed, head in zip(seeds, of_seeds, strict=True)
        }

    def _score(self, fitted: Fitted) -> None:
        """Score heads on the samples that are chosen on, and on validation where there is one."""
        self._add_scores(fitted, self._out_of_fold(list(fitted)), self.held_out_rows)

    def _add_scores(self, fitted: Fitted, out_of_fold: Mapping[Key, Answers], rows: np.ndarray) -> None:
        """Add the scores of heads, from their answers on validation and those out of fold.

        Arguments:
            out_of_fold: answers on the training samples `rows` (M,) by heads that were fitted without them.
        """
        counts, labels = self.grouping, self.features.labels[rows]
        if self.chosen_on == "kfold":
            scored = {key: scores_of(*answers, labels, counts) for key, answers in out_of_fold.items()}
            self.scored.setdefault("kfold", {}).update(scored)
        if self.val is None:
            return
        inputs, with_folds = _inputs(self.val.features, self.ranks.device), self.chosen_on == "val"
        for key in out_of_fold:
            answers, samples = predict(fitted[key], inputs), self.val.labels
            if with_folds:
                answers = join(answers, out_of_fold[key])
                samples = np.concatenate([samples, labels])
            self.scored.setdefault("val", {})[key] = scores_of(*answers, samples, counts)

    def _out_of_fold(self, keys: Sequence[Key]) -> dict[Key, Answers]:
        """Return the answers on the samples `held_out_rows` by heads that were fitted without them."""
        features = self.features.views[0]
        settings = [s for s in dict.fromkeys(setting for setting, _ in keys) if s != BASELINE]
        seeds = tuple(dict.fromkeys(seed for _, seed in keys if seed is not None))
        answers: dict[Key, Answers] = {key: (np.zeros(0, np.int64), np.zeros(0, np.float32)) for key in keys}
        kept: dict[Key, list[np.ndarray]] = {key: [] for key in keys}
        for rows, others in self.held_out:
            fitted: Fitted = {(BASELINE, None): Linear(others.features.weight, others.features.bias)}
            if settings:
                fitted |= self._fit(settings, others, seeds or (None,))
            inputs = _inputs(features[rows], self.ranks.device)
            mixed = _inputs(features[self.fold_rows[np.isin(self.fold_rows, rows)]], self.ranks.device)
            for key in keys:
                if key[0] not in self.diverged:
                    answers[key] = join(answers[key], predict(fitted[key], inputs))
                    kept[key].append(fitted[key].logits(mixed).cpu().numpy().astype(np.float16))
        alive = [key for key in keys if key[0] not in self.diverged]
        if self.held_out:
            self.fold_logits |= {key: np.concatenate(kept[key]) for key in alive}
        return {key: answers[key] for key in alive}


def join(first: Answers, second: Answers) -> Answers:
    """Return the classes and probabilities of two sets of samples, one after the other."""
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


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
