"""Commands on finished runs: report, progress, export and predict; and info and doctor."""

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from pipeline.cli.completion import methods, runs, stores
from pipeline.cli.exit_codes import show
from pipeline.cli.options import EXECUTION, PATH, STORE, Command, count, device, dry_run, option, shared
from pipeline.cli.paths import is_store, run_folder
from pipeline.errors import FAILED

LAYOUTS = ("table", "csv", "jsonl")
WIDE = 120  # columns of a table that goes to a file or another program
LISTED = 20  # images left out whose names are printed


@click.command(
    "report",
    cls=Command,
    example="pipeline report runs/digits-lt",
)
@click.argument("runs", nargs=-1, metavar="[RUN]…", shell_complete=runs)
@option("--out", type=PATH, help="Folder of report.html and figures/.", shown_default="the run; of several, ./report")
@dry_run
@shared
def report_command(runs, out, dry_run, as_json, debug):
    """Write one self-contained, interactive HTML page of a run, and its figures as PNG with their numbers as CSV.

    RUN is a folder of `pipeline run` or `rebalance`, or of ablations. Several are compared first; a section on each follows.
    """
    folders = [run_folder(run) for run in runs] or [run_folder(None)]
    from pipeline.report import prepare_report

    prepared = prepare_report(folders, out=out)
    show(prepared.description if dry_run else prepared.write(), as_json)


@click.command(
    "progress",
    cls=Command,
    example="pipeline progress runs/cross-entropy runs/weakened",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=PATH, shell_complete=runs)
@option(
    "--out", type=PATH, default=Path("progress"), show_default=True, help="Folder of progress.png and progress.csv."
)
@dry_run
@shared
def progress_command(runs, out, dry_run, as_json, debug):
    """Draw how evenly trainings learn their classes: spread of training accuracy over classes, and gradient ratio.

    RUN is a folder of `pipeline run` or `train-backbone` with backbone.diagnose_every=1; the first of several is the
    reference of the others.
    """
    from pipeline.report.progress import prepare_progress

    prepared = prepare_progress(runs, out=out)
    show(prepared.description if dry_run else prepared.write(), as_json)


@click.command(
    "export",
    cls=Command,
    example="pipeline export runs/digits-lt --to onnx --out model",
)
@click.argument("run", required=False, shell_complete=runs)
@option(
    "--to",
    "kind",
    type=click.Choice(["timm", "safetensors", "onnx", "npy"]),
    help="Format: timm, safetensors or onnx for a model, npy or safetensors for a feature store.",
    shown_default="timm, of a store npy",
)
@option("--out", type=PATH, required=True, help="Folder to write.")
@option("--lam", type=float, metavar="X", help="λ of the head to take instead of the selected one.")
@option(
    "--method",
    metavar="NAME",
    shell_complete=methods,
    help="Method of the head to take instead; of several λ the one selected on validation.",
)
@dry_run
@shared
def export_command(run, kind, out, lam, method, dry_run, as_json, debug):
    """Write a folder with the whole model, its rebalanced head, its configuration and a model card.

    ONNX is one graph from pixels to logits, and needs the extra: pip install 'iwb-pipeline[onnx]'.

    Where RUN is a feature store (…/features.zarr), write its features, labels and classifier as plain files.
    """
    if run is not None and is_store(run):
        from pipeline.deploy.store_export import prepare_store_export

        if kind in ("timm", "onnx") or lam is not None or method is not None:
            raise click.UsageError(
                f"{run} is a feature store: it goes --to npy or safetensors, without --lam or --method"
            )
        prepared: Any = prepare_store_export(run, to=kind or "npy", out=out)
    elif kind == "npy":
        raise click.UsageError(f"npy is of a feature store, such as {run_folder(run) / 'features.zarr'}")
    else:
        from pipeline.deploy.export import prepare_export

        prepared = prepare_export(run_folder(run), to=kind or "timm", out=out, lam=lam, method=method)
    show(prepared.description if dry_run else prepared.write(), as_json)


