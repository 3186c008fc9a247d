"""Every check of a run before its first step, and the description of what it would do."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cache import CacheError, Otherwise, is_url, locate
from pipeline.backbone.aliases import encoder_folder
from pipeline.backbone.checkpoint import Checkpoint, load_checkpoint
from pipeline.backbone.external_checkpoint import load_external_for_run
from pipeline.backbone.prepare import PreparedTraining, prepare_training
from pipeline.backbone.training_dir import refuse_among_images
from pipeline.config import Config, RebalanceConfig
from pipeline.data import Dataset, load_dataset
from pipeline.distributed import Ranks, planned_ranks
from pipeline.dump_prepare import describe_unmade, prepare_dump
from pipeline.errors import ConfigError, DataError
from pipeline.prepared import Prepared, Write, device_numbers, replaced_or_new
from pipeline.rebalance.prepare import describe_unmade as describe_unmade_rebalance
from pipeline.rebalance.prepare import needs_choice


@dataclass(frozen=True)
class ExternalBackbone:
    """A network of another program that takes the place of stage 1.

    Arguments:
        path, model, key_map, probe: as for `load_external`.
    """

    path: Path | None = None
    model: str | None = None
    key_map: Path | None = None
    probe: bool = False


@dataclass(frozen=True, eq=False)
class PreparedBackbone:
    """The stages of one backbone, checked as far as they can be before it is trained.

    Arguments:
        out: the folder with backbone/ and rebalance/.
        store: the features, a folder or URL.
        training: the training, checked; None for an external backbone.
        external: the backbone of another program; None where one is trained.
        images: the data set of the configuration.
        prefix: the beginning of its stages' names in the ledger: `seed-N/`, `ENCODER/`, or nothing in a run of one backbone.
        encoders: those whose features stand side by side in the store, each with a store of its own; none for one backbone.
    """

    config: Config
    out: Path
    store: Path | str
    training: PreparedTraining | None
    external: Checkpoint | None
    images: Dataset
    ranks: Ranks
    overwrite: bool
    prefix: str = ""
    encoders: tuple["PreparedBackbone", ...] = ()

    @property
    def width(self) -> int:
        """Features per image."""
        if self.encoders:
            return sum(encoder.width for encoder in self.encoders)
        network = self.training.network if self.training else self.external.network  # type: ignore[union-attr]
        return int(network["feature_width"])

    @functools.cached_property
    def stages(self) -> tuple[Prepared, ...]:
        """The descriptions of its training, where there is one, and of its dump.

        Raises: DataError: the store was made otherwise, or another process writes it.
        """
        if self.encoders:
            return tuple(
                replace(stage, title=f"{encoder.out.name}: {stage.command}")
                for encoder in self.encoders
                for stage in encoder.stages
            )
        backbone = self.external
        if self.training is not None and self.training.complete:
            backbone = load_checkpoint(self.out / "backbone" / "last.pt")
        if backbone is not None:
            with training_is_good(self.store):
                dump = prepare_dump(
                    backbone, self.config, out=self.store, images=self.images, overwrite=self.overwrite,
                    keep_in=self.out / "backbone" if self.external else None, device=str(self.ranks.device),
                    world=self.ranks.world,
                ).description  # fmt: skip
        else:
            assert self.training is not None
            dump = describe_unmade(
                self.config, self.images, out=self.store, ranks=self.ranks, network=self.training.network
            )
        return (dump,) if self.training is None else (self.training.description, _without_data(dump))

    def describe_fit(self, stage: str, settings: RebalanceConfig) -> Prepared:
        """Return what fitting heads on its features would do, with the results in the folder that is named as the stage."""
        out = self.out / stage
        file = out / ("ablation.json" if settings.variants else "results.json")
        state = "kept where it is of the same features and settings, else replaced" if file.is_file() else "new"
        return describe_unmade_rebalance(
            settings, out=out, rows=len(self.images.train), classes=len(self.images.class_names), width=self.width,
            views=self.config.dump.views, ranks=self.ranks, state=state,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A run that has passed every check before its first step.

    Arguments:
        seeds: of its backbones; None for a run of one backbone.
    """

    config: Config
    out: Path
    seeds: tuple[int, ...] | None
    backbones: tuple[PreparedBackbone, ...]
    ranks: Ranks

    @functools.cached_property
    def description(self) -> Prepared:
        """The description of the run; every chunk of a store that exists is read for it.

        Raises: DataError: a store was made otherwise, or another process writes it.
        """
        parts: list[Prepared] = []
        for backbone in self.backbones:
            stages = [*backbone.stages, backbone.describe_fit("rebalance", backbone.config.rebalance)]
            name = f"{backbone.out.name}: " if self.seeds else ""
            titled = [stage if stage.title else replace(stage, title=name + stage.command) for stage in stages]
            parts += [_without_data(stage) for stage in titled] if parts else titled
        report = self.out / "report.html"
        numbers = {"out": str(self.out), "seeds": list(self.seeds or [self.config.backbone.seed])}
        numbers |= device_numbers(self.ranks, parts[0].numbers["precision"])
        writes = (Write(report, None, replaced_or_new(report)),)
        return Prepared("run", self.config.model_dump(mode="json"), {}, numbers, writes, (), tuple(parts))


