"""Commands from images to features: run, train-backbone, dump-features."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline.backbone.aliases import encoder_folder
from pipeline.cli.completion import configs
from pipeline.cli.exit_codes import process_count, relaunched, show
from pipeline.cli.job import processes
from pipeline.cli.options import (
    EXECUTION,
    PATH,
    STORE,
    Command,
    dry_run,
    encoder,
    encoder_names,
    key_map,
    last_value,
    option,
    probe,
    setting_option,
    settings,
    shared,
    whole_numbers,
    with_encoder,
)
from pipeline.cli.paths import backbones_of, take_config
from pipeline.errors import ConfigError, DataError
from pipeline.text import Shown

on_error = setting_option("dump.on_error", group=EXECUTION)


@click.command(
    "run",
    cls=Command,
    example="pipeline run digits-lt --seeds 0,1,2",
)
@click.argument("config", required=False, shell_complete=configs)
@option("--out", type=PATH, help="Folder of the run.", shown_default="runs/CONFIG-NAME")
@option(
    "--store",
    type=STORE,
    help="Store of the features, such as s3://bucket/path.",
    shown_default="features.zarr in the run",
)
@option("--seeds", metavar="0,1,2", help="Train one backbone per seed and aggregate over them.")
@encoder
@option("--checkpoint", type=PATH, help="Weights of any timm network, which replace the training.")
@key_map
@probe
@option("--overwrite", is_flag=True, help="Start the run anew.", group=EXECUTION)
@on_error
@dry_run
@processes
@settings
@shared
def run_command(
    config, out, seeds, encoder, checkpoint, key_map, probe, on_error, dry_run, nproc, sets, as_json, debug, **options
):
    """Run stage 1, feature dump, rebalancing and report in one go; resumes where it stopped.

    CONFIG is a file, the name of a shipped configuration, or a folder of images, for which settings are chosen as `pipeline
    init` does (default: ./pipeline.yaml, else digits-lt).

    With several encoders, --encoder a,b, each gets a store in OUT/ENCODER, and heads are fitted on their features side by side.
    """
    names = encoder_names(encoder)
    sets = with_encoder(sets, names[0], checkpoint)
    talk, experiment = take_config(config, (*sets, *_dump_sets(on_error=on_error)))
    if checkpoint is None and not experiment.backbone.frozen and (key_map or probe):
        raise ConfigError(
            "--key-map and --probe are for a checkpoint of another program: name it with --checkpoint FILE"
        )
    arguments: Any = {"out": out or experiment.run_dir, "seeds": whole_numbers("--seeds", seeds), **options}
    arguments |= {"encoders": names if len(names) > 1 else ()}
    if not dry_run and relaunched(nproc):
        return
    from pipeline.run_prepare import ExternalBackbone, prepare_run

    external = None
    if checkpoint or experiment.backbone.frozen:
        external = ExternalBackbone(checkpoint, last_value(sets, "backbone.model"), key_map, probe)
    if dry_run:
        world = process_count(nproc, options["device"])
        show(prepare_run(experiment, external=external, world=world, **arguments).description, as_json)
        return
    from pipeline.run import run_pipeline

    result = run_pipeline(experiment, external=external, talk=talk, **arguments)
    show(result, as_json)


@click.command(
    "train-backbone",
    cls=Command,
    example="pipeline train-backbone digits-lt --set backbone.epochs=10",
)
@click.argument("config", required=False, shell_complete=configs)
@option("--out", type=PATH, help="Folder of the checkpoints.", shown_default="runs/CONFIG-NAME/backbone")
@option(
    "--try",
    "tries",
    multiple=True,
    metavar="KEY=V1,V2",
    help="Train with each value, in OUT/tries, and select on validation; repeated, with every combination.",
    group="Tuning",
)
@option(
    "--seeds",
    metavar="0,1,2",
    help="Train every setting once per seed, in OUT/tries, and print mean ± std.",
    group="Tuning",
)
@setting_option("backbone.tensorboard", group=EXECUTION)
@option("--overwrite", is_flag=True, help="Start anew instead of continuing the checkpoint in OUT.", group=EXECUTION)
@on_error
@dry_run
@processes
@settings
@shared
def train_command(
    config, out, tries, seeds, tensorboard, overwrite, on_error, dry_run, nproc, device, sets, as_json, debug
):
    """Train an encoder and a classifier, stage 1; continues a checkpoint of the same configuration.

    CONFIG is a file or the name of a shipped configuration (default: ./pipeline.yaml, else digits-lt).

    Loss, sampler and averaged weights are settings: --set backbone.loss=…, backbone.sampler, backbone.ema.
    """
    talk, experiment = take_config(
        config, (*sets, *_dump_sets(on_error=on_error), *(["backbone.tensorboard=true"] if tensorboard else []))
    )
    numbers = whole_numbers("--seeds", seeds)
    if out is None and (several := backbones_of(experiment.run_dir)):
        names = ",".join(folder.name.removeprefix("seed-") for folder in several)
        raise ConfigError(
            f"{experiment.run_dir} holds a run of several backbones: `pipeline run --seeds {names}` goes on with it; "
            "for another training take another --out"
        )
    arguments: Any = {"out": out or experiment.run_dir / "backbone", "device": device, "overwrite": overwrite}
    if dry_run:
        world = process_count(nproc, device)
        if tries or seeds:
            from pipeline.backbone.hparam_sweep import prepare_sweep

            show(prepare_sweep(experiment, tries, seeds=numbers, world=world, **arguments).description, as_json)
        else:
            from pipeline.backbone.prepare import prepare_training

            show(prepare_training(experiment, world=world, **arguments).description, as_json)
        return
    if relaunched(nproc):
        return
    if tries or seeds:
        from pipeline.backbone.hparam_sweep import sweep_hparams

        show(sweep_hparams(experiment, tries, seeds=numbers, talk=talk, **arguments), as_json)
        return
    from pipeline.backbone.reporter import TrainingReporter
    from pipeline.backbone.train import train_backbone

    with talk.progress("training") as bar:
        result = train_backbone(experiment, report=TrainingReporter(talk, bar), **arguments)
    show(result, as_json)


@click.command(
    "dump-features",
    cls=Command,
    example="pipeline dump-features digits-lt --views 4",
)
@click.argument("config", required=False, shell_complete=configs)
@encoder
@option(
    "--checkpoint",
    type=PATH,
    help="The backbone: a run's, or any timm network's weights (safetensors, .pth), or a folder with its config.json.",
    shown_default="runs/CONFIG-NAME/backbone/last.pt",
)
@key_map
@probe
@option(
    "--out",
    type=STORE,
    help="Store to write, such as s3://bucket/path.",
    shown_default="features.zarr in the backbone's run",
)
@setting_option("dump.views")
@setting_option("dump.dtype")
@option("--overwrite", is_flag=True, help="Write anew over a store that was made from something else.", group=EXECUTION)
@on_error
@dry_run
@processes
@settings
@shared
def dump_command(encoder, out, views, dtype, on_error, as_json, debug, **options):
    """Run the frozen encoder once over every sample into a zarr store; called again it finishes, verifies or repairs it.

    The images are those that the checkpoint was trained with, unless both CONFIG and --checkpoint are given. With a
    checkpoint of another program the images are CONFIG's, and a copy of it is written to backbone/last.pt beside the store.
    """
    extra, names = _dump_sets(views=views, dtype=dtype, on_error=on_error), encoder_names(encoder)
    results = []
    for name in names:
        place = out if len(names) == 1 else partial(_encoder_store, name=name, folder=out)
        result = _dump(encoder=name, out=place, extra=extra, **options)
        if result is None:  # the processes that were started have made all stores
            return
        results.append(result)
    show(results[0] if len(names) == 1 else SeveralDumps(results), as_json)


class SeveralDumps(Shown):
    """The stores of several encoders, or what their dumps would do."""

    def __init__(self, results: list[Any]):
        self.results = results

    def to_dict(self) -> dict[str, Any]:
        return {"encoders": [result.to_dict() for result in self.results]}

    def __str__(self) -> str:
        lines = [str(result) for result in self.results]
        stores = [str(result.store) for result in self.results if hasattr(result, "store")]
        if stores:
            lines.append("side by side: pipeline rebalance " + " --also ".join(stores))
        return "\n".join(lines)


def _encoder_store(run: Path, *, name: str | None, folder: Path | str | None) -> Path | str:
    """Return the store of one of several encoders: in a folder of its own below `folder`, by default the run's."""
    place, below = encoder_folder(name or ""), folder or run
    return f"{below}/{place}/features.zarr" if isinstance(below, str) else below / place / "features.zarr"


