"""The command line: parse, call one public function, print. Heavy libraries are imported inside the commands."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import DATA, FAILED, INTERRUPTED, USAGE, ConfigError, Elsewhere, PipelineError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.console import Talk

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Examples(click.Command):
    """A command whose help ends with an example that works as it stands."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any):
        kwargs["epilog"] = f"\b\nExample:\n  {example}" if example else None
        super().__init__(*args, **kwargs)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="iwb-pipeline", prog_name="pipeline")
def cli() -> None:
    """Train an image classifier once on unbalanced classes, re-balance it in seconds.

    \b
    The three steps:  pipeline train-backbone → pipeline dump-features → pipeline rebalance --lam 0.05
    All in one:       pipeline run digits-lt
    """


def shared(command: Any) -> Any:
    """The options every command has."""
    command = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")(
        command
    )


def settings(command: Any) -> Any:
    return click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a configuration key, such as backbone.epochs=10.",
    )(command)


def workers(command: Any) -> Any:
    command = click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute."
    )(command)
    return click.option(
        "--nproc",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Processes on this host (torchrun); one a GPU.",
    )(command)


PATH = click.Path(path_type=Path)


@cli.command("run", cls=Examples, example="pipeline run digits-lt --seeds 0,1,2")
@click.argument("config", required=False)
@click.option("--out", type=PATH, help="Where the run goes [default: runs/CONFIG-NAME].")
@click.option("--seeds", metavar="0,1,2", help="Train one backbone per seed and aggregate over them.")
@click.option("--overwrite", is_flag=True, help="Start the run anew.")
@workers
@settings
@shared
def run_command(config, out, seeds, overwrite, nproc, device, sets, as_json, debug):
    """Stage 1, feature dump, rebalancing and report in one go; resumes where it stopped.

    CONFIG is a file or the name of a shipped configuration (default: ./pipeline.yaml, else digits-lt).
    """
    talk, chosen = _config(config, sets)
    if _relaunched(nproc):
        return
    from pipeline.run import run_pipeline

    result = run_pipeline(
        chosen,
        out=out or chosen.run_dir,
        seeds=_whole_numbers("--seeds", seeds),
        device=device,
        overwrite=overwrite,
        talk=talk,
    )
    _show(result, as_json)


@cli.command("train-backbone", cls=Examples, example="pipeline train-backbone digits-lt --set backbone.epochs=10")
@click.argument("config", required=False)
@click.option("--out", type=PATH, help="Where checkpoints go [default: runs/CONFIG-NAME/backbone].")
@click.option("--overwrite", is_flag=True, help="Start anew instead of continuing the checkpoint there.")
@workers
@settings
@shared
def train_command(config, out, overwrite, nproc, device, sets, as_json, debug):
    """Stage 1: train an encoder and classifier with cross-entropy; continues a checkpoint of the same configuration.

    CONFIG is a file or the name of a shipped configuration (default: ./pipeline.yaml, else digits-lt).
    """
    talk, chosen = _config(config, sets)
    if _relaunched(nproc):
        return
    from pipeline.backbone.train import train_backbone
    from pipeline.console import TrainingReporter

    out = out or chosen.run_dir / "backbone"
    with talk.progress("training") as bar:
        result = train_backbone(chosen, out=out, device=device, overwrite=overwrite, report=TrainingReporter(talk, bar))
    _show(result, as_json)


@cli.command("dump-features", cls=Examples, example="pipeline dump-features digits-lt --views 4")
@click.argument("config", required=False)
@click.option("--checkpoint", type=PATH, help="The backbone [default: runs/CONFIG-NAME/backbone/last.pt].")
@click.option("--out", type=PATH, help="The store [default: features.zarr in the backbone's run].")
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
@workers
@settings
@shared
def dump_command(config, checkpoint, out, views, dtype, overwrite, nproc, device, sets, as_json, debug):
    """Run the frozen encoder once over every sample into a zarr store; called again it finishes, verifies or repairs it.

    Images are those the checkpoint was trained with, unless both CONFIG and --checkpoint are given.
    """
    extra = ([f"dump.views={views}"] if views else []) + ([f"dump.dtype={dtype}"] if dtype else [])
    talk, named = _config(config, sets, told=config is not None or checkpoint is None)
    path = checkpoint or named.run_dir / "backbone" / "last.pt"
    if not path.is_file():
        from pipeline.errors import DataError

        raise DataError(
            f"{path}: no such checkpoint; make one with `pipeline train-backbone{f' {config}' if config else ''}`"
        )
    if _relaunched(nproc):
        return
    from cache import open_cache
    from pipeline.backbone.checkpoint import load_checkpoint
    from pipeline.console import describe_dataset
    from pipeline.dump import dump_features

    backbone = load_checkpoint(path)
    chosen = _dump_config(
        named if config else None, backbone.config, both=bool(config and checkpoint), sets=(*sets, *extra)
    )
    out = out or (path.parent.parent if path.parent.name == "backbone" else path.parent) / "features.zarr"
    talk.say(f"checkpoint: {path}; store: {out}")
    with talk.progress("dumping") as bar:
        result = dump_features(backbone, chosen, out=out, device=device, overwrite=overwrite, report=bar.move)
    talk.say(describe_dataset(open_cache(out).provenance["dataset"]))
    _show(result, as_json)