def prepare_run(
    config: Config,
    *,
    out: Path,
    store: Path | str | None = None,
    seeds: Sequence[int] | None = None,
    external: ExternalBackbone | None = None,
    encoders: Sequence[str] = (),
    device: str = "auto",
    world: int = 1,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> PreparedRun:
    """Return the run that `run_pipeline` would execute, checked; nothing is written.

    Arguments: those of `run_pipeline`; world: processes that would run; ranks: those that are running, where they are;
        device and world do not count then.
    Raises: what `run_pipeline` raises before its first step.
    """
    planned = ranks or planned_ranks(device, world)
    running = ranks or Ranks(0, 1, planned.device)
    external = external or (ExternalBackbone() if config.backbone.frozen else None)
    if external and seeds:
        raise ConfigError(
            "--seeds trains one backbone per seed, --checkpoint and --encoder take one that exists: leave one of them out"
        )
    running.together(lambda: _refuse_other_kind(out, seeds))
    running.together(lambda: _refuse_unreachable(store))
    if encoders:
        joint = _side_by_side(
            config, encoders, out=out, store=store, planned=planned, running=running, overwrite=overwrite
        )
        return PreparedRun(config, out, None, (joint,), planned)
    images = None if external else running.together(lambda: load_dataset(config.data))
    backbones = []
    for folder, seed in [(out / f"seed-{seed}", seed) for seed in seeds] if seeds else [(out, config.backbone.seed)]:
        backbones.append(
            prepare_backbone(
                with_seed(config, seed), out=folder, store=_store_of(folder, store, several=bool(seeds)),
                external=external, images=images, planned=planned, running=running, overwrite=overwrite,
                prefix=f"{folder.name}/" if seeds else "",
            )
        )  # fmt: skip
    return PreparedRun(config, out, tuple(seeds) if seeds else None, tuple(backbones), planned)


def prepare_backbone(
    config: Config,
    *,
    out: Path,
    store: Path | str,
    external: ExternalBackbone | None = None,
    images: Dataset | None = None,
    planned: Ranks,
    running: Ranks,
    overwrite: bool = False,
    prefix: str = "",
) -> PreparedBackbone:
    """Return the stages of one backbone, checked.

    Arguments:
        images: the configuration's data set, if it is loaded.
        planned: the processes that would compute; running: those that check now.
    Raises: what the stages raise before their first step.
    """
    training = backbone = None
    refuse_among_images(out, config.data)
    if external:
        backbone, images = load_external_for_run(
            external.path, config, out / "backbone", model=external.model, key_map=external.key_map, probe=external.probe,
            overwrite=overwrite, ranks=running,
        )  # fmt: skip
        config = backbone.config
    dataset = images or running.together(lambda: load_dataset(config.data))
    running.together(lambda: _refuse_missing_splits(config, dataset))
    if not external:
        training = running.together(
            lambda: prepare_training(config, out=out / "backbone", overwrite=overwrite, images=dataset, ranks=planned)
        )
    return PreparedBackbone(config, out, store, training, backbone, dataset, planned, overwrite, prefix)


def _side_by_side(
    config: Config,
    encoders: Sequence[str],
    *,
    out: Path,
    store: Path | str | None,
    planned: Ranks,
    running: Ranks,
    overwrite: bool,
) -> PreparedBackbone:
    """Return the stages of several encoders, each with a store in out/ENCODER, whose features one store holds side by side."""
    parts = []
    for name in encoders:
        settings, folder = config.backbone.model_copy(update={"encoder": name}), out / encoder_folder(name)
        parts.append(
            prepare_backbone(
                config.model_copy(update={"backbone": settings}), out=folder, store=folder / "features.zarr",
                external=ExternalBackbone(), planned=planned, running=running, overwrite=overwrite,
                prefix=f"{folder.name}/",
            )
        )  # fmt: skip
    joint = store or out / "features.zarr"
    return replace(parts[0], out=out, store=joint, external=None, prefix="", encoders=tuple(parts))


def with_seed(config: Config, seed: int) -> Config:
    """Return the configuration of another backbone on the same subset."""
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"seed": seed})})


