"""Stage 2 from a store to a table: fit, validate, choose, write the choice, and only then look at the test split."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cache import Cache, write_durably
from pipeline import distributed
from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks
from pipeline.method_names import PROBE, start_name
from pipeline.metrics import scarce, unmeasured
from pipeline.paths import recorded_document, recorded_path
from pipeline.provenance import provenance
from pipeline.rebalance.candidates import REFERENCES, candidates, is_trained, parse_lam, references, resolved
from pipeline.rebalance.compare import Comparison, compare
from pipeline.rebalance.estimate import FitProgress
from pipeline.rebalance.folds import CAVEAT, REFITTED
from pipeline.rebalance.load import Loaded, load
from pipeline.rebalance.overwrite_check import replacement_note
from pipeline.rebalance.prepare import FitPlan, PreparedRebalance, network_of, prepare_rebalance
from pipeline.rebalance.selection import AUTO, border_notes, refine
from pipeline.rebalance.sweep import Scored, Sweep, score
from pipeline.rebalance.tuning import is_comparison
from pipeline.rebalance.unfinished import Unfinished, kept_at_signals, remove_unfinished
from pipeline.results.differences import Hits, differences
from pipeline.results.files import write_artefact
from pipeline.results.head_id import HeadId
from pipeline.results.heads import heads_file
from pipeline.results.mean_std import MEASURES
from pipeline.results.rebalance_result import (
    RebalanceResult,
    Row,
    over_seeds,
    per_class_csv,
    rows_csv,
    trials_csv,
)
from pipeline.results.selection import Choice

PAPER_STEPS, PAPER_LR = 1700, 0.005  # of stage 2 on CIFAR100-LT
REPETITIONS = "batch orders of one backbone"
ONLY_CANDIDATE = Choice(0, math.nan, math.nan, ())


def rebalance(
    store: Cache | Path | str,
    config: RebalanceConfig | None = None,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    report: Callable[[str], object] = lambda line: None,
    move: Callable[[float, float, str], object] = lambda done, total, note: None,
) -> RebalanceResult:
    """Fit every head the configuration asks for on cached features, choose one on validation, test once.

    Reference rows stand beside the candidates: the stage-1 head, the classification loss only, iwb at λ = 0. Where methods
    compete, each is tuned first (tuning.py). It writes results.json, results.csv, per_class.csv, heads.safetensors,
    test_hits.safetensors and run.json, and trials.csv where methods were tuned; selection.json holds the choice and is
    written before the test split is read. Under torchrun the ranks share the work by config.spread, and the first writes.

    Arguments:
        config: by default the store's own.
        out: by default rebalance/ beside the store.
        report: called with a line for each tuned method and, before the first fit, with a note on results that are replaced.
        move: called while heads are fitted with the percentage that is done, 100, and a note on the method and its heads.
    Raises:
        ConfigError, DataError, PipelineError: as prepare_rebalance, before the first fit.
        Terminated: SIGTERM or Ctrl-C; finished methods are kept and the same call goes on (unfinished.py).
    """
    with distributed.ranks(device) as ranks:
        started = time.perf_counter()
        prepared = ranks.together(lambda: prepare_rebalance(store, config, out=out, ranks=ranks))
        report = report if ranks.first else lambda line: None
        unfinished = Unfinished(prepared.out, prepared.plans[0].config, prepared.store.digest, ranks, report)
        with kept_at_signals([unfinished]):
            return _execute(prepared, started, unfinished, report, move if ranks.first else lambda *moved: None)


def _execute(
    prepared: PreparedRebalance,
    started: float,
    unfinished: Unfinished,
    report: Callable[[str], object],
    move: Callable[[float, float, str], object],
) -> RebalanceResult:
    (plan,), ranks, out = prepared.plans, prepared.ranks, prepared.out
    config = plan.config
    loaded = load_together(prepared)
    load_seconds = time.perf_counter() - started
    if ranks.first and (note := replacement_note(out, config, prepared.store.digest)):
        report(note)
    for note in unfinished.notes() if ranks.first else []:
        report(note)

    fitted = fit(plan, loaded, unfinished, report, move)
    sweep, choice, selected_head = fitted.sweep, fitted.choice, fitted.selected
    comparison, chosen_on = fitted.comparison, plan.chosen_on
    near = [fitted.candidates[i].to_dict() for i in choice.within_one_se]
    selected = selected_head.to_dict() | {"chosen_on": chosen_on}
    selected |= {"parameters": selected_head.parameters} if comparison else {}
    against: dict[str, dict[str, Any] | None] = {role: head.to_dict() for role, head in REFERENCES.items()}
    if any(head.method == "logistic-balanced" for head, _ in sweep.heads):
        against["balanced_logistic_regression"] = HeadId("logistic-balanced").to_dict()
    against["runner_up"] = None if choice.runner_up is None else fitted.candidates[choice.runner_up].to_dict()
    document: dict[str, Any] = {"selected": selected}
    if chosen_on:
        document |= {"score": choice.score, "standard_error": choice.standard_error, "runner_up": against["runner_up"]}
    write_choice(out, document | {"within_one_se": near}, ranks)

    test = loaded.test()
    scored = sweep.scored | {"test": score(sweep.heads, test, loaded.features.counts, ranks.device)}
    hits = hits_of(scored["test"], test.labels)
    rows = [row_of(*key, split, scores) for split, heads in scored.items() for key, scores in heads.items()]
    test_rows = [row for row in rows if row.split == "test"]
    selected_rows = [row for row in test_rows if selected_head.matches(vars(row))]
    stage_1 = next(row for row in test_rows if row.method == "baseline")
    result = RebalanceResult(
        **source_facts(prepared, config),
        baseline={m: getattr(stage_1, m) for m in MEASURES},
        selected=selected | {"n": len(selected_rows), "n_of": REPETITIONS} | over_seeds(selected_rows),
        candidates=tuple(head.to_dict() for head in fitted.candidates),
        within_one_se=tuple(near),
        differences=differences(selected_head.to_dict(), against, [hits], fitted.pairs),
        selection=fitted.selection_facts(loaded.store.class_names),
        results=tuple(rows),
        timing=timing(started, load_seconds, loaded, [sweep], sweep.fitted),
        notes=(
            *prepared.notes,
            *loaded.notes,
            *fitted.fit_notes(len(loaded.features.labels)),
            *fitted.choice_notes,
            *scarce(test.labels, loaded.features.counts),
            *untested_notes(test.labels, loaded),
        ),
        out=str(out),
        chosen=tuple(comparison.tuned if comparison else ()),
        trials=tuple(comparison.trials if comparison else ()),
    )
    if ranks.first:
        write_durably(out / "test_hits.safetensors", hits.to_bytes())
        _write(result, sweep, scored, prepared, selected_head, unfinished)
    return result


@dataclass(frozen=True, eq=False)
class Fitted:
    """The heads of one configuration, fitted and scored, and the choice among them.

    Arguments:
        candidates: heads that were chosen among; more than the plan's where `auto` refined its grid or methods were tuned.
        comparison: what tuning chose, None where nothing was tuned.
    """

    plan: FitPlan
    sweep: Sweep
    candidates: tuple[HeadId, ...]
    choice: Choice
    comparison: Comparison | None

    @property
    def selected(self) -> HeadId:
        return self.candidates[self.choice.index]

    def fit_notes(self, rows: int) -> list[str]:
        """Return notes on how the heads were fitted on so many training rows."""
        caveat = [REFITTED if self.sweep.probe else CAVEAT] if self.plan.chosen_on == "kfold" else []
        return caveat + ([] if self.comparison else short_training_notes(self.plan.config, self.candidates, rows))

    @property
    def pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Rows that are compared with each other beside the selected one: iwb less the class-balanced loss alone."""
        if self.comparison is None:
            return []
        best = {row["method"]: HeadId.of_row(row).to_dict() for row in self.comparison.tuned}
        return [(best["iwb"], best["cb"])] if {"iwb", "cb"} <= best.keys() else []

    def selection_facts(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return on what the choice was made and how far it can be trusted; empty where nothing was chosen."""
        if self.plan.chosen_on is None:
            return {}
        samples = np.bincount(self.sweep.labels_chosen_on(), minlength=len(class_names))
        on_folds = np.unique(self.sweep.features.labels[self.sweep.held_out_rows])
        return {
            "split": self.plan.chosen_on,
            "samples": int(samples.sum()),
            "median_per_class": float(np.median(samples[samples > 0])),
            "classes_without": [name for name, n in zip(class_names, samples, strict=True) if not n],
            "classes_on_folds": [class_names[c] for c in on_folds] if self.plan.chosen_on == "val" else [],
            "encoder_saw_folds": not self.sweep.probe,
            "standard_error": self.choice.standard_error,
            "settings_tried": len(self.comparison.trials) if self.comparison else len(self.candidates),
        }

    @property
    def choice_notes(self) -> list[str]:
        """Return notes on the choice: the border of a grid, and what tuning did."""
        if self.comparison:
            return self.comparison.notes
        auto, lams = parse_lam(self.plan.config.lam) is None, [head.lam for head in self.candidates]
        return border_notes(self.selected.lam, lams, auto=auto) if self.plan.chosen_on else []


def fit(
    plan: FitPlan,
    loaded: Loaded,
    unfinished: Unfinished,
    report: Callable[[str], object],
    move: Callable[[float, float, str], object],
) -> Fitted:
    """Fit and score the heads of a plan and choose one; `auto` refines its grid, methods that compete are tuned.

    Arguments:
        unfinished: where finished parts are kept, and taken up where a command before was stopped.
    """
    config, chosen_on, heads, ranks = plan.config, plan.chosen_on, plan.candidates, unfinished.ranks
    probe = start_name(loaded.store.fingerprint) == PROBE
    sweep = Sweep(loaded.features, loaded.val, config, ranks, chosen_on, probe=probe)
    sweep.progress = FitProgress(plan.work, move)
    comparison = compare(sweep, config, chosen_on, unfinished, report) if chosen_on and is_comparison(config) else None
    if comparison:
        heads = tuple(comparison.winners)
    else:
        sweep.progress.begin("heads")
        unfinished.piece("heads", sweep, partial(sweep.add, [*plan.references, *heads]))
        if chosen_on and parse_lam(config.lam) is None and (coarse := [h for h in heads if h.method == "iwb"]):
            near = [coarse[i].lam for i in sweep.choose(coarse, chosen_on).within_one_se]
            lams = sorted({*AUTO, *refine(AUTO, [lam for lam in near if lam is not None])})
            heads = tuple(candidates(config, lams))
            sweep.progress.begin("refined λ")
            unfinished.piece("refined", sweep, partial(sweep.add, heads))
    preferred = comparison.ensemble if comparison else None
    choice = sweep.choose(heads, chosen_on, preferred=preferred) if chosen_on else ONLY_CANDIDATE
    return Fitted(plan, sweep, heads, choice, comparison)


def load_together(prepared: PreparedRebalance) -> Loaded:
    """Return the features that the plans need, on every rank; raise DataError on all of them where one cannot read."""
    augmented = any(plan.config.views == "augmented" for plan in prepared.plans)
    memory = prepared.config.memory_bytes
    return prepared.ranks.together(lambda: load(prepared.store, augmented=augmented, memory_bytes=memory))


def write_choice(out: Path, choice: Any, ranks: Ranks) -> None:
    """Write selection.json before any rank goes on, so that the choice cannot depend on what is read after it."""
    ranks.together(lambda: write_artefact(out / "selection.json", "choice", choice) if ranks.first else None)


def source_facts(prepared: PreparedRebalance, config: RebalanceConfig) -> dict[str, Any]:
    """Return the fields of a result that say what it was made from."""
    store, ranks = prepared.store, prepared.ranks
    settings = {"device": str(ranks.device), "ranks": ranks.world, "views_stored": store.views("train")}
    return {
        "store": str(store.path),
        "digest": store.digest,
        "fingerprint": store.fingerprint,
        "network": network_of(store),
        "settings": resolved(config) | settings,
    }


def timing(
    started: float, load_seconds: float, loaded: Loaded, sweeps: Sequence[Sweep], heads: int
) -> dict[str, float]:
    """Return the timing of a result; reading views counts as loading, though it happens while heads are fitted."""
    reading = loaded.views.seconds
    return {
        "load_s": round(load_seconds + reading, 3),
        "fit_s": round(sum(sweep.fit_seconds for sweep in sweeps) - reading, 3),
        "heads": heads,
        "total_s": round(time.perf_counter() - started, 3),
    }


def short_training_notes(config: RebalanceConfig, heads: Sequence[HeadId], rows: int) -> list[str]:
    """Return a note where steps × learning rate is less than a quarter of the paper's."""
    steps = config.epochs * math.ceil(rows / config.batch_size)
    if not any(is_trained(head) for head in heads) or steps * config.lr >= PAPER_STEPS * PAPER_LR / 4:
        return []
    return [
        f"stage 2 took {steps:,} steps at a learning rate of {config.lr:g}, little beside the {PAPER_STEPS:,} at "
        f"{PAPER_LR:g} of the paper on CIFAR100-LT, so these heads may be under-fitted: --tune chooses the learning rate on "
        + ("validation" if config.select_on == "val" else "held-out folds")
    ]


def untested_notes(labels: np.ndarray, loaded: Loaded) -> list[str]:
    """Return a note on classes without a sample among the labels (M,) of the test split."""
    names = loaded.store.class_names
    return unmeasured(np.bincount(labels, minlength=len(names)), names, "test")


def hits_of(scored: Scored, labels: np.ndarray) -> Hits:
    """Return which test samples the heads classify correctly."""
    heads = [head.to_dict() | {"seed": seed} for head, seed in scored]
    scores = list(scored.values())
    return Hits(heads, np.stack([single.hit for single in scores]), np.asarray(labels), scores[0].counts)


def row_of(head: HeadId, seed: int | None, split: str, scores: Any) -> Row:
    return Row(**head.to_dict(), seed=seed, split=split, **scores.summary)


def write_run(out: Path, config: RebalanceConfig, result: Any) -> None:
    """Write run.json: what made the result, and from what."""
    run = provenance(
        command="rebalance",
        config=config.model_dump(mode="json"),
        device=result.settings["device"],
        seed=list(config.seeds),
        made_from={"store": recorded_path(result.store, out), "digest": result.digest},
        network=result.network,
    )
    write_artefact(out / "run.json", "record", run)


def _write(
    result: RebalanceResult,
    sweep: Sweep,
    scored: dict[str, Scored],
    prepared: PreparedRebalance,
    selected: HeadId,
    unfinished: Unfinished,
) -> None:
    """Write every file of the result; results.json last, so that it never stands beside files that are missing.

    What was kept of the unfinished work is removed then.
    """
    out, names, config = prepared.out, prepared.store.class_names, prepared.plans[0].config
    heads = [(h.to_dict() | {"seed": seed, "selected": h == selected}, head) for (h, seed), head in sweep.heads.items()]
    facts: dict[str, Any] = {"class_names": list(names), "network": result.network, "store_digest": result.digest}
    facts["encoder"] = result.fingerprint.get("checkpoint")
    content = heads_file(heads, facts)
    write_durably(out / "heads.safetensors", content)
    rows = [head.to_dict() for head in (*references(config), selected)]
    lines = [
        (*key, split, scores)
        for split, by_head in scored.items()
        for key, scores in by_head.items()
        if key[0].to_dict() in rows
    ]
    write_durably(out / "per_class.csv", per_class_csv(lines, names))
    write_durably(out / "results.csv", rows_csv(result.results))
    if result.trials:
        write_durably(out / "trials.csv", trials_csv(result.trials))
    else:
        (out / "trials.csv").unlink(missing_ok=True)  # of results that were here before
    write_run(out, config, result)
    document = recorded_document(result.to_dict(), out) | {"heads_digest": hashlib.sha256(content).hexdigest()}
    with unfinished.kill.around("results", size=1024):  # which is larger
        write_artefact(out / "results.json", "results", document)
    remove_unfinished(out)
