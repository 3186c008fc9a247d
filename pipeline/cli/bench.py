"""Commands that measure the claims about speed and memory on this machine."""

from functools import partial

import click

from cache.files import write_durably
from pipeline.cli.completion import stores as complete_stores
from pipeline.cli.exit_codes import show
from pipeline.cli.options import PATH, STORE, Command, count, device, option, out_json, shared
from pipeline.results.files import write_artefact

repeat = count("--repeat", "Repetitions of each timing.", default=5)
folder = option("--folder", type=PATH, help="Folder of temporary files.", shown_default="the system's")


@click.group("bench")
def bench() -> None:
    """Measure the program's speed and memory on this machine, beside those of the usual way without it."""


@bench.command(
    "cache",
    short_help="The feature store: dump, load, verify.",
    cls=Command,
    example="pipeline bench cache --rows 20000 --out bench-cache.json",
)
@count("--rows", "Training samples.", default=115_846)
@count("--width", "Features of each sample.", default=2048)
@repeat
@folder
@device
@out_json
@shared
def cache_command(rows, width, repeat, folder, device, out, as_json, debug):
    """Measure the feature store: dumping over the bare encoder, loading and verifying over np.load.

    The default size is ImageNet-LT's; every ratio is of medians of interleaved repetitions, the page cache warm.
    """
    from pipeline.bench.cache import bench_cache

    finish(partial(bench_cache, rows=rows, width=width, repeat=repeat, folder=folder, device=device), out, as_json)


@bench.command(
    "rebalance",
    short_help="Stage 2 beside the usual loop and bare products.",
    cls=Command,
    example="pipeline bench rebalance --repeat 3 --small",
)
@repeat
@option("--small", is_flag=True, help="Measure CIFAR100-LT's size alone, without ImageNet-LT's and iNaturalist's.")
@device
@out_json
@shared
def rebalance_command(repeat, small, device, out, as_json, debug):
    """Measure stage 2: 32 λ over the usual loop, one head over its bare matrix products, IWB over plain cross-entropy.

    Every ratio is of medians of interleaved repetitions on generated features, all with the same threads.
    """
    from pipeline.bench.rebalance import bench_rebalance

    finish(partial(bench_rebalance, repeat=repeat, device=device, large=not small), out, as_json)


@bench.command(
    "train",
    short_help="Stage 1 beside a bare loop; ranks; loaders.",
    cls=Command,
    example="pipeline bench train --repeat 3 --small",
)
@repeat
@option("--small", is_flag=True, help="Measure a few steps each, without image files and complete trainings.")
@folder
@device
@out_json
@shared
def train_command(repeat, small, folder, device, out, as_json, debug):
    """Measure stage 1: the trainer over the bare loop, two ranks over two processes, the loader over the network.

    On CUDA also the time of 200 epochs of CIFAR100-LT. Every ratio is of medians of interleaved repetitions on generated
    images.
    """
    from pipeline.bench.train import bench_train

    finish(partial(bench_train, repeat=repeat, small=small, folder=folder, device=device), out, as_json)


@bench.command(
    "heads",
    short_help="The recommended head beside scikit-learn and every method.",
    cls=Command,
    example="pipeline bench heads --stores a.zarr b.zarr --out heads.json",
)
@option("--stores", type=STORE, multiple=True, metavar="STORE…", help="Feature stores with validation and test images.")
@click.argument("more", nargs=-1, metavar="", type=STORE, shell_complete=complete_stores)
@folder
@device
@out_json
@shared
def heads_command(stores, more, folder, device, out, as_json, debug):
    """Measure the head that `pipeline rebalance STORE` recommends, on the test images of each store.

    Beside it stand scikit-learn's balanced logistic regression (C chosen on validation) and every method's row, with paired
    intervals; the regret is what the best row on test has more. Beside the file of --out it writes the picture of all rows.
    """
    from pipeline.bench.heads import bench_heads

    result = finish(partial(bench_heads, [*stores, *more], folder=folder, device=device), out, as_json)
    if out:
        from pipeline.bench.heads_figure import heads_figure

        write_durably(out.with_suffix(".png"), heads_figure(result.to_dict()))


def finish(measure, out, as_json):
    """Measure, print the result, write it to the file of --out, and return it."""
    from pipeline.console import Talk

    result = measure(say=Talk().say)
    if out:
        write_artefact(out, "bench", result.to_dict())
    show(result, as_json)
    return result


COMMANDS = (bench,)
