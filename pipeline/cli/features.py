"""Commands on features: rebalance, evaluate and verify."""

import os

import click

from pipeline.cli.completion import configs, methods, stores
from pipeline.cli.exit_codes import process_count, relaunched, show
from pipeline.cli.job import processes
from pipeline.cli.options import (
    EXECUTION,
    PATH,
    STORE,
    Command,
    dry_run,
    number,
    option,
    setting_option,
    settings,
    shared,
    whole_numbers,
)
from pipeline.cli.paths import store_and_tree
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS


@click.command(
    "rebalance",
    cls=Command,
    example="pipeline rebalance --lam 0.01:0.5:log:12",
    lists={"Methods": METHODS},
)
@click.argument("store", required=False, shell_complete=stores)
@option(
    "--config",
    metavar="CONFIG",
    shell_complete=configs,
    help="Configuration whose rebalance settings replace the store's.",
)
@option(
    "--also",
    type=STORE,
    multiple=True,
    help="Store of another encoder's features of the same images, put beside STORE's, each feature standardised.",
)
@option(
    "--head",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Linear head of another program, .npz or .safetensors: a row of the table and a member of the ensemble.",
)
@setting_option("rebalance.lam", metavar="LAM")
@setting_option("rebalance.method", metavar="NAME|FILE.py", shell_complete=methods)
@setting_option("rebalance.views")
@option(
    "--out",
    type=PATH,
    help="Folder of the results.",
    shown_default="rebalance/ beside features.zarr, NAME-rebalance/ beside another NAME.zarr",
)
@setting_option("rebalance.seeds", metavar="0,1,2")
@setting_option("rebalance.loss", group="Objective")
@setting_option("rebalance.formulation", group="Objective")
@setting_option("rebalance.cb", group="Objective")
@setting_option("rebalance.beta", group="Objective")
@setting_option("rebalance.hardness", group="Objective")
@setting_option("rebalance.log_base", group="Objective")
@setting_option("rebalance.number", group="Objective")
@setting_option("rebalance.divergence", group="Objective")
@setting_option("rebalance.direction", group="Objective")
@setting_option("rebalance.detach_target", group="Objective")
@setting_option("rebalance.kl_weight", group="Objective", metavar="W|batch")
@setting_option("rebalance.epochs", group="Tuning")
@setting_option("rebalance.lr", group="Tuning")
@setting_option("rebalance.batch_size", group="Tuning")
@setting_option("rebalance.sampling", group="Tuning")
@setting_option("rebalance.select_on", group="Tuning")
@setting_option("rebalance.tune", group="Tuning")
@setting_option("rebalance.trials", group="Tuning")
@setting_option("rebalance.budget", group="Tuning", metavar="10m|2h|none")
@setting_option("rebalance.force_double_balancing", group="Tuning")
@setting_option("rebalance.spread", group=EXECUTION)
@dry_run
@processes
@settings
@shared
def rebalance_command(store, config, also, head, out, dry_run, nproc, device, sets, as_json, debug, **options):
    """Fit the classifier on the cached features: class-balanced loss + KL(weight norms ‖ target P), many λ in one pass.

    STORE is a feature store, a run's folder, or the name of a configuration whose run has one. An option that is not typed
    has the value of the store's configuration; defaults are those of the program.

    Where methods compete, each trained one gets the same number of trials, which are compared on validation data; only then
    is the test split read. Where --config lists variants, as ablations/table3 does, each is fitted and selected by itself,
    and one table and figure compare them.
    """
    if options["seeds"] is not None:
        options["seeds"] = list(whole_numbers("--seeds", options["seeds"]) or ())
    options["method"] = list(options["method"]) or None
    talk, path, tree = store_and_tree(store, config, sets=sets)
    if also:
        path = _concatenated(talk, path, also)
    if head:
        from pipeline.rebalance.methods.external import HEAD_FILES

        if others := [str(file) for file in head if not str(file).endswith(HEAD_FILES)]:
            raise ConfigError(
                f"--head {others[0]}: expected a file that ends in {' or '.join(HEAD_FILES)} and holds weight (C, D), "
                "class_names and, unless it is zero, bias; a rule of your own is given with --method FILE.py"
            )
        settled = options["method"] or tree.get("rebalance", {}).get("method") or ()
        options["method"] = [*(settled or (["iwb"] if options["lam"] else ["recommended"])), *map(str, head)]
    from pipeline.config import apply_setting, find_config, make_rebalance_config
    from pipeline.paths import results_folder

    for key, value in options.items():
        if value is not None:
            tree.setdefault("rebalance", {})[key] = number(value) if key == "kl_weight" else value
    for setting in sets:
        apply_setting(tree, setting)
    merged = make_rebalance_config(tree, "rebalance settings")
    if merged.variants and (fixed := [f"--{key}" for key in ("method", "loss", "formulation") if options[key]]):
        raise ConfigError(
            f"{', '.join(fixed)}: the variants of --config {config} set this themselves, and their names would be wrong; "
            "leave it out, or write variants of your own"
        )
    variants = f"{len(merged.variants)} variants; " if merged.variants else ""
    if out is None:
        out = results_folder(path, "ablations") / tree.get("name", "variants") if variants else results_folder(path)
    if dry_run:
        from pipeline.rebalance.prepare import prepare_ablation, prepare_rebalance

        prepare = prepare_ablation if variants else prepare_rebalance
        show(prepare(path, merged, out=out, device=device, world=process_count(nproc, device)).description, as_json)
        return
    if relaunched(nproc):
        return
    from pipeline.rebalance import ablate, rebalance

    origin = config or (find_config(None) if store is None else "the store's")
    talk.say(f"store: {path}; settings: {origin}; {variants}results: {out}")
    fit = ablate if variants else rebalance
    with talk.progress("fitting") as bar:
        result = fit(path, merged, out=out, device=device, report=talk.say, move=bar.move)
    if variants and not int(os.environ.get("RANK", 0)):
        from pipeline.report.ablation import write_accuracy_figure

        write_accuracy_figure(result.to_dict(), out)
    elif not int(os.environ.get("RANK", 0)):
        from pipeline.report.outdated import mark_outdated

        if page := mark_outdated(out):
            talk.notes(
                [f"{page} shows the results before these and says so now; draw it again: pipeline report {page.parent}"]
            )
    show(result, as_json)


