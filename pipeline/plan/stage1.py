"""Plans of train-backbone and dump-features: the same data, network and checks, without a step."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache import CacheError, Foreseen, Layout, Lock, chunk_rows, foresee_store, is_url, refuse_unwritable
from pipeline.backbone.build import (
    augmentation_facts,
    build_model,
    check_input,
    input_transform,
    network_facts,
)
from pipeline.backbone.hparam_sweep import grid, refuse_without_validation
from pipeline.backbone.losses import Objective
from pipeline.backbone.mixup import Mixup
from pipeline.backbone.precision import choose_precision, forward_operations, name_of
from pipeline.backbone.sampling import refuse_empty_shares, steps_of
from pipeline.backbone.training_dir import TrainingFolder, identity_of, refuse_among_images, refuse_frozen
from pipeline.backbone.weakening import Weakening, check_place
from pipeline.config import Config
from pipeline.data import Dataset, load_dataset
from pipeline.distributed import Ranks, planned_ranks
from pipeline.dump import as_data_error, encoding_precision, fitting, store_of
from pipeline.dump_source import Source, find_source
from pipeline.errors import DataError, PipelineError
from pipeline.prepared import Prepared, Write, data_facts, device_numbers, device_text

RECORD, REST, LINE = (
    250,
    8_500,
    700,
)  # bytes of a checkpoint beside each tensor's numbers, of its other content, of an epoch
STATES = {
    "new": "new",
    "sealed": "complete, nothing is missing",
    "open": "unfinished, goes on",
    "damaged": "damaged chunks are computed again",
    "replaced": "what is there is replaced",
}


@dataclass(frozen=True, eq=False)
class Training:
    """A training as it would begin: what is left of it, and what its network is."""

    plan: Prepared
    dataset: Dataset
    network: dict[str, Any]
    complete: bool


def plan_training(
    config: Config, *, out: Path | str, device: str = "auto", world: int = 1, overwrite: bool = False
) -> Prepared:
    """What `train_backbone` would do with `world` processes; raises what it would raise before its first step."""
    return foresee_training(config, out=Path(out), ranks=planned_ranks(device, world), overwrite=overwrite).plan


def foresee_training(config: Config, *, out: Path, ranks: Ranks, overwrite: bool) -> Training:
    settings = config.backbone
    refuse_frozen(settings)
    dataset = load_dataset(config.data)
    refuse_among_images(out, config.data)
    try:
        refuse_unwritable(out)
        Lock(out).refuse_held()
    except CacheError as error:
        raise DataError(f"{error}; --out names another folder") from error
    except OSError as error:
        raise PipelineError(f"{out}: {error.strerror}; choose a folder you may write to with --out") from error
    steps, rows, names = steps_of(len(dataset.train), settings.batch_size), len(dataset.train), dataset.class_names
    cpu = torch.device("cpu")
    weakening = Weakening(settings.weaken, dataset.train.labels, dataset.counts, seed=settings.seed, device=cpu)
    mixup = Mixup(settings.mixup, group=settings.weaken.group, seed=settings.seed, device=cpu)
    group = max(weakening.group, mixup.group)
    refuse_empty_shares(rows // steps, ranks.world, settings.accumulate, group=group)
    transform = input_transform(config.data, settings, dataset.train)
    model = build_model(settings.model_copy(update={"pretrained": False}), num_classes=len(names))
    check_input(model, transform, cpu)
    operations = forward_operations(model, transform.size, cpu)
    precision = name_of(choose_precision(settings.precision, ranks.device, operations=operations))
    check_place(model, settings.weaken.at, size=transform.size, device=cpu)
    network = network_facts(settings, model) | augmentation_facts(settings, transform)
    Objective(settings, dataset.counts, device=cpu)
    folder = TrainingFolder(
        out, identity_of(settings, dataset=dataset.training_fingerprint, transform=transform.to_dict())
    )
    state, why = folder.foresee(overwrite=overwrite)
    epoch, step = (state["epoch"], state["step_in_epoch"]) if state else (0, 0)
    left = (settings.epochs - epoch) * steps - step
    images = (settings.epochs - epoch) * rows - round(step * rows / steps)
    there = (
        f"goes on after epoch {epoch} of {settings.epochs}" + (f", step {step} of {steps}" if step else "")
        if state and left
        else "complete, nothing is left to train"
        if state
        else "replaced"
        if folder.last.is_file()
        else "new"
    )
    fetched = ["pretrained weights are fetched when it starts, unless they are in timm's cache"] * settings.pretrained
    plan = Prepared(
        command="train-backbone",
        config=config.model_dump(mode="json", include={"name", "data", "backbone"}),
        facts={
            **data_facts(dataset),
            "network": f"{network['network']}, {network['parameters']:,} parameters, {network['feature_width']}-d features",
            "trains": f"{settings.epochs} epochs × {steps:,} steps"
            + (f", {left:,} steps left" if state else f" = {left:,} steps")
            + f" of {settings.batch_size} images; {images:,} images",
            "on": device_text(ranks, precision),
        },
        numbers={
            "dataset": dataset.summary(),
            "network": network,
            "epochs": settings.epochs,
            "epochs_done": epoch,
            "steps_per_epoch": steps,
            "steps": left,
            "images": images,
            **device_numbers(ranks, precision),
        },
        writes=(Write(out, _training_bytes(model, config, left), there),),
        notes=(*dataset.notes, *([why] if why else []), *fetched),
    )
    return Training(plan, dataset, network, complete=bool(state) and not left)


def plan_tries(
    config: Config,
    options: Sequence[str],
    *,
    out: Path | str,
    seeds: Sequence[int] | None = None,
    device: str = "auto",
    world: int = 1,
    overwrite: bool = False,
) -> Prepared:
    """What `try_settings` would do; raises what it would raise before its first step."""
    tries, seeds, ranks, out = (
        grid(config, options),
        tuple(seeds or (config.backbone.seed,)),
        planned_ranks(device, world),
        Path(out),
    )
    refuse_without_validation(config)
    parts = []
    for one, seed in itertools.product(tries, seeds):
        of_seed = one.config.model_copy(update={"backbone": one.config.backbone.model_copy(update={"seed": seed})})
        place = out / "tries" / one.name / f"seed-{seed}"
        trained = foresee_training(of_seed, out=place, ranks=ranks, overwrite=overwrite)
        told = {name: text for name, text in trained.plan.facts.items() if name in ("network", "trains")}
        parts.append(replace(trained.plan, title=f"{one.name}, seed {seed}", facts=told, notes=()))
    numbers = {"trainings": len(parts), "steps": sum(p.numbers["steps"] for p in parts)}
    numbers |= {"images": sum(p.numbers["images"] for p in parts)}
    first = trained.plan
    facts = {key: text for key, text in first.facts.items() if key not in ("network", "trains")}
    every = f"{len(tries)} setting(s) × {len(seeds)} seed(s): {numbers['steps']:,} steps, {numbers['images']:,} images"
    files = [out / name for name in ("tries.json", "tries.csv")]
    writes = tuple(Write(file, None, "replaced" if file.is_file() else "new") for file in files)
    config_told = config.model_dump(mode="json", include={"name", "data", "backbone"})
    return Prepared(
        "train-backbone", config_told, facts | {"trains": every}, numbers | device_numbers(ranks, first.numbers["precision"]),
        writes, first.notes, tuple(parts),
    )  # fmt: skip


def plan_dump(
    backbone: Path | str | None,
    config: Config | None = None,
    *,
    out: Path | str | None = None,
    own_images: bool = False,
    settings: Sequence[str] = (),
    model: str | None = None,
    key_map: Path | None = None,
    probe: bool = False,
    device: str = "auto",
    world: int = 1,
    overwrite: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Prepared:
    """What `dump_features` would do with a checkpoint's file; raises what it would raise before its first image."""
    ranks = planned_ranks(device, world)
    first = Ranks(0, 1, ranks.device)
    source = find_source(
        None if backbone is None else Path(backbone), config, out=out, own_images=own_images, settings=settings,
        model=model, key_map=key_map, probe=probe, overwrite=overwrite, ranks=first, say=say,
    )  # fmt: skip
    return foresee_dump(source, ranks=ranks, overwrite=overwrite)


