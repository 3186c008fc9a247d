"""What is made of a run: report, export, predict; and what any artefact is: info, doctor."""

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import click

from pipeline.cli.completion import methods, runs, stores
from pipeline.cli.exit_codes import show
from pipeline.cli.options import PATH, STORE, Examples, dry_run, shared
from pipeline.cli.paths import is_store, run_folder
from pipeline.errors import FAILED

LAYOUTS = ("table", "csv", "jsonl")
WIDE = 120  # columns of a table that goes to a file or another program
MOST_REASONS = 20  # of images left out


@click.command(
    "report",
    short_help="One interactive HTML page of a run, or of several side by side.",
    cls=Examples,
    example="pipeline report runs/digits-lt",
)
@click.argument("runs", nargs=-1, metavar="[RUN]…", shell_complete=runs)
@click.option("--out", type=PATH, help="Where report.html and figures/ go [default: the run; of several, ./report].")
@dry_run
@shared
def report_command(runs, out, dry_run, as_json, debug):
    """One self-contained, interactive HTML page of a run, and its figures as PNG with their numbers as CSV.

    RUN is a folder of `pipeline run` or `rebalance`, or of ablations; several are put side by side, then each for itself.
    """
    folders = [run_folder(run) for run in runs] or [run_folder(None)]
    from pipeline.report import prepare_report

    prepared = prepare_report(folders, out=out)
    show(prepared.description if dry_run else prepared.write(), as_json)


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
    from pipeline.report.progress import prepare_progress

    prepared = prepare_progress(runs, out=out)
    show(prepared.description if dry_run else prepared.write(), as_json)


@click.command(
    "export",
    short_help="The model with the rebalanced head, or a store as files.",
    cls=Examples,
    example="pipeline export runs/digits-lt --to onnx --out model",
)
@click.argument("run", required=False, shell_complete=runs)
@click.option(
    "--to",
    "kind",
    type=click.Choice(["timm", "safetensors", "onnx", "npy"]),
    help="timm, safetensors or onnx of a model [default: timm], npy or safetensors of a feature store [default: npy].",
)
@click.option("--out", type=PATH, required=True, help="The folder to make.")
@click.option("--lam", type=float, help="Take the head of this λ instead of the selected one.")
@click.option(
    "--method",
    metavar="NAME",
    shell_complete=methods,
    help="Take the head of this method instead; with several λ, that which validation prefers.",
)
@dry_run
@shared
def export_command(run, kind, out, lam, method, dry_run, as_json, debug):
    """The whole model with the rebalanced head, its configuration and a model card, as a folder.

    ONNX is one graph from pixels to logits, and needs the extra: pip install 'iwb-pipeline[onnx]'.

    Or, where RUN is a feature store (…/features.zarr), its features, labels and classifier as plain files.
    """
    if run is not None and is_store(run):
        from pipeline.deploy.store_export import prepare_store_export

        if kind in ("timm", "onnx") or lam is not None or method is not None:
            raise click.UsageError(
                f"{run} is a feature store: it goes --to npy or safetensors, without --lam or --method"
            )
        prepared = prepare_store_export(run, to=kind or "npy", out=out)
    elif kind == "npy":
        raise click.UsageError(f"npy is of a feature store, such as {run_folder(run) / 'features.zarr'}")
    else:
        from pipeline.deploy.export import prepare_export

        prepared = prepare_export(run_folder(run), to=kind or "timm", out=out, lam=lam, method=method)
    show(prepared.description if dry_run else prepared.write(), as_json)


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
    type=click.Choice([*LAYOUTS]),
    help="How they are printed [default: what --out ends with; table].",
)
@click.option("--out", type=PATH, help="A file for them, such as labels.csv or labels.jsonl, instead of the terminal.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at a time.")
@click.option("--compare", is_flag=True, help="Also say what the head before rebalancing says, and what has changed.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@dry_run
@shared
def predict_command(model, images, top_k, layout, out, batch_size, compare, device, dry_run, as_json, debug):
    """Label images with an exported model or a run.

    MODEL is a folder of `pipeline export` or a run; IMAGES are files, folders, globs, and - for a list of them on standard
    input, one a line. Unreadable files are reported and left out; exit code 3 if none could be read.
    """
    if as_json and (layout or out) and not dry_run:
        raise click.UsageError("--json is one document on stdout: give it without --format and --out")
    if out and not layout and out.suffix not in (".csv", ".jsonl"):
        raise click.UsageError(f"{out}: ends neither with .csv nor with .jsonl; say --format")
    layout = layout or (out.suffix[1:] if out else "table")
    lines = [name for word in images for name in (sys.stdin.read().splitlines() if word == "-" else [word])]
    from cache import write_durably
    from pipeline.console import Talk
    from pipeline.deploy.predict import prepare_predict
    from pipeline.deploy.prediction import CHANGED, Predictions, count_images, csv_lines, json_lines, table_lines

    prepared = prepare_predict(
        model, [name for name in lines if name], top_k=top_k, batch_size=batch_size, device=device, compare=compare, out=out
    )  # fmt: skip
    if dry_run:
        show(prepared.description, as_json)
        return
    talk, paths, changes = Talk(), prepared.paths, prepared.changes
    unreadable: list[str] = []
    on_terminal = not (as_json or out) and sys.stdout.isatty()  # rows that come are progress enough
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
                click.echo(line, nl=False)
    if out:
        click.echo(f"{out}: {count_images(len(paths) - len(unreadable))} labelled")
    if changes is not None:
        mark = f"\n{CHANGED} " if layout == "table" and changes.changed else "\n" * (layout == "table")
        click.echo(f"{mark}{changes}", err=layout != "table" and not out)
    skipped = [*prepared.skipped, *unreadable]
    for reason in skipped[:MOST_REASONS]:
        talk.say(f"left out: {reason}")
    if len(skipped) > MOST_REASONS:
        talk.say(f"left out: {len(skipped) - MOST_REASONS:,} more; --json lists them all")


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