@cli.command("rebalance", cls=Examples, example="pipeline rebalance --lam 0.01:0.5:log:12")
@click.argument("store", required=False)
@click.option("--config", help="Take the rebalance settings from this configuration, not from the store's.")
@click.option(
    "--lam", metavar="LAM", help="0.05 | 0.01,0.05,0.1 | 0.01:0.5:log:32 | auto: λ, the scale of the target P."
)
@click.option("--method", multiple=True, help="iwb (default), cb, ce …; repeatable.")
@click.option(
    "--loss", type=click.Choice(["cb", "ce"]), help="Class-balanced loss or cross-entropy beside the KL term."
)
@click.option(
    "--formulation",
    type=click.Choice(["paper", "code"]),
    help="As the paper writes it, or as its released code does it.",
)
@click.option(
    "--cb", type=click.Choice(["softmax", "bce"]), help="Form of the class-balanced loss [default: the formulation's]."
)
@click.option("--hardness", type=click.Choice(["vector", "scalar", "none"]), help="Sample-wise part of the target.")
@click.option("--number/--no-number", default=None, help="Class-wise part of the target.")
@click.option("--divergence", type=click.Choice(["kl", "mse"]), help="How far the norms are from the target.")
@click.option("--kl-weight", metavar="W|batch", help="Weight of the KL term [default: the formulation's].")
@click.option(
    "--views", type=click.Choice(["augmented", "clean"]), help="Train on the augmented views or on the clean one."
)
@click.option("--seeds", metavar="0,1,2", help="Batch orders.")
@click.option("--epochs", type=click.IntRange(1))
@click.option("--lr", type=click.FloatRange(0, min_open=True))
@click.option("--batch-size", type=click.IntRange(1))
@click.option(
    "--select-on", type=click.Choice(["val", "kfold"]), help="What the choice of λ is made on; never the test split."
)
@click.option("--out", type=PATH, help="Where results go [default: rebalance/ beside the store].")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@settings
@shared
def rebalance_command(store, config, out, device, sets, as_json, debug, **options):
    """Fit the classifier on the cached features: class-balanced loss + KL(weight norms ‖ target P), many λ in one pass.

    STORE is a feature store, a run's folder, or the name of a configuration whose run has one.
    """
    if options["seeds"] is not None:
        options["seeds"] = list(_whole_numbers("--seeds", options["seeds"]) or ())
    options["method"] = list(options["method"]) or None
    talk, path, tree = _store_and_tree(store, config, sets=sets)
    from pipeline.config import lay_over, make_config

    for key, value in options.items():
        if value is not None:
            tree.setdefault("rebalance", {})[key] = _number(value) if key == "kl_weight" else value
    for setting in sets:
        lay_over(tree, setting)
    chosen = make_config(tree, "rebalance settings")
    from pipeline.rebalance import rebalance

    out = out or _results_folder(path)
    talk.say(f"store: {path}; results: {out}")
    _show(rebalance(path, chosen.rebalance, out=out, device=device), as_json)


@cli.command(
    "evaluate",
    cls=Examples,
    example="pipeline evaluate runs/digits-lt --heads runs/digits-lt/rebalance/heads.safetensors",
)
@click.argument("store", required=False)
@click.option(
    "--heads",
    type=PATH,
    help="heads.safetensors of a rebalance [default: rebalance/heads.safetensors beside the store].",
)
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@shared
def evaluate_command(store, heads, split, as_json, debug):
    """The table of given heads on one split; nothing is fitted and nothing is chosen."""
    talk, path, _ = _store_and_tree(store, None)
    heads = heads or _results_folder(path) / "heads.safetensors"
    from pipeline.rebalance import evaluate

    talk.say(f"store: {path}; heads: {heads}")
    _show(evaluate(path, heads, split=split), as_json)


