"""Variants of stage 2 side by side: each fitted and chosen for itself on validation, all tested once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import Cache, write_durably
from pipeline import distributed
from pipeline.config import RebalanceConfig, Variant
from pipeline.paths import recorded_document
from pipeline.rebalance.candidates import cb_form
from pipeline.rebalance.prepare import PreparedRebalance, prepare_ablation
from pipeline.rebalance.run import (
    REPETITIONS,
    Fitted,
    fit,
    hits_of,
    load_together,
    row_of,
    source_facts,
    timing,
    untested_notes,
    write_choice,
    write_run,
)
from pipeline.rebalance.sweep import Scored, score
from pipeline.rebalance.unfinished import Unfinished, kept_at_signals, remove_unfinished
from pipeline.results.differences import LEVEL, RESAMPLES, paired_difference
from pipeline.results.files import csv_text, write_artefact
from pipeline.results.rebalance_result import over_seeds
from pipeline.results.tables import ablation_row, ablation_tables, stacked
from pipeline.text import Shown

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class AblationResult(Shown):
    """The table of an ablation and what it was made from.

    Arguments:
        against: the first variant of class-balanced loss only. A variant is compared with the one of class-balanced loss
            only in its own form and on its own views where there is one, so that the difference is the norm term's.
        rows: of each variant its name, its settings, the chosen head with chosen_on and within_one_se, the mean and
            NAME_std of every measure on the test split over n batch orders, the variant it is compared `against` with the
            differences from it (less_alone), and the published values (paper).
        heads: every head on every split, as in `rebalance`, with its variant.
    """

    name: str
    store: str
    digest: str
    fingerprint: dict[str, Any]
    network: dict[str, Any]
    settings: dict[str, Any]
    against: str | None
    bootstrap: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    heads: tuple[dict[str, Any], ...]
    timing: dict[str, float]
    notes: tuple[str, ...]
    out: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> "Group":
        return stacked(*ablation_tables(self.to_dict()))


def ablate(
    store: Cache | Path | str,
    config: RebalanceConfig,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    report: Callable[[str], object] = lambda line: None,
    move: Callable[[float, float, str], object] = lambda done, total, note: None,
) -> AblationResult:
    """Fit every variant of a configuration, choose a head for each on validation, then test all of them once.

    It writes ablation.json, table.csv (a line for each variant), heads.csv and run.json; selection.json holds all choices
    and is written before the test split is read. `pipeline.report.ablation.write_accuracy_figure` draws it.

    Arguments:
        out: by default ablations/variants beside the store.
        report: called with a line for each variant.
        move: called while the heads of a variant are fitted, as by `rebalance`.
    Raises:
        ConfigError, DataError, PipelineError: as prepare_ablation, before the first fit.
        Terminated: SIGTERM or Ctrl-C; finished variants are kept and the same call goes on.
    """
    with distributed.ranks(device) as ranks:
        started = time.perf_counter()
        prepared = ranks.together(lambda: prepare_ablation(store, config, out=out, ranks=ranks))
        report = report if ranks.first else lambda line: None
        parts = [Unfinished(prepared.out, p.config, prepared.store.digest, ranks, report) for p in prepared.plans]
        with kept_at_signals(parts):
            return _execute(prepared, started, parts, report, move if ranks.first else lambda *moved: None)


def _execute(
    prepared: PreparedRebalance,
    started: float,
    parts: Sequence[Unfinished],
    report: Callable[[str], object],
    move: Callable[[float, float, str], object],
) -> AblationResult:
    ranks, out = prepared.ranks, prepared.out
    loaded = load_together(prepared)
    load_seconds = time.perf_counter() - started
    variants = [variant.name for variant in prepared.config.variants]
    fits: list[Fitted] = []
    for name, plan, unfinished in zip(variants, prepared.plans, parts, strict=True):
        fits.append(fit(plan, loaded, unfinished, report, partial(_named, move, name)))
        report(f"{name}: {fits[-1].selected}" + (f", chosen on {plan.chosen_on}" if plan.chosen_on else ""))
    choices = [_choice(name, fitted) for name, fitted in zip(variants, fits, strict=True)]
    write_choice(out, {"variants": choices}, ranks)

    split, counts = loaded.test(), loaded.features.counts
    tested = [_test(fitted, split, ranks.device) for fitted in fits]
    heads = [
        {"variant": name} | asdict(row_of(head, seed, split_name, scores))
        for name, fitted, of_test in zip(variants, fits, tested, strict=True)
        for split_name, scored in (fitted.sweep.scored | {"test": of_test}).items()
        for (head, seed), scores in scored.items()
        if head in fitted.candidates
    ]
    rates = [hits_of(t, split.labels).rate(f.selected.to_dict()) for f, t in zip(fits, tested, strict=True)]
    rows = []
    for i, (variant, choice, scored) in enumerate(zip(prepared.config.variants, choices, tested, strict=True)):
        reference = _loss_only(i, fits)
        less = None if reference is None else paired_difference(rates[i], rates[reference], split.labels, counts)
        against = None if reference is None else variants[reference]
        rows.append(_row(variant, choice, fits[i], scored) | {"against": against, "less_alone": less})
    notes = [note for fitted in fits for note in fitted.fit_notes(len(loaded.features.labels))]
    result = AblationResult(
        name=out.name,
        **source_facts(prepared, prepared.plans[0].config),
        against=next(
            (name for name, fitted in zip(variants, fits, strict=True) if fitted.selected.method == "cb"), None
        ),
        bootstrap={"resamples": RESAMPLES, "level": LEVEL, "samples": len(split.labels)},
        rows=tuple(rows),
        heads=tuple(heads),
        timing=timing(started, load_seconds, loaded, [f.sweep for f in fits], sum(len(scored) for scored in tested)),
        notes=tuple(dict.fromkeys([*prepared.notes, *loaded.notes, *notes, *untested_notes(split.labels, loaded)])),
        out=str(out),
    )
    if ranks.first:
        _write(result, prepared.config)
    return result


def _named(move: Callable[[float, float, str], object], name: str, done: float, total: float, note: str) -> None:
    move(done, total, f"{name}, {note}")


def _choice(name: str, fitted: Fitted) -> dict[str, Any]:
    """Return the entry of a variant in selection.json."""
    chosen_on, choice = fitted.plan.chosen_on, fitted.choice
    near = [fitted.candidates[i].to_dict() for i in choice.within_one_se]
    entry = {"name": name, **fitted.selected.to_dict(), "chosen_on": chosen_on, "within_one_se": near}
    return entry | ({"score": choice.score, "standard_error": choice.standard_error} if chosen_on else {})


def _test(fitted: Fitted, split: Any, device: Any) -> Scored:
    """Return the scores of a variant's candidates."""
    heads = {key: head for key, head in fitted.sweep.heads.items() if key[0] in fitted.candidates}
    return score(heads, split, fitted.sweep.features.counts, device)