def _concatenated(talk, path, also):
    """Return the store of several stores' features side by side, made unless it is there; each is named as STORE is."""
    from pipeline.concatenate import concatenate_stores, concatenated_folder
    from pipeline.hosts import in_worker

    stores = [path, *(store_and_tree(str(store), None, settings_from_store=False)[1] for store in also)]
    out = concatenated_folder(stores) / "features.zarr"
    if not in_worker():  # the process that starts the workers has made it
        concatenate_stores(stores, out)
        talk.say(f"features side by side: {out}")
    return out


@click.command(
    "evaluate",
    cls=Command,
    example="pipeline evaluate runs/digits-lt --split val",
)
@click.argument("store", required=False, shell_complete=stores)
@option(
    "--heads",
    type=PATH,
    help="heads.safetensors of a rebalance.",
    shown_default="rebalance/heads.safetensors beside the store",
)
@option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    default="test",
    show_default=True,
    help="Split to evaluate on.",
)
@shared
def evaluate_command(store, heads, split, as_json, debug):
    """Print the table of given heads on one split; nothing is fitted and nothing is selected."""
    talk, path, _ = store_and_tree(store, None)
    from pipeline.paths import results_folder
    from pipeline.rebalance import evaluate

    heads = heads or results_folder(path) / "heads.safetensors"
    talk.say(f"store: {path}; heads: {heads}")
    show(evaluate(path, heads, split=split), as_json)


@click.command(
    "verify",
    cls=Command,
    example="pipeline verify runs/digits-lt/features.zarr",
)
@click.argument("store", required=False, shell_complete=stores)
@shared
def verify_command(store, as_json, debug):
    """Read a whole feature store and compare it with its checksums; exit code 3 and a list of damaged rows if any differ."""
    talk, path, _ = store_and_tree(store, None, settings_from_store=False)
    from pipeline.info import verify

    talk.say(f"store: {path}")
    show(verify(path), as_json)


COMMANDS = (rebalance_command, evaluate_command, verify_command)