@cli.command("report", cls=Examples, example="pipeline report runs/digits-lt")
@click.argument("run", required=False)
@click.option("--out", type=PATH, help="Where report.html and figures/ go [default: the run].")
@shared
def report_command(run, out, as_json, debug):
    """One self-contained HTML page of a run, and its figures as PNG with their numbers as CSV."""
    from pipeline.report import write_report

    _show(write_report(_run_folder(run), out=out), as_json)


@cli.command("export", cls=Examples, example="pipeline export runs/digits-lt --to timm --out model")
@click.argument("run", required=False)
@click.option("--to", "kind", type=click.Choice(["timm", "safetensors"]), default="timm", show_default=True)
@click.option("--out", type=PATH, required=True, help="The folder to make.")
@click.option("--lam", type=float, help="Take the head of this λ instead of the selected one.")
@shared
def export_command(run, kind, out, lam, as_json, debug):
    """The whole model with the rebalanced head, its configuration and a model card, as a folder."""
    from pipeline.export import export_model

    _show(export_model(_run_folder(run), to=kind, out=out, lam=lam), as_json)


@cli.command("predict", cls=Examples, example="pipeline predict model photos/ --top-k 3")
@click.argument("model", type=PATH)
@click.argument("images", nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(1), default=3, show_default=True, help="How many classes to name.")
@click.option("--format", "layout", type=click.Choice(["table", "csv", "jsonl"]), default="table", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--compare", is_flag=True, help="Also say what the head before rebalancing says.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@shared
def predict_command(model, images, top_k, layout, batch_size, compare, device, as_json, debug):
    """Label images with an exported model or a run.

    MODEL is a folder of `pipeline export` or a run; IMAGES are files, folders and globs. Unreadable files are reported and
    left out; exit code 3 if none could be read.
    """
    from rich.console import Console

    from pipeline import predict as predictor
    from pipeline.console import Talk

    skipped: list[str] = []
    rows = predictor.predict(
        model, images, top_k=top_k, batch_size=batch_size, device=device, compare=compare, skipped=skipped.append
    )
    if as_json:
        document = {"predictions": [row.to_dict() for row in rows], "skipped": skipped}
        click.echo(json.dumps(document, indent=1, allow_nan=False))
    elif layout == "table":
        Console(highlight=False).print(predictor.table(rows))
    else:
        for line in predictor.csv_lines(rows) if layout == "csv" else predictor.json_lines(rows):
            click.echo(line)
    for reason in skipped:
        Talk().say(f"left out: {reason}")


@cli.command("info", cls=Examples, example="pipeline info runs/digits-lt/features.zarr")
@click.argument("path", type=PATH)
@shared
def info_command(path, as_json, debug):
    """What an artefact is and what made it: a run, checkpoint, store, results, heads, export or configuration."""
    from pipeline.info import describe

    _show(describe(path), as_json)


@cli.command("verify", cls=Examples, example="pipeline verify runs/digits-lt/features.zarr")
@click.argument("store", required=False)
@shared
def verify_command(store, as_json, debug):
    """Read a whole feature store against its checksums; exit code 3 and the damaged rows where something is wrong."""
    talk, path, _ = _store_and_tree(store, None, settings_from_store=False)
    from pipeline.info import verify_store

    talk.say(f"store: {path}")
    _show(verify_store(path), as_json)


@cli.command("doctor", cls=Examples, example="pipeline doctor")
@shared
def doctor_command(as_json, debug):
    """Versions, devices, the precision chosen and why, and a short self-test."""
    from pipeline.doctor import doctor

    found = doctor()
    _show(found, as_json)
    if not found.ok:
        raise click.exceptions.Exit(FAILED)


def _config(name: str | None, sets: Any, *, told: bool = True) -> "tuple[Talk, Config]":
    """The console and the configuration a command works with; says which it took."""
    from pipeline.config import find_config, load_config
    from pipeline.console import Talk

    talk, path = Talk(), find_config(name)
    chosen = load_config(path, sets)
    if told:
        talk.say(f"configuration: {chosen.name} ({path})")
    return talk, chosen


def _results_folder(store: Path) -> Path:
    """Where results of a store go: rebalance/ beside a run's features.zarr, NAME-rebalance/ beside another NAME.zarr."""
    return store.parent / ("rebalance" if store.name == "features.zarr" else f"{store.stem}-rebalance")


def _run_folder(run: str | None) -> Path:
    """A run's folder from a path, the name of a configuration, or nothing (the default configuration's)."""
    from pipeline.config import find_config, load_config

    if run is not None and Path(run).exists():
        return Path(run)
    try:
        return load_config(find_config(run)).run_dir
    except ConfigError:
        return Path(run or "")


def _dump_config(named: "Config | None", saved: "Config", *, both: bool, sets: Any) -> "Config":
    """What is dumped: the checkpoint's images with the named configuration's dump settings; CONFIG's alone with both given."""
    from pipeline.config import lay_over, make_config

    tree = (named if both and named else saved).model_dump(mode="json")
    if named and not both:
        tree |= {"dump": named.dump.model_dump(mode="json"), "rebalance": named.rebalance.model_dump(mode="json")}
    for setting in sets:
        lay_over(tree, setting)
    return make_config(tree, "dump settings")


def _store_and_tree(
    store: str | None, config: str | None, *, sets: Any = (), settings_from_store: bool = True
) -> "tuple[Talk, Path, dict]":
    """(console, store, configuration tree) of a rebalance: settings of --config, else of the store, else of the default."""
    from pipeline.config import find_config, load_config
    from pipeline.console import Talk
    from pipeline.errors import DataError

    talk = Talk()
    named = load_config(find_config(config), sets) if config or store is None else None
    if store is None:
        assert named is not None
        path = named.run_dir / "features.zarr"
    elif Path(store).exists():
        path = Path(store) / "features.zarr" if (Path(store) / "features.zarr").exists() else Path(store)
    else:
        try:
            path = load_config(find_config(store)).run_dir / "features.zarr"
        except ConfigError:
            path = Path(store)
    if not path.exists():
        raise DataError(f"{path}: no such feature store; make one with `pipeline dump-features`")
    if named is not None:
        return talk, path, named.model_dump(mode="json")
    if not settings_from_store:
        return talk, path, {}
    from cache import open_cache

    return talk, path, dict(open_cache(path).provenance["config"])


def _relaunched(nproc: int) -> bool:
    """True if the command ran in nproc torchrun workers instead; exits with their code if they failed."""
    if nproc == 1 or "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return False
    from pipeline.distributed import launch

    arguments = sys.argv[1:] if _ARGUMENTS is None else _ARGUMENTS
    kept = [
        a for i, a in enumerate(arguments) if not a.startswith("--nproc") and (i == 0 or arguments[i - 1] != "--nproc")
    ]
    code = launch(nproc, kept)
    if code:
        raise click.exceptions.Exit(code)
    return True


def _whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise ConfigError(f"{option} {text}: expected different whole numbers such as 0,1,2")
    return numbers


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _show(result: Any, as_json: bool) -> None:
    """The result on stdout, of rank 0 only: one JSON document, or what a person reads."""
    if int(os.environ.get("RANK", 0)):
        return
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1, allow_nan=False))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 110
    Console(highlight=False, width=width).print(
        result if hasattr(result, "__rich__") or hasattr(result, "__rich_console__") else str(result), markup=False
    )