def _loss_only(variant: int, fits: Sequence[Fitted]) -> int | None:
    """Return the variant of class-balanced loss only that one is compared with; None where there is no other."""
    references = [i for i, fitted in enumerate(fits) if fitted.selected.method == "cb"]
    head, config = fits[variant].selected, fits[variant].plan.config
    if variant in references or head.loss != "cb":  # another loss, or another form of it, is compared with the first
        similar = references[:1]
    else:
        form = [i for i in references if cb_form(fits[i].plan.config) == cb_form(config)]
        similar = [i for i in form if fits[i].plan.config.views == config.views] or form or references[:1]
    return next((i for i in similar if i != variant), None)


def _row(variant: Variant, choice: dict[str, Any], fitted: Fitted, scored: Scored) -> dict[str, Any]:
    rows = [row_of(head, seed, "test", scores) for (head, seed), scores in scored.items() if head == fitted.selected]
    facts = choice | {"set": variant.set, "n": len(rows), "n_of": REPETITIONS}
    return facts | over_seeds(rows) | {"paper": variant.paper}


def _write(result: AblationResult, config: RebalanceConfig) -> None:
    """Write every file of the result; ablation.json last, so that it never stands beside files that are missing."""
    out, document = Path(result.out), result.to_dict()
    for kind in ("png", "csv"):
        (out / f"accuracy-lambda.{kind}").unlink(missing_ok=True)  # drawn of results that were here before
    write_durably(out / "table.csv", csv_text([ablation_row(row) for row in result.rows]))
    write_durably(out / "heads.csv", csv_text(result.heads))
    write_run(out, config, result)
    write_artefact(out / "ablation.json", "ablation", recorded_document(document, out))
    remove_unfinished(out)
