"""What is made of a run: report, export, predict; and what any artefact is: info, doctor."""

import json
from pathlib import Path

import click

from pipeline.cli.completion import methods, runs, stores
from pipeline.cli.options import PATH, STORE, Examples, dry_run, shared
from pipeline.cli.outcome import show
from pipeline.cli.places import is_store, run_folder
from pipeline.errors import FAILED


@click.command(
    "report",
    short_help="One HTML page of a run, its figures as PNG and CSV.",
    cls=Examples,
    example="pipeline report runs/digits-lt",
)
@click.argument("run", required=False, shell_complete=runs)
@click.option("--out", type=PATH, help="Where report.html and figures/ go [default: the run].")
@dry_run
@shared
def report_command(run, out, dry_run, as_json, debug):
    """One self-contained HTML page of a run, and its figures as PNG with their numbers as CSV."""
    if dry_run:
        from pipeline.plan.after import plan_report

        show(plan_report(run_folder(run), out=out), as_json)
        return
    from pipeline.report import write_report

    show(write_report(run_folder(run), out=out), as_json)


@click.command(
    "progress",
    short_help="Compare how evenly the classes of trainings come along.",
    cls=Examples,
    example="pipeline progress runs/cross-entropy runs/weakened",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=PATH, shell_complete=runs)
@click.option("--out", type=PATH, default=Path("progress"), show_default=True, help="Where progress.png and .csv go.")
@dry_run
@shared
def progress_command(runs, out, dry_run, as_json, debug):
    """How evenly the classes of trainings come along: spread of training accuracy and gradient ratio, as a figure.

    RUN is a folder of `pipeline run` or `train-backbone` with backbone.diagnose_every=1; of several, the first is what
    the others are held against.
    """
    if dry_run:
        from pipeline.plan.after import plan_progress

        show(plan_progress(runs, out=out), as_json)
        return
    from pipeline.report.progress import compare_progress

    show(compare_progress(runs, out=out), as_json)


@click.command(
    "export",
    short_help="The model with the rebalanced head, or a store as files.",
    cls=Examples,
    example="pipeline export runs/digits-lt --to timm --out model",
)
@click.argument("run", required=False, shell_complete=runs)
@click.option(
    "--to",
    "kind",
    type=click.Choice(["timm", "safetensors", "npy"]),
    help="timm or safetensors of a model [default: timm], npy or safetensors of a feature store [default: npy].",
)
@click.option("--out", type=PATH, required=True, help="The folder to make.")
@click.option("--lam", type=float, help="Take the head of this λ instead of the selected one.")
@click.option(
    "--method", metavar="NAME", shell_complete=methods, help="Take the head of this method instead of the selected one."
)
@dry_run
@shared
def export_command(run, kind, out, lam, method, dry_run, as_json, debug):
    """The whole model with the rebalanced head, its configuration and a model card, as a folder.

    Or, where RUN is a feature store (…/features.zarr), its features, labels and classifier as plain files.
    """
    if run is not None and is_store(run):
        import cache

        if kind == "timm" or lam is not None or method is not None:
            raise click.UsageError(
                f"{run} is a feature store: it goes --to npy or safetensors, without --lam or --method"
            )
        if dry_run:
            from pipeline.plan.after import plan_export

            show(plan_export(run, to=kind, out=out), as_json)
            return
        show(cache.export(run, out, format=kind or "npy"), as_json)
        return
    if kind == "npy":
        raise click.UsageError(f"npy is of a feature store, such as {run_folder(run) / 'features.zarr'}")
    from pipeline.export import export_model

    if lam is not None and method is not None:
        raise click.UsageError("--lam is of iwb: give it without --method")
    if dry_run:
        from pipeline.plan.after import plan_export

        show(plan_export(run_folder(run), to=kind, out=out, lam=lam, method=method), as_json)
        return
    show(export_model(run_folder(run), to=kind or "timm", out=out, lam=lam, method=method), as_json)


@click.command(
    "predict",
    short_help="Label images with an exported model or a run.",
    cls=Examples,
    example="pipeline predict model photos/ --top-k 3",
)
@click.argument("model", type=PATH, shell_complete=runs)
@click.argument("images", nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(1), default=3, show_default=True, help="How many classes to name.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["table", "csv", "jsonl"]),
    default="table",
    show_default=True,
    help="How they are printed.",
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at a time.")
@click.option("--compare", is_flag=True, help="Also say what the head before rebalancing says.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@shared
def predict_command(model, images, top_k, layout, batch_size, compare, device, as_json, debug):
    """Label images with an exported model or a run.

    MODEL is a folder of `pipeline export` or a run; IMAGES are files, folders and globs. Unreadable files are reported and
    left out; exit code 3 if none could be read.
    """
    from rich.console import Console

    from pipeline.console import Talk
    from pipeline.predict import csv_lines, json_lines, predict, table

    skipped: list[str] = []
    rows = predict(
        model, images, top_k=top_k, batch_size=batch_size, device=device, compare=compare, skipped=skipped.append
    )
    if as_json:
        document = {"predictions": [row.to_dict() for row in rows], "skipped": skipped}
        click.echo(json.dumps(document, indent=1, allow_nan=False))
    elif layout == "table":
        Console(highlight=False).print(table(rows))
    else:
        for line in csv_lines(rows) if layout == "csv" else json_lines(rows):
            click.echo(line)
    for reason in skipped:
        Talk().say(f"left out: {reason}")


@click.command(
    "info",
    short_help="What an artefact is and what made it.",
    cls=Examples,
    example="pipeline info runs/digits-lt/features.zarr",
)
@click.argument("path", type=STORE, shell_complete=stores)
@shared
def info_command(path, as_json, debug):
    """What an artefact is and what made it: a run, checkpoint, store, results, heads, export or configuration."""
    from pipeline.info import describe

    show(describe(path), as_json)


@click.command(
    "doctor", short_help="Versions, devices, precision, and a short self-test.", cls=Examples, example="pipeline doctor"
)
@shared
def doctor_command(as_json, debug):
    """Versions, devices, the precision chosen and why, and a short self-test."""
    from pipeline.doctor import doctor

    found = doctor()
    show(found, as_json)
    if not found.ok:
        raise click.exceptions.Exit(FAILED)


COMMANDS = (report_command, progress_command, export_command, predict_command, info_command, doctor_command)