@contextmanager
def training_is_good(store: Path | str) -> Iterator[None]:
    """Replace the advice to begin anew, where a store was made otherwise: the training of the run can stay."""
    try:
        yield
    except (DataError, Otherwise) as error:
        if not isinstance(error, Otherwise) and not isinstance(error.__cause__, Otherwise):
            raise
        cause = str(error).partition(" Choose another --out")[0]
        remedy = "give another --store" if isinstance(store, str) else f"remove {store}"
        raise DataError(f"{cause} The training is good: {remedy}, then the same command makes its features") from error


def _store_of(folder: Path, store: Path | str | None, *, several: bool) -> Path | str:
    """Return the store of a backbone: features.zarr in its folder, or the one asked for, or seed-N below that."""
    if store is None:
        return folder / "features.zarr"
    if not several:
        return store
    return f"{store}/{folder.name}" if isinstance(store, str) else store / folder.name


def _refuse_other_kind(out: Path, seeds: Sequence[int] | None) -> None:
    if seeds and (out / "backbone" / "last.pt").exists():
        raise ConfigError(f"{out} holds a run of one backbone; take another --out for --seeds, or leave --seeds out")
    if not seeds and any(out.glob("seed-*/backbone/last.pt")):
        raise ConfigError(f"{out} holds a run of several backbones; give its --seeds again, or take another --out")


def _refuse_missing_splits(config: Config, images: Dataset) -> None:
    """Raise DataError or ConfigError where stage 2 will need a split that the images lack, before hours of training."""
    if "test" not in images.splits:
        raise DataError(
            f"{images.name}: no test images, so nothing could be measured; set data.test_per_class, or bring test images"
        )
    settings = config.rebalance
    if needs_choice(settings) and settings.select_on == "val" and "val" not in images.splits:
        raise ConfigError(
            f"{images.name}: no validation images to choose on; choose over folds of the training features with "
            "--set rebalance.select_on=kfold, give one λ with --set rebalance.lam=0.1, or set data.val_per_class"
        )


def _refuse_unreachable(store: Path | str | None) -> None:
    """Raise DataError where a store's URL cannot be reached, before hours of training."""
    if store is None or not is_url(store):
        return
    try:
        locate(store).exists()
    except CacheError as error:
        refusal = DataError(str(error))
        refusal.exit_code = error.exit_code
        raise refusal from error


def _without_data(stage: Prepared) -> Prepared:
    """Return a stage without the facts on data and network, which an earlier stage has."""
    facts = {name: text for name, text in stage.facts.items() if name not in ("data", "classes", "network")}
    return replace(stage, facts=facts, notes=())