def foresee_dump(source: Source, *, ranks: Ranks, overwrite: bool) -> Prepared:
    backbone, config, out = source.backbone, source.config, source.out
    dataset = fitting(source.images or load_dataset(config.data, resize=not config.backbone.frozen), backbone)
    arguments = store_of(backbone, config, dataset, out=out, ranks=ranks, overwrite=overwrite)
    with as_data_error():
        found = foresee_store(out, overwrite=overwrite, skipping=config.dump.on_error == "skip", **arguments)
    kept = source.keep_in and not (source.keep_in / "last.pt").is_file()
    extra = (Write(source.keep_in / "last.pt", model_bytes(backbone.model), "new"),) if source.keep_in and kept else ()
    return dump_plan(config, dataset, found, out=out, ranks=ranks, network=backbone.network, extra=extra)


def unmade_store(config: Config, dataset: Dataset, *, width: int) -> Foreseen:
    """The store of a backbone that is not trained yet."""
    itemsize = 4 if config.dump.dtype == "float32" else 2
    splits = tuple((n, config.dump.views if n == "train" else 1, len(of)) for n, of in dataset.splits.items())
    rows = chunk_rows(width=width, itemsize=itemsize)
    layout = Layout(splits, width, len(dataset.class_names), config.dump.dtype, rows)
    return Foreseen("new", layout, tuple(layout.chunks()))


