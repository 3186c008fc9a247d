"""The command that makes the paper's tables from images, beside the paper's numbers."""

import click

from pipeline.cli.completion import configs as complete_configs
from pipeline.cli.exit_codes import show
from pipeline.cli.options import EXECUTION, PATH, Command, device, dry_run, option, settings, shared, whole_numbers


@click.command(
    "reproduce",
    cls=Command,
    example="pipeline reproduce reproduce/cifar100-resnet32 --set data.download=true",
)
@click.argument("configs", nargs=-1, metavar="[CONFIG]…", shell_complete=complete_configs)
@option("--out", type=PATH, default="runs/reproduce", show_default=True, help="Folder of backbones and features.")
@option("--page", type=PATH, help="Folder of reproduction.md and reproduction.json.", shown_default="--out")
@option(
    "--seeds", metavar="0,1,2", help="Seeds of the backbones, one each.", shown_default="0; without CONFIG the plan's"
)
@option("--tables", metavar="methods,table3", help="Tables to make: methods, table3, table4, figure5, formulations.")
@option(
    "--side-by-side",
    type=click.IntRange(1),
    help="Backbones trained at once; a large GPU is idle with small images of one training.",
    shown_default="2 on a GPU, else 1",
    group=EXECUTION,
)
@device
@dry_run
@settings
@shared
def reproduce_command(configs, out, page, seeds, tables, side_by_side, device, dry_run, sets, as_json, debug):
    """Make the paper's tables from images and list every deviation from the paper; resumes where it stopped.

    Without CONFIG it follows a plan for a GPU, the most valuable part first: CIFAR100-LT on the ResNet-34, one backbone, then
    two more; imbalance factor 50; the true ResNet-32; on a GPU then `bench rebalance`. A finished backbone/ or features.zarr
    of the same configuration and images under OUT/NAME/seed-N is used as it is. OUT/keep holds the few small files to keep.
    """
    from pipeline.console import Talk
    from pipeline.distributed import choose_device
    from pipeline.reproduce import TABLES, plan, prepare_reproduce, reproduce

    parts = plan(configs, seeds=whole_numbers("--seeds", seeds), sets=sets)
    table_names = tuple(tables.split(",")) if tables else TABLES
    if dry_run:
        show(prepare_reproduce(parts, out=out, folder=page, tables=table_names, device=device), as_json)
        return
    result = reproduce(
        parts,
        out=out,
        folder=page,
        tables=table_names,
        side_by_side=side_by_side,
        device=device,
        talk=Talk(),
    )
    if not configs and not result.bench.is_file() and choose_device(device).type == "cuda":
        from pipeline.bench.rebalance import bench_rebalance
        from pipeline.results.files import write_artefact

        write_artefact(result.bench, "bench", bench_rebalance(device=device).to_dict())
    show(result, as_json)


COMMANDS = (reproduce_command,)
