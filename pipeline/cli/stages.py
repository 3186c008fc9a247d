"""From images to features: run, train-backbone, dump-features."""

from typing import Any

import click

from pipeline.cli.completion import configs
from pipeline.cli.exit_codes import processes, relaunched, show
from pipeline.cli.options import (
    PATH,
    STORE,
    Examples,
    dry_run,
    encoder,
    key_map,
    on_error,
    probe,
    settings,
    shared,
    typed,
    whole_numbers,
    with_encoder,
    workers,
)
from pipeline.cli.paths import backbones_of, take_config
from pipeline.errors import ConfigError, DataError


@click.command(
    "run",
    short_help="Training, features, stage 2 and report in one go.",
    cls=Examples,
    example="pipeline run digits-lt --seeds 0,1,2",
)
@click.argument("config", required=False, shell_complete=configs)
@click.option("--out", type=PATH, help="Where the run goes [default: runs/CONFIG-NAME].")
@click.option(
    "--store",
    type=STORE,
    metavar="FOLDER|URL",
    help="Where the features go, such as s3://bucket/path [default: features.zarr in the run].",
)
@click.option("--seeds", metavar="0,1,2", help="Train one backbone per seed and aggregate over them.")
@encoder
@click.option("--checkpoint", type=PATH, help="Weights of any timm network to take instead of training one.")
@key_map
@probe
@click.option("--overwrite", is_flag=True, help="Start the run anew.")
@on_error
@dry_run
@workers
@settings
@shared
def run_command(
    config,
    out,
    store,
    seeds,
    encoder,
    checkpoint,
    key_map,
    probe,
    overwrite,
    on_error,
    dry_run,
    nproc,
    device,
    sets,
    as_json,
    debug,
):
    """Stage 1, feature dump, rebalancing and report in one go; resumes where it stopped.

    CONFIG is a file or the name of a shipped configuration (default: ./pipeline.yaml, else digits-lt).
    """
    sets = with_encoder(sets, encoder, checkpoint)
    talk, chosen = take_config(config, (*sets, *_said(on_error=on_error)))
    if checkpoint is None and not chosen.backbone.frozen and (key_map or probe):
        raise ConfigError("--key-map and --probe are for a checkpoint from elsewhere: name it with --checkpoint FILE")
    where: Any = {"out": out or chosen.run_dir, "store": store, "seeds": whole_numbers("--seeds", seeds)}
    where |= {"device": device, "overwrite": overwrite}
    if not dry_run and relaunched(nproc):
        return
    from pipeline.run import Brought, run_pipeline

    brought = None
    if checkpoint or chosen.backbone.frozen:
        brought = Brought(checkpoint, typed(sets, "backbone.model"), key_map, probe)
    if dry_run:
        from pipeline.plan.whole import plan_run

        show(plan_run(chosen, brought=brought, world=processes(nproc, device), **where), as_json)
        return
    result = run_pipeline(chosen, brought=brought, talk=talk, **where)
    show(result, as_json)


@click.command(
    "train-backbone",
    short_help="Stage 1: train encoder and classifier, or go on.",
    cls=Examples,
    example="pipeline train-backbone digits-lt --set backbone.epochs=10",
)
@click.argument("config", required=False, shell_complete=configs)
@click.option("--out", type=PATH, help="Where checkpoints go [default: runs/CONFIG-NAME/backbone].")
@click.option(
    "--try",
    "tries",
    multiple=True,
    metavar="KEY=V1,V2",
    help="Train with each value, in OUT/tries, and choose on validation; repeated, every combination.",
)
@click.option("--seeds", metavar="0,1,2", help="Train every setting once per seed, in OUT/tries, and tell mean ± std.")
@click.option("--tensorboard", is_flag=True, help="Write event files for TensorBoard beside the checkpoints too.")
@click.option("--overwrite", is_flag=True, help="Start anew instead of continuing the checkpoint there.")
@on_error
@dry_run
@workers
@settings
@shared
def train_command(
    config, out, tries, seeds, tensorboard, overwrite, on_error, dry_run, nproc, device, sets, as_json, debug
):
    """Stage 1: train an encoder and classifier; continues a checkpoint of the same configuration.

    CONFIG is a file or the name of a shipped configuration (default: ./pipeline.yaml, else digits-lt).

    Losses, samplers and averaged weights are keys of the configuration: backbone.loss, backbone.sampler, backbone.ema.
    """
    talk, chosen = take_config(
        config, (*sets, *_said(on_error=on_error), *(["backbone.tensorboard=true"] if tensorboard else []))
    )
    numbers = whole_numbers("--seeds", seeds)
    if out is None and (several := backbones_of(chosen.run_dir)):
        names = ",".join(place.name.removeprefix("seed-") for place in several)
        raise ConfigError(
            f"{chosen.run_dir} holds a run of several backbones: `pipeline run --seeds {names}` goes on with it; "
            "for another training take another --out"
        )
    where: Any = {"out": out or chosen.run_dir / "backbone", "device": device, "overwrite": overwrite}
    if dry_run:
        world = processes(nproc, device)
        if tries or seeds:
            from pipeline.backbone.hparam_sweep import prepare_sweep

            show(prepare_sweep(chosen, tries, seeds=numbers, world=world, **where).description, as_json)
        else:
            from pipeline.backbone.prepare import prepare_training

            show(prepare_training(chosen, world=world, **where).description, as_json)
        return
    if relaunched(nproc):
        return
    if tries or seeds:
        from pipeline.backbone.hparam_sweep import sweep_hparams

        show(sweep_hparams(chosen, tries, seeds=numbers, talk=talk, **where), as_json)
        return
    from pipeline.backbone.train import train_backbone
    from pipeline.console import TrainingReporter

    with talk.progress("training") as bar:
        result = train_backbone(chosen, report=TrainingReporter(talk, bar), **where)
    show(result, as_json)


