"""Plans of run and reproduce: their stages one after the other, those that wait for another by arithmetic alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.backbone.external_checkpoint import load_external_for_run
from pipeline.backbone.prepare import prepare_training
from pipeline.config import Config
from pipeline.distributed import Ranks, planned_ranks
from pipeline.dump_prepare import describe_unmade, prepare_dump
from pipeline.errors import ConfigError
from pipeline.plan.stage2 import stage2_plan
from pipeline.prepared import Prepared, Write, device_numbers, replaced_or_new
from pipeline.reproduce.backbone import METHODS, TABLES, settings_of
from pipeline.reproduce.run import Part, plan, refuse_unknown
from pipeline.run import (
    ExternalBackbone,
    places_of,
    reach,
    refuse_endless,
    refuse_other_kind,
    store_of_seed,
    told_what_stays,
    with_seed,
)


def plan_run(
    config: Config,
    *,
    out: Path,
    store: Path | str | None = None,
    seeds: Sequence[int] | None = None,
    external: ExternalBackbone | None = None,
    device: str = "auto",
    world: int = 1,
    overwrite: bool = False,
) -> Prepared:
    """What `run_pipeline` would do; raises what it would raise before its first step."""
    external = external or (ExternalBackbone() if config.backbone.frozen else None)
    places = places_of(config, out, seeds, external)
    ranks = planned_ranks(device, world)
    refuse_other_kind(out, seeds)
    reach(store)
    parts: list[Prepared] = []
    for place, of_one in places.items():
        where_to = store_of_seed(place, store, named=bool(seeds))
        title = place.name if seeds else ""
        with told_what_stays(where_to):
            stages = _stages(of_one, place, where_to, ranks, external, overwrite=overwrite, name=title)
        parts += [_without_data(stage) for stage in stages] if parts else stages
    report = Write(out / "report.html", None, replaced_or_new(out / "report.html"))
    numbers = {"out": str(out), "seeds": list(seeds or [config.backbone.seed])} | device_numbers(
        ranks, parts[0].numbers["precision"]
    )
    return Prepared("run", config.model_dump(mode="json"), {}, numbers, (report,), (), tuple(parts))


def _stages(
    config: Config,
    place: Path,
    store: Path | str,
    ranks: Ranks,
    external: ExternalBackbone | None,
    *,
    overwrite: bool,
    name: str,
) -> list[Prepared]:
    """Stages 1, dump and 2 of one backbone; data are told once."""
    title = f"{name}: " if name else ""
    if external:
        backbone, images = load_external_for_run(
            external.path, config, place / "backbone", model=external.model, key_map=external.key_map, probe=external.probe,
            overwrite=overwrite, ranks=replace(ranks, world=1),
        )  # fmt: skip
        config, width = backbone.config, backbone.network["feature_width"]
        dump = prepare_dump(
            backbone, config, out=store, images=images, keep_in=place / "backbone", overwrite=overwrite,
            device=str(ranks.device), world=ranks.world,
        )  # fmt: skip
        stages, dataset = [dump.description], images
    else:
        training = prepare_training(config, out=place / "backbone", ranks=ranks, overwrite=overwrite)
        dataset, width = training.dataset, training.network["feature_width"]
        if training.complete:
            from pipeline.backbone.checkpoint import load_checkpoint

            backbone = load_checkpoint(place / "backbone" / "last.pt")
            stage = prepare_dump(
                backbone, config, out=store, images=dataset, overwrite=overwrite, device=str(ranks.device),
                world=ranks.world,
            ).description  # fmt: skip
        else:
            stage = describe_unmade(config, dataset, out=store, ranks=ranks, network=training.network)
        stages = [training.description, stage]
    refuse_endless(config, dataset)
    results = place / "rebalance" / "results.json"
    state = "kept where it is of the same features and settings, else replaced" if results.is_file() else "new"
    fit = stage2_plan(
        config.rebalance, out=results.parent, rows=len(dataset.train), classes=len(dataset.class_names), width=width,
        views=config.dump.views, ranks=ranks, state=state,
    )  # fmt: skip
    first, *others = stages
    return [replace(stage, title=title + stage.command) for stage in (first, *map(_without_data, others), fit)]


def _without_data(stage: Prepared) -> Prepared:
    """A stage whose data and network were told before."""
    told = {name: text for name, text in stage.facts.items() if name not in ("data", "classes", "network")}
    return replace(stage, facts=told, notes=())


def plan_reproduce(
    parts: Sequence[Part] | None = None,
    *,
    out: Path,
    folder: Path | None = None,
    tables: Sequence[str] = TABLES,
    device: str = "auto",
) -> Prepared:
    """What `reproduce` would do; raises what it would raise before its first step."""
    refuse_unknown(tables)
    ranks = planned_ranks(device, 1)
    stages: list[Prepared] = []
    for part in plan() if parts is None else parts:
        for seed in part.seeds:
            place, config = out / part.config.name / f"seed-{seed}", with_seed(part.config, seed)
            training, dump, _ = _stages(
                config,
                place,
                place / "features.zarr",
                ranks,
                None,
                overwrite=False,
                name=f"{part.config.name}, seed {seed}",
            )
            rows, width = training.numbers["dataset"], training.numbers["network"]["feature_width"]
            stages += [_without_data(training) if stages else training, dump]
            for table in tables:
                file = place / table / ("results.json" if table == METHODS else "ablation.json")
                state = "kept where it is of the same features and settings, else replaced" if file.is_file() else "new"
                settings = settings_of(table, config.rebalance)
                fit = stage2_plan(
                    settings, out=place / table, rows=rows["train"], classes=rows["classes"], width=width,
                    views=config.dump.views, ranks=ranks, state=state,
                )  # fmt: skip
                stages.append(replace(fit, title=f"{part.config.name}, seed {seed}: {table}"))
    if not stages:
        raise ConfigError("nothing to reproduce: give a configuration")
    page = (folder or out) / "reproduction.md"
    numbers = {"out": str(out), "tables": list(tables)} | device_numbers(ranks, stages[0].numbers["precision"])
    writes = (Write(page, None, replaced_or_new(page)), Write(out / "keep", None, "kept files"))
    return Prepared("reproduce", {}, {}, numbers, writes, (), tuple(stages))