def dump_plan(
    config: Config,
    dataset: Dataset,
    found: Foreseen,
    *,
    out: Path | str,
    ranks: Ranks,
    network: dict[str, Any],
    extra: tuple[Write, ...] = (),
) -> Prepared:
    """The plan of a dump of which it is known what is there."""
    layout, images = found.layout, sum(chunk.rows for chunk in found.missing)
    whole = found.state in ("new", "replaced")
    chunk_bytes = {split: layout.features(split).chunk_bytes for split, _, _ in layout.splits}
    missing_bytes = layout.bytes if whole else sum(chunk_bytes[chunk.split] + 4 for chunk in found.missing)
    there = len(layout.chunks()) - len(found.missing)
    state = STATES[found.state] + (
        f": {there:,} of {len(layout.chunks()):,} chunks are there" if not whole and images else ""
    )
    precision = str(encoding_precision(ranks.device)).removeprefix("torch.")
    batches = sum(ceil(chunk.rows / config.dump.batch_size) for chunk in found.missing)
    return Prepared(
        command="dump-features",
        config=config.model_dump(mode="json", include={"name", "data", "dump"}),
        facts={
            **data_facts(dataset),
            "network": f"{network['network']}, {network['parameters']:,} parameters",
            "encodes": f"{images:,} images ({layout.views('train')} training view(s)) in {batches:,} batches of "
            f"{config.dump.batch_size}; {layout.width} features each, {layout.dtype}, {len(found.missing):,} chunks",
            "on": device_text(ranks, precision),
        },
        numbers={
            "dataset": dataset.summary(),
            "network": network,
            "images": images,
            "batches": batches,
            "chunks": len(found.missing),
            "store_bytes": layout.bytes,
            **device_numbers(ranks, precision),
        },
        writes=(Write(out, missing_bytes, state), *extra),
        notes=dataset.notes,
    )


def store_state(out: Path | str) -> str:
    """What is told of a store's place before its backbone is there."""
    if is_url(out):
        return "made when the backbone is there"
    there = (Path(out) / "zarr.json").is_file()
    return "there: kept if it is of the backbone that comes out, else refused" if there else "new"


def model_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in tensors) + RECORD * len(tensors) + REST


def _training_bytes(model: nn.Module, config: Config, steps: int) -> int:
    """last.pt and previous.pt with what resuming needs, best.pt, and a line for each epoch; 0 where nothing is trained."""
    if not steps:
        return 0
    settings, parameters = config.backbone, list(model.parameters())
    copies = 3 if settings.ema else 2 if settings.loss == "ldam-drw" else 1  # those in use, trained, averaged
    momentum = sum(p.nbytes for p in parameters) + RECORD * len(parameters) if settings.momentum else 0
    last = copies * model_bytes(model) + momentum
    kept = min(2, settings.epochs)
    return kept * last + model_bytes(model) + LINE * settings.epochs