def _dump(*, config, encoder, checkpoint, key_map, probe, out, extra, overwrite, dry_run, nproc, device, sets):
    """Return the result of one dump, the description of what it would do, or None where other processes have done it.

    Arguments:
        out: the store, None for that of the run, or a function of the run's folder.
        extra: texts after --set for the dump alone.
    """
    sets = with_encoder(sets, encoder, checkpoint)
    talk, experiment = take_config(config, sets, announce=config is not None or checkpoint is None)
    frozen = checkpoint is None and experiment.backbone.frozen
    path = None if frozen else checkpoint or experiment.run_dir / "backbone" / "last.pt"
    if checkpoint is None and path is not None and not path.exists():
        if several := backbones_of(experiment.run_dir):
            first = several[0] / "backbone" / "last.pt"
            raise DataError(
                f"{experiment.run_dir}: a run of several backbones; name one of them, such as --checkpoint {first}"
            )
        raise DataError(
            f"{path}: no such checkpoint; make one with `pipeline train-backbone{f' {config}' if config else ''}`"
        )
    if checkpoint is None and not frozen and (key_map or probe):
        raise ConfigError(
            "--key-map and --probe are for a checkpoint of another program: name it with --checkpoint FILE"
        )
    made_from: Any = {
        "config": experiment if config or frozen else None,
        "own_images": checkpoint is None and not frozen,
        "settings": (*sets, *extra),
        "out": out(experiment.run_dir) if callable(out) else out,
        "model": last_value(sets, "backbone.model"),
        "key_map": key_map,
        "probe": probe,
        "device": device,
        "overwrite": overwrite,
        "say": talk.say,
    }
    if dry_run:
        from pipeline.dump_prepare import prepare_dump

        return prepare_dump(path, world=process_count(nproc, device), **made_from).description
    if relaunched(nproc):
        return None
    from pipeline.console import describe_dataset
    from pipeline.dump import dump_features

    with talk.progress("dumping") as bar:
        result = dump_features(path, report=bar.move, **made_from)
    talk.say(describe_dataset(result.dataset))
    return result


def _dump_sets(**options: Any) -> list[str]:
    """Return the texts after --set that mean the options of dump settings."""
    return [f"dump.{key}={value}" for key, value in options.items() if value is not None]


COMMANDS = (run_command, train_command, dump_command)
