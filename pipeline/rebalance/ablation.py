"""Variants of stage 2 side by side: each fitted and chosen for itself on validation, all tested once."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import Cache, write_durably
from pipeline import distributed
from pipeline.config import RebalanceConfig, Variant
from pipeline.distributed import Ranks
from pipeline.paths import recorded_document, recorded_path, results_folder
from pipeline.provenance import provenance
from pipeline.rebalance.folds import CAVEAT
from pipeline.rebalance.load import Loaded, load
from pipeline.rebalance.methods.settings import candidates, cb_form, resolved
from pipeline.rebalance.run import (
    fit,
    hits_of,
    little_training,
    network_of,
    refuse_too_many,
    row_of,
    untested,
    with_possible_views,
    write_choice,
)
from pipeline.rebalance.selection import count_lam
from pipeline.rebalance.sweep import Scored, Sweep, score
from pipeline.rebalance.tuning import refuse_double_balancing
from pipeline.results.differences import LEVEL, RESAMPLES, paired_difference
from pipeline.results.head_id import HeadId
from pipeline.results.rebalance_result import csv_text, mean_and_std
from pipeline.results.selection import Choice
from pipeline.text import Shown

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class AblationResult(Shown):
    """The table of an ablation and what it was made from.

    rows: of each variant its name, what it sets, the chosen setting with chosen_on and within_one_se, the mean and NAME_std
    of every measure on the test split over n batch orders, how it differs there from the variant `against` (less_alone), and
    what the paper says. A variant is held against class-balanced loss alone in the form and on the views that it has itself,
    where the ablation has such a row, so that the difference is the norm term's; else against the first such row, which is
    the `against` of the whole.
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
        from pipeline.report.ablation import ablation_tables

        return ablation_tables(self.to_dict())


@dataclass(frozen=True, eq=False)
class Fitted:
    """A variant with its heads and what was chosen for it.

    on: the split, None where a single setting was given; form: of its class-balanced loss; views: that it was fitted on.
    """

    variant: Variant
    sweep: Sweep
    asked: list[HeadId]
    choice: Choice
    on: str | None
    form: str
    views: str

    @property
    def chosen(self) -> HeadId:
        return self.asked[self.choice.index]

    @property
    def told(self) -> dict[str, Any]:
        """What selection.json says of it."""
        near = [self.asked[i].to_dict() for i in self.choice.within_one_se]
        told = {"name": self.variant.name, **self.chosen.to_dict(), "chosen_on": self.on, "within_one_se": near}
        return told | ({"score": self.choice.score, "standard_error": self.choice.standard_error} if self.on else {})

    def test(self, split: Any, device: Any) -> Scored:
        """Scores of the heads that were asked for."""
        heads = {key: head for key, head in self.sweep.heads.items() if key[0] in self.asked}
        return score(heads, split, self.sweep.features.counts, device)


def ablate(
    store: Cache | Path | str,
    config: RebalanceConfig,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    report: Callable[[str], object] = lambda line: None,
) -> AblationResult:
    """Fits every variant of the configuration, chooses a setting for each on validation, then tests all of them once.

    out: by default ablations/variants beside the store.
    report is told a line on each. Writes ablation.json, table.csv (a line a variant), heads.csv, run.json and, where a
    variant has several λ, accuracy-lambda.png with its numbers as .csv under out; selection.json holds all choices and is
    written before the test split is read. Raises as `rebalance` does.
    """
    with distributed.ranks(device) as ranks:
        folder = Path(out or results_folder(store, "ablations") / "variants")
        return _ablate(store, config, folder, ranks, report if ranks.first else lambda line: None)


