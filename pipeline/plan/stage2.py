"""Prepared of rebalance: the store, the heads that would be fitted, the steps."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from cache import Cache, refuse_unwritable
from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks, planned_ranks
from pipeline.paths import results_folder
from pipeline.prepared import Prepared, Write, classes_text, device_numbers, device_text
from pipeline.rebalance.methods.settings import asked_methods, candidates, is_trained, references
from pipeline.rebalance.overwrite_check import refuse_foreign
from pipeline.rebalance.run import choosing_split, network_of, prepare
from pipeline.rebalance.selection import AUTO, parse_lam
from pipeline.rebalance.tuning import is_comparison
from pipeline.results.head_id import HeadId
from pipeline.store_settings import store_settings


def plan_rebalance(
    store: Cache | Path | str,
    config: RebalanceConfig | None = None,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    world: int = 1,
) -> Prepared:
    """What `rebalance`, or `ablate` where the configuration lists variants, would do; raises what it would raise before
    its first step. The training features are not read: a damaged chunk of theirs is not noticed.
    """
    ranks, config = planned_ranks(device, world), config or store_settings(store)
    configs = variants_of(config)
    prepared = [prepare(store, of_one) for of_one in configs]
    loaded = prepared[0][0]
    for of_one, (_, possible, _) in zip(configs, prepared, strict=True):
        choosing_split(possible, _asked(of_one), loaded)
    folder = Path(out or results_folder(store, "ablations" if config.variants else "rebalance"))
    refuse_unwritable(folder)
    refuse_foreign(folder)
    cache, rows = loaded.store, int(loaded.features.counts.sum())
    file = folder / ("ablation.json" if config.variants else "results.json")
    views = loaded.store.views("train")
    fitted = [possible for _, possible, _ in prepared]
    numbers = stage2_numbers(fitted, rows=rows, views=views, beside=not config.variants)
    facts = {
        "store": f"{cache.path}: {', '.join(f'{cache.rows(s):,} {s}' for s in cache.splits)}; {views} view(s), "
        f"{cache.width} features each",
        "classes": classes_text(cache.class_names, np.asarray(loaded.features.counts)),
        "fits": fits_text(configs, numbers),
        "on": device_text(ranks, "float32"),
    }
    size = None if config.variants else heads_bytes(numbers["heads"], classes=len(cache.counts), width=cache.width)
    return Prepared(
        "rebalance",
        {"rebalance": config.model_dump(mode="json")},
        facts,
        {"store": str(cache.path), "digest": cache.digest, "network": network_of(cache), **numbers}
        | device_numbers(ranks, "float32"),
        (Write(folder, size, "results there are replaced" if file.is_file() else "new"),),
        tuple(dict.fromkeys([*loaded.notes, *(note for *_, notes in prepared for note in notes)])),
    )


def variants_of(config: RebalanceConfig) -> list[RebalanceConfig]:
    """The settings of every variant, or the configuration itself where it lists none."""
    return [config.with_variant(variant) for variant in config.variants] or [config]


def stage2_numbers(configs: Sequence[RebalanceConfig], *, rows: int, views: int, beside: bool = True) -> dict[str, Any]:
    """Numbers of one configuration, or of several variants: heads that are fitted, steps of all batch orders.

    heads_at_least: whether more may follow, where λ is `auto` or methods are tuned. beside: whether reference rows are too.
    """
    heads, steps, more = 0, 0, False
    for config in configs:
        asked = dict.fromkeys([*(references(config) if beside else []), *_asked(config)])
        trained = sum(is_trained(setting) for setting in asked)
        if is_comparison(config):
            trained = sum(config.trials for method in asked_methods(config.method) if is_trained(HeadId(method)))
        heads += trained * len(config.seeds)
        steps += config.epochs * ceil(rows / config.batch_size) * len(config.seeds)
        more |= is_comparison(config) or (config.lam.strip() == "auto" and "iwb" in asked_methods(config.method))
    first = configs[0]
    told = {"epochs": first.epochs, "seeds": list(first.seeds), "views": 1 if first.views == "clean" else views}
    return {"heads": heads, "heads_at_least": more, "steps": steps, **told}


def fits_text(configs: Sequence[RebalanceConfig], numbers: dict[str, Any]) -> str:
    config = configs[0]
    methods = ", ".join(asked_methods(config.method)) if len(configs) == 1 else f"{len(configs)} variants"
    about = "at least " if numbers["heads_at_least"] else ""
    tuned = f"; each trained method is tuned in {config.trials} trials" if is_comparison(config) else ""
    return (
        f"{methods}, λ {config.lam}: {about}{numbers['heads']:,} heads in {len(config.seeds)} batch order(s), "
        f"{numbers['steps']:,} steps of {config.batch_size} features in {config.epochs} epochs{tuned}"
    )


def heads_bytes(heads: int, *, classes: int, width: int) -> int:
    """What heads.safetensors takes at least, the head it starts from among them; results.json and the like are small."""
    return (heads + 1) * classes * (width + 1) * 4


def stage2_plan(
    config: RebalanceConfig, *, out: Path, rows: int, classes: int, width: int, views: int, ranks: Ranks, state: str
) -> Prepared:
    """The plan of a rebalance of a store that is not there yet."""
    configs = variants_of(config)
    numbers = stage2_numbers(configs, rows=rows, views=views, beside=not config.variants)
    return Prepared(
        "rebalance",
        {"rebalance": config.model_dump(mode="json")},
        {"fits": fits_text(configs, numbers), "on": device_text(ranks, "float32")},
        numbers | device_numbers(ranks, "float32"),
        (Write(out, heads_bytes(numbers["heads"], classes=classes, width=width), state),),
    )


def _asked(config: RebalanceConfig) -> list[HeadId]:
    lams = parse_lam(config.lam)
    return candidates(config, AUTO if lams is None else lams)