@click.command(
    "predict",
    cls=Command,
    example="pipeline predict model photos/ --top-k 3",
)
@click.argument("model", type=PATH, shell_complete=runs)
@click.argument("images", nargs=-1, required=True)
@count("--top-k", "Classes to print per image.", default=3)
@option(
    "--format",
    "layout",
    type=click.Choice([*LAYOUTS]),
    help="Format of the labels.",
    shown_default="the ending of --out, else table",
)
@option("--out", type=PATH, help="File to write, such as labels.csv or labels.jsonl, instead of printing.")
@option("--compare", is_flag=True, help="Also print the label before rebalancing, and count the changes.")
@count("--batch-size", "Images per batch.", default=64, group=EXECUTION)
@device
@dry_run
@shared
def predict_command(model, images, top_k, layout, out, batch_size, compare, device, dry_run, as_json, debug):
    """Label images with an exported model or a run.

    MODEL is a folder of `pipeline export` or a run; IMAGES are files, folders, globs, and - for names on standard input, one
    per line. Unreadable files are listed and left out; the exit code is 3 if none could be read.
    """
    if as_json and (layout or out) and not dry_run:
        raise click.UsageError("--json is one document on stdout: give it without --format and --out")
    if out and not layout and out.suffix not in (".csv", ".jsonl"):
        raise click.UsageError(f"{out}: ends neither with .csv nor with .jsonl; say --format")
    layout = layout or (out.suffix[1:] if out else "table")
    words = [name for word in images for name in (sys.stdin.read().splitlines() if word == "-" else [word])]
    from cache import write_durably
    from pipeline.console import Talk
    from pipeline.deploy.predict import prepare_predict
    from pipeline.deploy.prediction import CHANGED, Predictions, count_images, csv_lines, json_lines, table_lines
    from pipeline.text import printable

    prepared = prepare_predict(
        model, [name for name in words if name], top_k=top_k, batch_size=batch_size, device=device, compare=compare, out=out
    )  # fmt: skip
    if dry_run:
        show(prepared.description, as_json)
        return
    talk, paths, changes = Talk(), prepared.paths, prepared.changes
    unreadable: list[str] = []
    on_terminal = not (as_json or out) and sys.stdout.isatty()  # there the rows themselves are the progress
    with nullcontext() if on_terminal else talk.progress("predict") as bar:

        def rows():
            for done, row in enumerate(prepared.rows(unreadable.append), 1):
                if bar is not None:
                    bar.move(done + len(unreadable), len(paths))
                yield row

        if as_json:
            show(Predictions(tuple(rows()), (*prepared.skipped, *unreadable), changes), True)
            return
        if layout == "table":
            width = shutil.get_terminal_size().columns if on_terminal else WIDE
            lines = table_lines(rows(), [str(path) for path in paths], width=width)
        else:
            lines = csv_lines(rows()) if layout == "csv" else json_lines(rows())
        encoded = (f"{line}\n".encode(errors="backslashreplace") for line in lines)  # names of files may be no text
        if out:
            write_durably(out, lambda file: file.writelines(encoded))
        else:
            for line in encoded:
                click.echo(printable(line.decode()).encode() if on_terminal else line, nl=False)
    if out:
        click.echo(f"{out}: {count_images(len(paths) - len(unreadable))} labelled")
    if changes is not None:
        mark = f"\n{CHANGED} " if layout == "table" and changes.changed else "\n" * (layout == "table")
        click.echo(f"{mark}{changes}", err=layout != "table" and not out)
    skipped = [*prepared.skipped, *unreadable]
    for reason in skipped[:LISTED]:
        talk.say(f"left out: {reason}")
    if len(skipped) > LISTED:
        talk.say(f"left out: {len(skipped) - LISTED:,} more; --json lists them all")


@click.command(
    "info",
    cls=Command,
    example="pipeline info runs/digits-lt/features.zarr",
)
@click.argument("path", type=STORE, shell_complete=stores)
@shared
def info_command(path, as_json, debug):
    """Print what an artefact is and what made it: a run, checkpoint, store, results, heads, export or configuration."""
    from pipeline.info import describe

    show(describe(path), as_json)


@click.command("doctor", cls=Command, example="pipeline doctor")
@shared
def doctor_command(as_json, debug):
    """Print versions, devices, the precision chosen and the reason, and run a short self-test."""
    from pipeline.doctor import doctor

    diagnosis = doctor()
    show(diagnosis, as_json)
    if not diagnosis.ok:
        raise click.exceptions.Exit(FAILED)


COMMANDS = (report_command, progress_command, export_command, predict_command, info_command, doctor_command)