@click.command(
    "dump-features",
    short_help="Run the encoder once over every image into a store.",
    cls=Examples,
    example="pipeline dump-features digits-lt --views 4",
)
@click.argument("config", required=False, shell_complete=configs)
@encoder
@click.option(
    "--checkpoint",
    type=PATH,
    help="The backbone: of a run, or any timm network's weights (safetensors, .pth), or a folder with its config.json "
    "[default: runs/CONFIG-NAME/backbone/last.pt].",
)
@key_map
@probe
@click.option(
    "--out",
    type=STORE,
    metavar="FOLDER|URL",
    help="The store, or s3://bucket/path [default: features.zarr in the backbone's run].",
)
@click.option(
    "--views",
    type=click.IntRange(1),
    help="Views of each training image: one clean, the rest augmented [default: the configuration's].",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Precision of the stored features [default: the configuration's].",
)
@click.option("--overwrite", is_flag=True, help="Dump anew over a store made from something else.")
@on_error
@dry_run
@workers
@settings
@shared
def dump_command(
    config,
    encoder,
    checkpoint,
    key_map,
    probe,
    out,
    views,
    dtype,
    overwrite,
    on_error,
    dry_run,
    nproc,
    device,
    sets,
    as_json,
    debug,
):
    """Run the frozen encoder once over every sample into a zarr store; called again it finishes, verifies or repairs it.

    Images are those the checkpoint was trained with, unless both CONFIG and --checkpoint are given. Of a checkpoint that
    was not trained by this program they are CONFIG's, and it is kept in backbone/last.pt beside the store.
    """
    extra = _said(views=views, dtype=dtype, on_error=on_error)
    sets = with_encoder(sets, encoder, checkpoint)
    talk, named = take_config(config, sets, told=config is not None or checkpoint is None)
    frozen = checkpoint is None and named.backbone.frozen
    path = None if frozen else checkpoint or named.run_dir / "backbone" / "last.pt"
    if checkpoint is None and path is not None and not path.exists():
        if several := backbones_of(named.run_dir):
            one = several[0] / "backbone" / "last.pt"
            raise DataError(
                f"{named.run_dir}: a run of several backbones; name one of them, such as --checkpoint {one}"
            )
        raise DataError(
            f"{path}: no such checkpoint; make one with `pipeline train-backbone{f' {config}' if config else ''}`"
        )
    if checkpoint is None and not frozen and (key_map or probe):
        raise ConfigError("--key-map and --probe are for a checkpoint from elsewhere: name it with --checkpoint FILE")
    made_from: Any = {
        "config": named if config or frozen else None,
        "own_images": checkpoint is None and not frozen,
        "settings": (*sets, *extra),
        "out": out,
        "model": typed(sets, "backbone.model"),
        "key_map": key_map,
        "probe": probe,
        "device": device,
        "overwrite": overwrite,
        "say": talk.say,
    }
    if dry_run:
        from pipeline.dump_prepare import prepare_dump

        show(prepare_dump(path, world=processes(nproc, device), **made_from).description, as_json)
        return
    if relaunched(nproc):
        return
    from pipeline.console import describe_dataset
    from pipeline.dump import dump_features

    with talk.progress("dumping") as bar:
        result = dump_features(path, report=bar.move, **made_from)
    talk.say(describe_dataset(result.dataset))
    show(result, as_json)


def _said(**options: Any) -> list[str]:
    """The dump settings that were given as options."""
    return [f"dump.{key}={value}" for key, value in options.items() if value is not None]


COMMANDS = (run_command, train_command, dump_command)
