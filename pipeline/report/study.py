"""The data of a report: one run folder, or the seed-N folders of several backbones, read into arrays."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cache import Cache, CacheError, is_url, open_cache
from pipeline.errors import DataError
from pipeline.longtail import GROUPS, class_groups
from pipeline.method_names import PROBE, start_name
from pipeline.paths import holds_runs
from pipeline.report.dispersion import Directions, read_directions
from pipeline.results.documents import read_epochs, read_per_class, read_record, read_results
from pipeline.results.head_id import HeadId
from pipeline.results.heads import Linear, Scorer, read_heads_file, read_scorers
from pipeline.results.mean_std import MeanStd, mean_std

COLUMNS = ("all", *GROUPS)
SPLITS = {"val": "validation", "kfold": "held-out folds", "test": "test"}
PRODUCTS_FOR_A_FIGURE = 2**40  # multiplications, seconds on a CPU; a figure is not worth more
SAME_ACCURACY = 0.5  # points by which the order of sums may change an accuracy, or two images where they weigh more
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Backbone:
    """One trained encoder: what stage 1 and stage 2 left in its folder."""

    name: str
    results_path: Path
    results: dict[str, Any]
    selected: HeadId
    store: Cache
    metrics: list[Row]
    training: dict[str, Any]
    rebalancing: dict[str, Any]

    @property
    def loss_only(self) -> HeadId:
        """The selected head's loss without the norm term."""
        return self.selected.loss_only

    @property
    def network(self) -> dict[str, Any]:
        """network, parameters, feature_width; empty where nobody wrote them down."""
        return self.results.get("network") or self.training.get("network") or {}

    @property
    def rows(self) -> list[Row]:
        return self.results["results"]

    @cached_property
    def heads(self) -> tuple[list[Row], np.ndarray, np.ndarray]:
        """(what each head is, weight (H, C, D), bias (H, C)) of heads.safetensors."""
        return stacked(self.scorers)

    @cached_property
    def scorers(self) -> list[tuple[Row, Scorer]]:
        """(what it is, head) of every head in heads.safetensors, those that are no linear layer too."""
        file = read_heads_file(self.results_path.with_name("heads.safetensors"))
        file.refuse_other_store(self.store, same_content=True)
        if self.results.get("heads_digest") not in (None, hashlib.sha256(file.path.read_bytes()).hexdigest()):
            again = f"run `pipeline rebalance {self.store.path}` again"
            raise DataError(f"{file.path}: not the heads that {self.results_path} was written with; {again}")
        return file.scorers

    @cached_property
    def directions(self) -> dict[str, Directions | None]:
        """Directions of the clean features of training and test; None where there are none, or too many."""
        return {split: read_directions(self.store, split) for split in ("train", "test")}

    def tuned_lam(self, method: str) -> float | None:
        """The λ that stands for a method where methods were tuned."""
        return next((c["lam"] for c in self.results.get("chosen", ()) if HeadId.of_row(c).method == method), None)

    def head(self, kind: HeadId) -> tuple[Row, Scorer]:
        """(what it is, head) of a kind, of several batch orders the first; DataError naming what there is instead."""
        matching = [(entry, head) for entry, head in self.scorers if kind.matches(entry)]
        if matching:
            self.refuse_other_accuracy(kind)
            return min(matching, key=lambda pair: pair[0].get("seed") or 0)
        file = self.results_path.with_name("heads.safetensors")
        same_method = [entry for entry, _ in self.scorers if HeadId.of_row(entry).method == kind.method]
        lams = ", ".join(f"{lam:g}" for lam in sorted({w["lam"] for w in same_method if w.get("lam") is not None}))
        if kind.lam is not None and lams:
            again = f"run `pipeline rebalance --lam {kind.lam:g}` for another"
            raise DataError(f"{file}: no head {kind}; it has λ = {lams}; {again}")
        methods = ", ".join(dict.fromkeys(entry["method"] for entry, _ in self.scorers))
        again = f"run `pipeline rebalance --method {kind.method}` first"
        raise DataError(f"{file}: no head {kind}; it has {methods}; {again}")

    def norms(self, kind: HeadId) -> np.ndarray | None:
        """(C,) lengths of the class vectors, mean over batch orders; None where no such head was kept."""
        heads, weight, _ = self.heads
        lengths = [np.linalg.norm(weight[i].astype(np.float64), axis=1) for i, h in enumerate(heads) if kind.matches(h)]
        return np.mean(lengths, axis=0) if lengths else None

    @cached_property
    def per_class(self) -> list[Row]:
        """Lines of per_class.csv; empty where there is none."""
        return read_per_class(self.results_path.with_name("per_class.csv"), classes=len(self.store.class_names))

    def class_accuracy(self, kind: HeadId, split: str) -> np.ndarray | None:
        """(C,) accuracy in %, mean over batch orders, nan where a class has no sample; None where nobody measured it.

        per_class.csv has few settings; the others are measured again with the heads that were kept.
        """
        total, samples = np.zeros(len(self.store.counts)), np.zeros(len(self.store.counts))
        for line in self.per_class:
            if line["split"] == split and kind.matches(line):
                c, n = line["class"], line["total"]
                total[c] += line["correct"]
                samples[c] += n
        if not samples.any():
            total, samples = self._measured(kind, split)
        if not samples.any():
            return None
        return np.where(samples > 0, 100 * total / np.maximum(samples, 1), np.nan)

    def refuse_other_accuracy(self, kind: HeadId) -> None:
        """Raise DataError where heads of a kind have another accuracy on test than the results record for them."""
        rows = [row for row in self.rows if row["split"] == "test" and kind.matches(row)]
        recorded = mean_std(row.get("all") for row in rows).mean
        right, samples = self._measured(kind, "test")
        if recorded is None or not samples.any():
            return
        right, samples = right[samples > 0], samples[samples > 0]
        measured = 100 * float(np.mean(right / samples))
        if abs(measured - recorded) > max(SAME_ACCURACY, 200 / (len(samples) * samples.min())):
            raise DataError(
                f"{self.results_path}: records {recorded:.1f} % on test for {kind}, the heads beside it have {measured:.1f} %, "
                f"so they belong to other results; run `pipeline rebalance {self.store.path}` again"
            )

    def _measured(self, kind: HeadId, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(right, seen) samples of every class (C,), summed over the heads of a kind."""
        heads, weight, bias = self.heads
        right, samples = np.zeros(len(self.store.counts)), np.zeros(len(self.store.counts))
        rows_of_head = [i for i, head in enumerate(heads) if kind.matches(head)]
        if (
            split not in self.store.splits
            or self.store.rows(split) * weight[0].size * len(rows_of_head) > PRODUCTS_FOR_A_FIGURE
        ):
            return right, samples
        labels, valid = self.store.labels(split), self.store.valid(split)
        for chunk in self.store.chunks(split) if rows_of_head else ():
            rows = slice(chunk.start, chunk.stop)
            features, truth = self.store.read_chunk(chunk).astype(np.float32)[valid[rows]], labels[rows][valid[rows]]
            for i in rows_of_head:
                hit = (features @ weight[i].T + bias[i]).argmax(1) == truth
                right += np.bincount(truth[hit], minlength=len(right))
                samples += np.bincount(truth, minlength=len(samples))
        return right, samples


@dataclass(frozen=True, eq=False)
class Study:
    """All backbones of a run; numbers are spreads over backbones where there are several, else over batch orders."""

    folder: Path
    backbones: Sequence[Backbone]
    document: dict[str, Any]
    stages: dict[str, Any]

    @property
    def first(self) -> Backbone:
        return self.backbones[0]

    @property
    def counts(self) -> np.ndarray:
        return self.first.store.counts

    @cached_property
    def tested(self) -> np.ndarray:
        """(C,) whether a class has a test image; the means of the test split are over these."""
        store = self.first.store
        return np.bincount(store.labels("test")[store.valid("test")], minlength=len(self.counts)) > 0

    def classes_of(self, column: str) -> str:
        """`5 classes` of a group or of all; `4 of 5 classes with test images` where its mean on test is over fewer."""
        inside = np.ones_like(self.tested) if column == "all" else class_groups(self.counts)[column]
        size, tested = int(inside.sum()), int((inside & self.tested).sum())
        return classes(size) if tested == size else f"{tested:,} of {classes(size)} with test images"

    @property
    def averaged(self) -> str:
        """The classes that a mean on test covers: `classes`, or `classes with test images`."""
        return "classes" if self.tested.all() else "classes with test images"

    @property
    def by_size(self) -> np.ndarray:
        """Class numbers, largest class first."""
        return np.argsort(-self.counts, kind="stable")

    @property
    def lams(self) -> list[float]:
        """The positive λ that every backbone has a result for; λ = 0 is a reference of its own."""
        method = self.at(0.0).method
        by_backbone = [{r["lam"] for r in b.rows if r["method"] == method and r.get("lam")} for b in self.backbones]
        return sorted(set.intersection(*by_backbone))

    def at(self, lam: float) -> HeadId:
        """The method with a λ that the curves show: the selected one, else IWB."""
        selected = self.first.selected
        if selected.lam is not None:
            return HeadId(selected.method, selected.loss, lam)
        loss = next((r.get("loss") for r in self.first.rows if r["method"] == "iwb"), None)
        return HeadId("iwb", loss, lam)

    @property
    def start(self) -> str:
        """The head that stage 2 started from: `stage 1` or `the linear probe`."""
        start = start_name(self.first.store.fingerprint)
        return f"the {start}" if start == PROBE else start

    @property
    def chosen_on(self) -> str | None:
        """val or kfold; None where a single λ was given."""
        return self.document["selected"].get("chosen_on")

    @property
    def choosing_split(self) -> str:
        """The split that the choice was made on, in the rows: val or kfold."""
        return self.chosen_on or "val"

    @property
    def repeated(self) -> str:
        """The repetitions behind ±: `3 backbones`, or `3 batch orders of one backbone`."""
        if len(self.backbones) > 1:
            return f"{len(self.backbones)} backbones"
        n = len({r["seed"] for r in self.first.rows if self.first.selected.matches(r)})
        return f"{n} batch orders of one backbone" if n > 1 else "one backbone, one batch order"

    def spread(self, kinds: HeadId | Sequence[HeadId], split: str, column: str) -> MeanStd | None:
        """MeanStd of one column of the table; a list gives each backbone its own kind; None where one lacks it."""
        heads = [kinds] * len(self.backbones) if isinstance(kinds, HeadId) else kinds
        values = []
        for backbone, kind in zip(self.backbones, heads, strict=True):
            rows = [r for r in backbone.rows if r["split"] == split and kind.matches(r)]
            if not rows:
                return None
            values.append([r.get(column) for r in rows])
        return mean_std(values[0] if len(values) == 1 else [mean_std(values).mean for values in values])

    @property
    def selected(self) -> list[HeadId]:
        return [b.selected for b in self.backbones]

    def has_split(self, split: str) -> bool:
        return all(any(r["split"] == split for r in b.rows) for b in self.backbones)


def classes(count: int) -> str:
    return f"{count:,} class{'' if count == 1 else 'es'}"


def labels(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run: that of its folder, else its whole path."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_study(run: Path) -> Study:
    """The backbones under a run: RUN/rebalance, RUN/seed-N/rebalance, or RUN itself where results.json lies in it.

    Raises DataError where there are no results, or they are damaged or belong to no readable store.
    """
    if not run.is_dir():
        raise DataError(f"{run}: no such run folder; make one with `pipeline run`")
    paths = results_files(run)
    if not paths and (advice := holds_runs(run)):
        raise DataError(advice)
    if not paths:
        first = f"run `pipeline rebalance {run / 'features.zarr'}` first"
        raise DataError(f"{run}: nothing to report: no rebalance/results.json; {first}")
    together = run / "results.json"
    several = paths[0].parent not in (run, run / "rebalance")
    joint = read_results(together) if several and together.is_file() else None
    backbones = [_read_backbone(path, joint["selected"] if joint else None) for path in paths]
    for backbone in backbones[1:]:
        if backbone.store.class_names != backbones[0].store.class_names:
            raise DataError(
                f"{backbone.results_path}: has other classes than {backbones[0].results_path}; report them apart"
            )
    stages = read_record(run / "run.json").get("stages", {})
    return Study(run, backbones, joint or backbones[0].results, stages)


def results_files(run: Path) -> list[Path]:
    """The results.json of every backbone of a run, seed-2 before seed-10."""
    seeds = sorted(run.glob("seed-*/rebalance/results.json"), key=lambda p: (len(p.parts[-3]), p.parts[-3]))
    single = [p for p in (run / "rebalance" / "results.json", run / "results.json") if p.is_file()]
    return seeds or single[:1]


def _read_backbone(path: Path, choice: dict[str, Any] | None) -> Backbone:
    """Read the folder of a backbone; choice: the head selected for all backbones together, None for its own."""
    folder = path.parent.parent if path.parent.name == "rebalance" else path.parent
    results = read_results(path)
    neighbour = folder / "features.zarr"
    try:
        named = results["store"]
        store = open_cache(neighbour if neighbour.exists() and not is_url(named) else named)
    except CacheError as error:
        raise DataError(f"{path}: its feature store cannot be read: {error}") from error
    if results.get("digest") not in (None, store.digest):
        raise DataError(
            f"{path}: results of a store with digest {results['digest'][:12]}, {store.path} has {store.digest[:12]}: its "
            f"features were made anew since; run `pipeline rebalance {store.path}` again"
        )
    choice = choice or results["selected"]
    tuned = {c.method: c.lam for c in map(HeadId.of_row, results.get("chosen", ()))}  # λ as this backbone tuned it
    selected = HeadId.of_row(choice)
    selected = replace(selected, lam=selected.lam or tuned.get(selected.method, selected.lam))
    epochs = read_epochs(folder / "backbone" / "metrics.jsonl")
    training, rebalancing = read_record(folder / "backbone" / "run.json"), read_record(path.with_name("run.json"))
    return Backbone(folder.name, path, results, selected, store, epochs, training, rebalancing)


def read_heads(path: Path) -> tuple[list[Row], np.ndarray, np.ndarray]:
    """(method, loss, lam, seed of each linear head; weight (H, C, D); bias (H, C)). DataError if it is missing or other."""
    return stacked(read_scorers(path))


def stacked(scorers: Sequence[tuple[Row, Scorer]]) -> tuple[list[Row], np.ndarray, np.ndarray]:
    """Return the linear ones of heads: what each is, weight (H, C, D), bias (H, C)."""
    linear = [(entry, head) for entry, head in scorers if isinstance(head, Linear)]
    return (
        [entry for entry, _ in linear],
        np.stack([h.weight for _, h in linear]),
        np.stack([h.bias for _, h in linear]),
    )
