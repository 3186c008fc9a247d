"""reproduce: from images to the paper's tables beside our numbers."""

import click

from pipeline.cli.completion import configs as complete_configs
from pipeline.cli.exit_codes import show
from pipeline.cli.options import PATH, Examples, dry_run, settings, shared, whole_numbers


@click.command(
    "reproduce",
    short_help="The paper's tables from images on, deviations told.",
    cls=Examples,
    example="pipeline reproduce reproduce/cifar100-resnet32 --set data.download=true",
)
@click.argument("configs", nargs=-1, metavar="[CONFIG]…", shell_complete=complete_configs)
@click.option("--out", type=PATH, default="runs/reproduce", show_default=True, help="Where backbones and features go.")
@click.option("--page", type=PATH, help="Folder of reproduction.md and reproduction.json [default: --out].")
@click.option("--seeds", metavar="0,1,2", help="One backbone per seed [default: 0; without CONFIG what the plan says].")
@click.option("--tables", metavar="methods,table3", help="Only these: methods, table3, table4, figure5, formulations.")
@click.option(
    "--side-by-side",
    type=click.IntRange(1),
    help="Backbones trained at once, which small images on a large GPU want [default: 2 on a GPU, else 1].",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@dry_run
@settings
@shared
def reproduce_command(configs, out, page, seeds, tables, side_by_side, device, dry_run, sets, as_json, debug):
    """The paper's tables from images on, every deviation told; resumes where it stopped.

    Without CONFIG: the whole plan for a GPU, most valuable first: CIFAR100-LT on the ResNet-34, one backbone, then two
    more; imbalance factor 50; the true ResNet-32; on a GPU then `bench rebalance`. A finished backbone/ or features.zarr of
    the same configuration and images under OUT/NAME/seed-N is taken up. Few, small files to keep: OUT/keep.
    """
    from pipeline.console import Talk
    from pipeline.reproduce import TABLES, plan, reproduce

    parts = plan(configs, seeds=whole_numbers("--seeds", seeds), sets=sets)
    wanted = tuple(tables.split(",")) if tables else TABLES
    if dry_run:
        from pipeline.plan.whole import plan_reproduce

        show(plan_reproduce(parts, out=out, folder=page, tables=wanted, device=device), as_json)
        return
    result = reproduce(
        parts,
        out=out,
        folder=page,
        tables=wanted,
        side_by_side=side_by_side,
        bench=not configs,
        device=device,
        talk=Talk(),
    )
    show(result, as_json)


COMMANDS = (reproduce_command,)
