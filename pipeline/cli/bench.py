"""bench: the claims about speed and memory, measured on this machine."""

import json

import click

from pipeline.cli.exit_codes import show
from pipeline.cli.options import PATH, Examples, shared


@click.group("bench", short_help="What the program costs on this machine.")
def bench() -> None:
    """Measure what the program costs on this machine, beside what one would use without it."""


@bench.command(
    "cache",
    short_help="The feature store: dump, load, verify, memory.",
    cls=Examples,
    example="pipeline bench cache --rows 20000 --out bench-cache.json",
)
@click.option("--rows", type=click.IntRange(1), default=115_846, show_default=True, help="Training samples.")
@click.option("--width", type=click.IntRange(1), default=2048, show_default=True, help="Features of each.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each timing.")
@click.option("--folder", type=PATH, help="Where temporary files go [default: the system's].")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to encode.")
@click.option("--out", type=PATH, help="Also write the result to this JSON file.")
@shared
def cache_command(rows, width, repeat, folder, device, out, as_json, debug):
    """The feature store: dumping over the bare encoder, loading and verifying over np.load, memory against N.

    The default size is ImageNet-LT's; every ratio is of medians of interleaved repetitions, the page cache warm.
    """
    from pipeline.bench.cache import bench_cache
    from pipeline.console import Talk

    result = bench_cache(rows=rows, width=width, repeat=repeat, folder=folder, device=device, say=Talk().say)
    finish(result, out, as_json)


@bench.command(
    "rebalance",
    short_help="Stage 2 beside the usual loop and bare products.",
    cls=Examples,
    example="pipeline bench rebalance --repeat 3 --small",
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each timing.")
@click.option("--small", is_flag=True, help="CIFAR100-LT size alone, without ImageNet-LT's and iNaturalist's.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@click.option("--out", type=PATH, help="Also write the result to this JSON file.")
@shared
def rebalance_command(repeat, small, device, out, as_json, debug):
    """Stage 2: 32 λ over the usual loop, one head over its bare matrix products, IWB over plain cross-entropy.

    Every ratio is of medians of interleaved repetitions on generated features, all with the same threads.
    """
    from pipeline.bench.rebalance import bench_rebalance
    from pipeline.console import Talk

    result = bench_rebalance(repeat=repeat, device=device, large=not small, say=Talk().say)
    finish(result, out, as_json)


@bench.command(
    "train",
    short_help="Stage 1 beside a bare loop; ranks; loaders.",
    cls=Examples,
    example="pipeline bench train --repeat 3 --small",
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each timing.")
@click.option("--small", is_flag=True, help="A few steps each, without image files and whole trainings.")
@click.option("--folder", type=PATH, help="Where temporary files go [default: the system's].")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@click.option("--out", type=PATH, help="Also write the result to this JSON file.")
@shared
def train_command(repeat, small, folder, device, out, as_json, debug):
    """Stage 1: the trainer over the bare loop, two ranks over two processes, the loader over the network.

    On CUDA also what 200 epochs of CIFAR100-LT take. Every ratio is of medians of interleaved repetitions on generated
    images.
    """
    from pipeline.bench.train import bench_train
    from pipeline.console import Talk

    result = bench_train(repeat=repeat, small=small, folder=folder, device=device, say=Talk().say)
    finish(result, out, as_json)


def finish(result, out, as_json) -> None:
    """Shows a benchmark, and writes it where it is wanted."""
    from cache import write_durably

    if out:
        write_durably(out, json.dumps(result.to_dict(), indent=1, allow_nan=False))
    show(result, as_json)


COMMANDS = (bench,)