def _ablate(
    store: Cache | Path | str, config: RebalanceConfig, out: Path, ranks: Ranks, report: Callable[[str], object]
) -> AblationResult:
    started = time.perf_counter()
    configs = [config.with_variant(variant) for variant in config.variants]

    def prepare() -> Loaded:
        for of_one in configs:
            count_lam(of_one.lam), candidates(of_one, ())
            refuse_double_balancing(of_one)
        augmented = any(of_one.views == "augmented" for of_one in configs)
        return load(store, augmented=augmented, memory_bytes=config.memory_bytes)

    loaded = ranks.together(prepare)
    load_seconds = time.perf_counter() - started
    fitted, notes = [], list(loaded.notes)
    for variant, asked_for in zip(config.variants, configs, strict=True):
        possible, told = with_possible_views(asked_for, loaded)
        refuse_too_many(possible, loaded)
        sweep, asked, on, tuned = fit(loaded, possible, ranks, report)
        choice = sweep.choose(asked, on) if on else Choice(0, math.nan, math.nan, ())
        fitted.append(Fitted(variant, sweep, asked, choice, on, cb_form(possible), possible.views))
        report(f"{variant.name}: {fitted[-1].chosen}" + (f", chosen on {on}" if on else ""))
        notes += told + ([CAVEAT] if on == "kfold" else [])
        notes += [] if tuned else little_training(possible, asked, len(loaded.features.labels))
    write_choice(out, [f.told for f in fitted], ranks)

    split = loaded.test()
    notes += untested(split.labels, loaded.store)
    tested = [f.test(split, ranks.device) for f in fitted]
    heads = [
        {"variant": f.variant.name} | asdict(row_of(s, seed, name, scores))
        for f, of_test in zip(fitted, tested, strict=True)
        for name, scored in (f.sweep.scored | {"test": of_test}).items()
        for (s, seed), scores in scored.items()
        if s in f.asked
    ]
    rates = [hits_of(of, split.labels).rate(f.chosen.to_dict()) for f, of in zip(fitted, tested, strict=True)]
    counts, alone = loaded.features.counts, [_alone(i, fitted) for i in range(len(fitted))]
    rows = [
        _variant_row(f, of)
        | {"against": None if other is None else fitted[other].variant.name}
        | {"less_alone": None if other is None else paired_difference(rates[i], rates[other], split.labels, counts)}
        for i, (f, of, other) in enumerate(zip(fitted, tested, alone, strict=True))
    ]
    result = AblationResult(
        name=out.name,
        store=str(loaded.store.path),
        digest=loaded.store.digest,
        fingerprint=loaded.store.fingerprint,
        network=network_of(loaded.store),
        settings=resolved(configs[0])
        | {"device": str(ranks.device), "ranks": ranks.world}
        | {"views_stored": loaded.store.views("train")},
        against=next((f.variant.name for f in fitted if f.chosen.method == "cb"), None),
        bootstrap={"resamples": RESAMPLES, "level": LEVEL, "samples": len(split.labels)},
        rows=tuple(rows),
        heads=tuple(heads),
        timing={
            "load_s": round(load_seconds + loaded.views.seconds, 3),
            "fit_s": round(sum(f.sweep.fit_seconds for f in fitted) - loaded.views.seconds, 3),
            "heads": sum(len(of) for of in tested),
            "total_s": round(time.perf_counter() - started, 3),
        },
        notes=tuple(dict.fromkeys(notes)),
        out=str(out),
    )
    if ranks.first:
        _write(result, config)
    return result


def _alone(variant: int, fitted: Sequence[Fitted]) -> int | None:
    """The variant of class-balanced loss alone that one is held against; None where there is no other."""
    those = [i for i, f in enumerate(fitted) if f.chosen.method == "cb"]
    mine = fitted[variant]
    if variant in those or mine.chosen.loss != "cb":  # another loss, or another form of it, is held against the first
        alike = those[:1]
    else:
        same = [i for i in those if fitted[i].form == mine.form]
        alike = [i for i in same if fitted[i].views == mine.views] or same or those[:1]
    return next((i for i in alike if i != variant), None)


def _variant_row(fitted: Fitted, tested: Scored) -> dict[str, Any]:
    rows = [row_of(s, seed, "test", scores) for (s, seed), scores in tested.items() if s == fitted.chosen]
    facts = fitted.told | {"set": fitted.variant.set, "n": len(rows), "n_of": "batch orders of one backbone"}
    return facts | mean_and_std(rows) | {"paper": fitted.variant.paper}


def _write(result: AblationResult, config: RebalanceConfig) -> None:
    """Every file of the result; ablation.json last, so that it never speaks of files that are not there."""
    from pipeline.report.ablation import accuracy_figure, plain_row
    from pipeline.report.axes import png

    out, document = Path(result.out), result.to_dict()
    drawn = accuracy_figure(document)
    if drawn:
        write_durably(out / "accuracy-lambda.png", png(drawn.figure))
        write_durably(out / "accuracy-lambda.csv", drawn.csv)
    else:
        for kind in ("png", "csv"):
            (out / f"accuracy-lambda.{kind}").unlink(missing_ok=True)  # of results that stood here before
    write_durably(out / "table.csv", csv_text([plain_row(row) for row in result.rows]))
    write_durably(out / "heads.csv", csv_text(result.heads))
    run = provenance(
        command="rebalance",
        config=config.model_dump(mode="json"),
        device=result.settings["device"],
        seed=list(config.seeds),
        made_from={"store": recorded_path(result.store, out), "digest": result.digest},
        network=result.network,
    )
    write_durably(out / "run.json", json.dumps(run, indent=1))
    write_durably(out / "ablation.json", json.dumps(recorded_document(document, out), indent=1, allow_nan=False))