_ARGUMENTS: list[str] | None = None


def invoke(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; no error but with --debug shows a traceback."""
    global _ARGUMENTS
    _ARGUMENTS = arguments
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = cli.main(words, prog_name="pipeline", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        error.show()
        return _failed(words, error.format_message(), USAGE, told=True)
    except click.ClickException as error:
        return _failed(words, error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _failed(words, "interrupted; the same command goes on where it stopped", INTERRUPTED)
    except Elsewhere as error:
        return error.exit_code
    except Exception as error:
        if "--debug" in words:
            import traceback

            traceback.print_exc()
        return _failed(words, *_explained(error))


def _explained(error: Exception) -> tuple[str, int]:
    """(what a person is told, exit code) of an exception."""
    if isinstance(error, PipelineError):
        return str(error), error.exit_code
    if type(error).__module__.partition(".")[0] == "cache":
        return str(error), DATA
    if isinstance(error, OSError) and error.errno is not None:
        advice = {
            errno.ENOSPC: "free some space, then the same command goes on where it stopped",
            errno.EDQUOT: "free some space, then the same command goes on where it stopped",
            errno.EACCES: "choose a folder you may write to with --out, or change its permissions",
            errno.EROFS: "choose a folder you may write to with --out",
        }.get(error.errno, "see --debug for where it happened")
        name = Path(str(error.filename or "file system"))
        shown = name.parent if name.suffix == ".tmp" else name  # of a durable write, whose own name says nothing
        return f"{shown}: {error.strerror}; {advice}", FAILED
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())[:400]} (this should not happen: --debug shows where)",
        FAILED,
    )


def _failed(words: list[str], message: str, code: int, *, told: bool = False) -> int:
    if not told:
        from pipeline.console import Talk

        Talk().error(message)
    if "--json" in words and not int(os.environ.get("RANK", 0)):
        click.echo(json.dumps({"error": message, "exit_code": code}))
    return code


def main() -> None:
    """Entry point of the console script."""
    sys.exit(invoke())
