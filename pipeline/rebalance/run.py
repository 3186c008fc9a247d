"""Stage 2 from a store to a table: fit, validate, choose, write the choice, and only then look at the test split."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache import Cache, write_durably
from pipeline import distributed
from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError
from pipeline.metrics import scarce, unmeasured
from pipeline.paths import recorded_document, recorded_path, results_folder
from pipeline.provenance import provenance
from pipeline.rebalance.compare import Comparison, compare
from pipeline.rebalance.folds import CAVEAT
from pipeline.rebalance.load import Loaded, load
from pipeline.rebalance.methods.settings import REFERENCES, candidates, is_trained, references, resolved
from pipeline.rebalance.overwrite_check import refuse_foreign, replaced
from pipeline.rebalance.selection import AUTO, at_the_border, count_lam, parse_lam, refine
from pipeline.rebalance.sweep import Scored, Sweep, score
from pipeline.rebalance.tuning import is_comparison, refuse_double_balancing
from pipeline.resources import free_memory
from pipeline.results.differences import Hits, differences
from pipeline.results.head_id import HeadId
from pipeline.results.heads import heads_file
from pipeline.results.rebalance_result import (
    MEASURES,
    RebalanceResult,
    Row,
    mean_and_std,
    per_class_csv,
    rows_csv,
    trials_csv,
)
from pipeline.results.selection import Choice
from pipeline.store_settings import store_settings

HEAD_BYTES, COPIES = 4096, 3  # of a head: its rows and scores; its numbers as fitted, stacked and written
PAPER_STEPS, PAPER_LR = 1700, 0.005  # of stage 2 on CIFAR100-LT


def rebalance(
    store: Cache | Path | str,
    config: RebalanceConfig | None = None,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    report: Callable[[str], object] = lambda line: None,
) -> RebalanceResult:
    """Fits every head the configuration asks for on the cached features, chooses one on validation, tests once.

    config: by default the store's own; out: by default rebalance/ beside the store.
    Beside what is asked for stand the reference rows: the stage-1 head, the classification loss alone, iwb at λ = 0.
    Where methods compete each is tuned first (tuning.py), and report is told a line on it; before anything is fitted,
    which results of other settings out holds, for they are replaced. Writes results.json, results.csv, per_class.csv,
    heads.safetensors and run.json under out, and trials.csv where methods were tuned; selection.json holds the choice
    and is written before the test split is read. Under torchrun the ranks share the work as config.spread says, and the
    first one writes. Raises ConfigError, DataError, and OSError where out cannot be written to.
    """
    with distributed.ranks(device) as ranks:
        chosen = config or ranks.together(lambda: store_settings(store))
        folder = Path(out or results_folder(store))
        ranks.together(lambda: refuse_foreign(folder))
        return _rebalance(store, chosen, folder, ranks, report if ranks.first else lambda line: None)


def _rebalance(
    store: Cache | Path | str, config: RebalanceConfig, out: Path, ranks: Ranks, report: Callable[[str], object]
) -> RebalanceResult:
    started = time.perf_counter()
    loaded, config, notes = ranks.together(lambda: prepare(store, config))
    load_seconds = time.perf_counter() - started
    if ranks.first and (lost := replaced(out, config, loaded.store.digest)):
        report(lost)

    sweep, asked, split, tuned = fit(loaded, config, ranks, report, beside=references(config))
    choice = sweep.choose(asked, split) if split else Choice(0, math.nan, math.nan, ())
    chosen, near = asked[choice.index], [asked[i].to_dict() for i in choice.within_one_se]
    selected = chosen.to_dict() | {"chosen_on": split} | ({"parameters": chosen.parameters} if tuned else {})
    against: dict[str, dict[str, Any] | None] = {role: setting.to_dict() for role, setting in REFERENCES.items()}
    against["runner_up"] = None if choice.runner_up is None else asked[choice.runner_up].to_dict()
    said: dict[str, Any] = {"selected": selected}
    if split:
        said |= {"score": choice.score, "standard_error": choice.standard_error, "runner_up": against["runner_up"]}
    write_choice(out, said | {"within_one_se": near}, ranks)

    test = loaded.test()
    scored = sweep.scored | {"test": score(sweep.heads, test, loaded.features.counts, ranks.device)}
    hits = hits_of(scored["test"], test.labels)
    rows = [row_of(*key, name, scores) for name, of in scored.items() for key, scores in of.items()]
    tested = [r for r in rows if r.split == "test" and (r.method, r.loss, r.lam) == tuple(chosen.to_dict().values())]
    stage_1 = next(r for r in rows if r.split == "test" and r.method == "baseline")
    reading = loaded.views.seconds
    border = at_the_border(chosen.lam, [s.lam for s in asked], auto=parse_lam(config.lam) is None)
    result = RebalanceResult(
        store=str(loaded.store.path),
        digest=loaded.store.digest,
        fingerprint=loaded.store.fingerprint,
        network=network_of(loaded.store),
        settings=resolved(config)
        | {"device": str(ranks.device), "ranks": ranks.world}
        | {"views_stored": loaded.store.views("train")},
        baseline={m: getattr(stage_1, m) for m in MEASURES},
        selected=selected | {"n": len(tested), "n_of": "batch orders of one backbone"} | mean_and_std(tested),
        candidates=tuple(setting.to_dict() for setting in asked),
        within_one_se=tuple(near),
        differences=differences(chosen.to_dict(), against, [hits]),
        results=tuple(rows),
        timing={
            "load_s": round(load_seconds + reading, 3),
            "fit_s": round(sweep.fit_seconds - reading, 3),
            "heads": sweep.fitted,
            "total_s": round(time.perf_counter() - started, 3),
        },
        notes=tuple(
            [*loaded.notes, *notes]
            + ([CAVEAT] if split == "kfold" else [])
            + ([] if tuned else little_training(config, asked, len(loaded.features.labels)))
            + (tuned.notes if tuned else border if split else [])
            + scarce(test.labels, loaded.features.counts)
            + untested(test.labels, loaded.store)
        ),
        out=str(out),
        chosen=tuple(tuned.chosen if tuned else ()),
        trials=tuple(tuned.trials if tuned else ()),
    )
    if ranks.first:
        write_durably(out / "test_hits.safetensors", hits.to_bytes())
        _write(result, sweep, scored, loaded, config, chosen)
    return result


def prepare(store: Cache | Path | str, config: RebalanceConfig) -> tuple[Loaded, RebalanceConfig, list[str]]:
    """(the store's features, the configuration with the views there are, notes), once nothing speaks against fitting.

    Raises ConfigError and DataError as `rebalance` does.
    """
    count_lam(config.lam), candidates(config, ())  # a typing error is told before anything is read
    refuse_double_balancing(config)
    loaded = load(store, augmented=config.views == "augmented", memory_bytes=config.memory_bytes)
    possible, notes = with_possible_views(config, loaded)
    refuse_too_many(possible, loaded)
    return loaded, possible, notes


def choosing_split(config: RebalanceConfig, asked: Sequence[HeadId], loaded: Loaded) -> str | None:
    """What a setting is chosen on, None where there is but one; ConfigError where the store has no validation split."""
    split = config.select_on if len(asked) > 1 or is_comparison(config) else None
    if split == "val" and loaded.val is None:
        raise ConfigError(
            f"{loaded.store.path}: no validation split to choose on; choose over folds of the training features with "
            "--select-on kfold, or give a single λ such as --lam 0.1"
        )
    return split


def write_choice(out: Path, choice: Any, ranks: Ranks) -> None:
    """selection.json, on the disk before any rank goes on: what is read after this cannot have chosen."""
    text = json.dumps(choice, indent=1)
    ranks.together(lambda: write_durably(out / "selection.json", text) if ranks.first else None)


def fit(
    loaded: Loaded,
    config: RebalanceConfig,
    ranks: Ranks,
    report: Callable[[str], object],
    *,
    beside: Sequence[HeadId] = (),
) -> tuple[Sweep, list[HeadId], str | None, Comparison | None]:
    """(all heads fitted and scored, the settings to choose among, what to choose on: None where there is but one, what
    tuning found)."""
    lams = parse_lam(config.lam)
    asked = candidates(config, AUTO if lams is None else lams)
    split = choosing_split(config, asked, loaded)
    sweep = Sweep(loaded.features, loaded.val, config, ranks, folds=split == "kfold")
    if split and is_comparison(config):
        tuned = compare(sweep, config, split, report)
        return sweep, tuned.winners, split, tuned
    sweep.add([*beside, *asked])
    if lams is None and split and (coarse := [s for s in asked if s.method == "iwb"]):
        near = {coarse[i].lam for i in sweep.choose(coarse, split).within_one_se}
        asked = candidates(config, sorted({*AUTO, *refine(AUTO, [lam for lam in near if lam is not None])}))
        sweep.add(asked)
    return sweep, asked, split, None


def with_possible_views(config: RebalanceConfig, loaded: Loaded) -> tuple[RebalanceConfig, list[str]]:
    """The configuration with the views there are, and what is to be said about it."""
    if config.views == "augmented" and len(loaded.features.views) == 1:
        if "views" in config.model_fields_set:
            raise ConfigError(
                f"{loaded.store.path}: has the clean view alone; take --views clean, or dump again: "
                "pipeline dump-features … --views N --overwrite"
            )
        return config.model_copy(update={"views": "clean"}), ["the store has the clean view alone: no augmentation"]
    return config, []


def little_training(config: RebalanceConfig, asked: Sequence[HeadId], rows: int) -> list[str]:
    """What a person should know of heads that moved less than a quarter as far as the paper's can: steps × learning rate."""
    steps = config.epochs * math.ceil(rows / config.batch_size)
    if not any(is_trained(setting) for setting in asked) or steps * config.lr >= PAPER_STEPS * PAPER_LR / 4:
        return []
    return [
        f"stage 2 took {steps:,} steps at a learning rate of {config.lr:g}, little beside the {PAPER_STEPS:,} at "
        f"{PAPER_LR:g} of the paper on CIFAR100-LT, so these heads may be under-fitted: --tune chooses the learning rate on "
        + ("validation" if config.select_on == "val" else "held-out folds")
    ]


def untested(labels: np.ndarray, store: Cache) -> list[str]:
    """What a person should know of classes without a test sample among these labels (N,)."""
    return unmeasured(np.bincount(labels, minlength=len(store.class_names)), store.class_names, "test")


def refuse_too_many(config: RebalanceConfig, loaded: Loaded) -> None:
    """ConfigError where more λ are asked for than memory holds heads and what is kept of each; nothing was made yet."""
    samples = sum(loaded.store.rows(split) for split in loaded.store.splits if split != "train")
    each = len(config.seeds) * (
        HEAD_BYTES + COPIES * 4 * (loaded.features.weight.size + len(loaded.features.bias)) + samples
    )
    free, asked = free_memory(), count_lam(config.lam)
    most = max(1, free // 2 // each)
    if asked > most:
        raise ConfigError(
            f"--lam {config.lam}: {asked:,} λ in {len(config.seeds)} batch orders would take {asked * each / 2**30:,.0f} "
            f"GiB of memory for their heads, {free / 2**30:,.1f} are free; at most {most:,} λ fit, such as "
            f"--lam 0.01:1:log:{min(most, 32)}"
        )


def hits_of(scored: Scored, labels: np.ndarray) -> Hits:
    """What Hits needs, of heads scored on the test split."""
    heads = [setting.to_dict() | {"seed": seed} for setting, seed in scored]
    of = list(scored.values())
    return Hits(heads, np.stack([scores.hit for scores in of]), np.asarray(labels), of[0].counts)


def row_of(setting: HeadId, seed: int | None, split: str, scores: Any) -> Row:
    return Row(**setting.to_dict(), seed=seed, split=split, **scores.summary)


def network_of(store: Cache) -> dict[str, Any]:
    """What every number must stand beside, as far as the store knows it."""
    known = store.provenance.get("network")
    facts = dict(known) if isinstance(known, dict) else {}
    return {"network": store.fingerprint.get("network", "unknown")} | facts | {"feature_width": store.width}


def _write(
    result: RebalanceResult,
    sweep: Sweep,
    scored: dict[str, Scored],
    loaded: Loaded,
    config: RebalanceConfig,
    chosen: HeadId,
) -> None:
    """Every file of the result; results.json last, so that it never speaks of files that are not there."""
    out, names = Path(result.out), loaded.store.class_names
    heads = [(s.to_dict() | {"seed": seed, "selected": s == chosen}, head) for (s, seed), head in sweep.heads.items()]
    facts = {"class_names": list(names), "network": result.network, "store_digest": result.digest}
    write_durably(out / "heads.safetensors", heads_file(heads, facts))
    shown = [s.to_dict() for s in (*references(config), chosen)]
    lines = [
        (*key, name, scores) for name, of in scored.items() for key, scores in of.items() if key[0].to_dict() in shown
    ]
    write_durably(out / "per_class.csv", per_class_csv(lines, names))
    write_durably(out / "results.csv", rows_csv(result.results))
    if result.trials:
        write_durably(out / "trials.csv", trials_csv(result.trials))
    else:
        (out / "trials.csv").unlink(missing_ok=True)  # of results that stood here before
    run = provenance(
        command="rebalance",
        config=config.model_dump(mode="json"),
        device=result.settings["device"],
        seed=list(config.seeds),
        made_from={"store": recorded_path(result.store, out), "digest": result.digest},
        network=result.network,
    )
    write_durably(out / "run.json", json.dumps(run, indent=1))
    write_durably(out / "results.json", json.dumps(recorded_document(result.to_dict(), out), indent=1, allow_nan=False))
