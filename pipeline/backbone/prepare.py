"""Every check of a training before its first step, and the description of what it would do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache import CacheError, Lock, refuse_unwritable
from pipeline.backbone.arithmetic import Arithmetic, training_precision
from pipeline.backbone.build import augmentation_facts, build_model, check_input, input_transform, network_facts
from pipeline.backbone.checkpoint import RECORD_BYTES, checkpoint_bytes
from pipeline.backbone.mixup import Mixup
from pipeline.backbone.sampling import refuse_empty_shares, steps_of
from pipeline.backbone.tensorboard import summary_writer
from pipeline.backbone.training_dir import TrainingFolder, identity_of, refuse_among_images, refuse_frozen
from pipeline.backbone.weakening import Weakening, check_place
from pipeline.config import BackboneConfig, Config
from pipeline.data import Dataset, load_dataset
from pipeline.data.transform import Transform
from pipeline.distributed import Ranks, planned_ranks
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.prepared import Prepared, Write, data_facts, device_numbers, device_text

EPOCH_BYTES = 700  # of a line in metrics.jsonl
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class PreparedTraining:
    """A training that has passed every check: `train` executes it.

    Arguments:
        description: what it would do; `--dry-run` prints it.
        steps: optimiser steps an epoch.
        network: name, parameters, feature width and augmentation, which stand beside every number.
        identity: the settings that decide the result (`identity_of`).
        complete: whether the checkpoint in `out` is at its last epoch, so that nothing is left to train.
    """

    description: Prepared
    config: Config
    dataset: Dataset
    transform: Transform
    weakening: Weakening
    mixup: Mixup
    steps: int
    network: dict[str, Any]
    identity: dict[str, Any]
    out: Path
    overwrite: bool
    complete: bool

    @property
    def group(self) -> int:
        """Return how many consecutive rows of a global batch stay on one rank, as they are mixed among themselves."""
        return max(self.weakening.group, self.mixup.group)


def prepare_training(
    config: Config,
    *,
    out: Path | str,
    device: str = "auto",
    world: int = 1,
    overwrite: bool = False,
    images: Dataset | None = None,
    ranks: Ranks | None = None,
) -> PreparedTraining:
    """Return the training that a configuration asks for, checked; nothing is written, and no weights are fetched.

    Arguments:
        out: the folder of its checkpoints.
        world: processes that would train.
        images: the configuration's data set, if it is loaded.
        ranks: the processes that will train, where they are running; `device` and `world` do not count then.

    Raises:
        ConfigError: settings that contradict each other or the data, or a checkpoint of another training in `out`.
        DataError: images, or a checkpoint, that cannot be used; another process that trains into `out`.
        PipelineError: a folder that cannot be written.
    """
    settings, out = config.backbone, Path(out)
    ranks = ranks or planned_ranks(device, world)
    refuse_frozen(settings)
    dataset = images or load_dataset(config.data)
    refuse_among_images(out, config.data)
    if ranks.first:
        _refuse_folder(out)
    _refuse_settings(settings, ranks)
    rows, steps = len(dataset.train), steps_of(len(dataset.train), settings.batch_size)
    weakening = Weakening(
        settings.weaken, dataset.train.labels, dataset.counts, seed=settings.seed, device=ranks.device
    )
    mixup = Mixup(settings.mixup, group=settings.weaken.group, seed=settings.seed, device=ranks.device)
    group = max(weakening.group, mixup.group)
    refuse_empty_shares(rows // steps, ranks.world, settings.accumulate, group=group)
    transform = input_transform(config.data, settings, dataset.train)
    model = build_model(settings.model_copy(update={"pretrained": False}), num_classes=len(dataset.class_names))
    check_input(model, transform, CPU)
    check_place(model, settings.weaken.at, size=transform.size, device=CPU)
    network = network_facts(settings, model) | augmentation_facts(settings, transform)
    identity = identity_of(settings, dataset=dataset.training_fingerprint, transform=transform.to_dict())
    folder = TrainingFolder(out, identity)
    state, reason = folder.peek(overwrite=overwrite) if ranks.first else (None, "")
    precision = training_precision(model, transform.size, ranks.device, setting=settings.precision, state=state)

    epoch, step = (state["epoch"], state["step_in_epoch"]) if state else (0, 0)
    left = (settings.epochs - epoch) * steps - step
    images_left = (settings.epochs - epoch) * rows - round(step * rows / steps)
    precision_name = Arithmetic(precision).precision_name
    description = Prepared(
        command="train-backbone",
        config=config.model_dump(mode="json", include={"name", "data", "backbone"}),
        facts={
            **data_facts(dataset),
            "network": f"{network['network']}, {network['parameters']:,} parameters, {network['feature_width']}-d features",
            "trains": f"{settings.epochs} epochs × {steps:,} steps"
            + (f", {left:,} steps left" if state else f" = {left:,} steps")
            + f" of {settings.batch_size} images; {images_left:,} images",
            "on": device_text(ranks, precision_name),
        },
        numbers={
            "dataset": dataset.summary(),
            "network": network,
            "epochs": settings.epochs,
            "epochs_done": epoch,
            "steps_per_epoch": steps,
            "steps": left,
            "images": images_left,
            **device_numbers(ranks, precision_name),
        },
        writes=(
            Write(out, _bytes_written(model, settings, left), _folder_state(folder, state, left, steps, settings)),
        ),
        notes=(
            *dataset.notes,
            *filter(None, [reason]),
            *["pretrained weights are fetched when it starts, unless they are in timm's cache"] * settings.pretrained,
        ),
    )
    return PreparedTraining(
        description, config, dataset, transform, weakening, mixup, steps, network, identity, out, overwrite,
        complete=bool(state) and not left,
    )  # fmt: skip


def _refuse_folder(out: Path) -> None:
    try:
        refuse_unwritable(out)
        Lock(out).refuse_held()
    except CacheError as error:
        raise DataError(f"{error}; --out names another folder") from error
    except OSError as error:
        raise PipelineError(f"{out}: {error.strerror}; choose a folder you may write to with --out") from error


def _refuse_settings(settings: BackboneConfig, ranks: Ranks) -> None:
    if settings.sync_batch_norm and ranks.world > 1 and ranks.device.type != "cuda":
        raise ConfigError("backbone.sync_batch_norm=true: only between GPUs; on CPUs set it to false")
    if settings.tensorboard:
        summary_writer()


def _folder_state(
    folder: TrainingFolder, state: dict[str, Any] | None, left: int, steps: int, settings: BackboneConfig
) -> str:
    if state is None:
        return "replaced" if folder.last.is_file() else "new"
    if not left:
        return "complete, nothing is left to train"
    step = f", step {state['step_in_epoch']} of {steps}" if state["step_in_epoch"] else ""
    return f"goes on after epoch {state['epoch']} of {settings.epochs}{step}"


def _bytes_written(model: nn.Module, settings: BackboneConfig, steps: int) -> int:
    """Return the bytes of last.pt, previous.pt, best.pt and a line for each epoch; 0 where no step is left."""
    if not steps:
        return 0
    parameters = list(model.parameters())
    copies = 3 if settings.ema else 2 if settings.loss == "ldam-drw" else 1  # those in use, trained, averaged
    momentum = sum(p.nbytes for p in parameters) + RECORD_BYTES * len(parameters) if settings.momentum else 0
    last = copies * checkpoint_bytes(model) + momentum
    return min(2, settings.epochs) * last + checkpoint_bytes(model) + EPOCH_BYTES * settings.epochs
