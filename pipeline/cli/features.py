"""From features to a table: rebalance, evaluate; and whether a store is whole: verify."""

import click

from pipeline.cli.completion import configs, methods, stores
from pipeline.cli.exit_codes import processes, relaunched, show
from pipeline.cli.options import PATH, Examples, dry_run, number, settings, shared, whole_numbers, workers
from pipeline.cli.paths import store_and_tree
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS


@click.command(
    "rebalance",
    short_help="Stage 2: fit classifiers on features, many λ at once.",
    cls=Examples,
    example="pipeline rebalance --lam 0.01:0.5:log:12",
    lists={"Methods": METHODS},
)
@click.argument("store", required=False, shell_complete=stores)
@click.option(
    "--config",
    shell_complete=configs,
    help="Take the rebalance settings from this configuration, not from the store's.",
)
@click.option(
    "--lam", metavar="LAM", help="0.05 | 0.01,0.05,0.1 | 0.01:0.5:log:32 | auto: λ, the scale of the target P."
)
@click.option(
    "--method",
    multiple=True,
    metavar="NAME|FILE.py",
    shell_complete=methods,
    help="One of the methods below, all, or a Python file that defines one [default: iwb]; repeatable.",
)
@click.option("--tune", is_flag=True, default=None, help="Tune ce, cb and iwb as the other methods always are.")
@click.option(
    "--trials", type=click.IntRange(1), help="Settings tried for each trained method that is tuned [default: 12]."
)
@click.option(
    "--sampling",
    type=click.Choice(["instance", "class-balanced"]),
    help="How batches are drawn [default: the method's].",
)
@click.option(
    "--force-double-balancing", is_flag=True, default=None, help="Allow two remedies for class sizes in one method."
)
@click.option(
    "--loss",
    type=click.Choice(["cb", "ce", "la"]),
    help="Beside the KL term: class-balanced loss, cross-entropy, or logit-adjusted loss (balanced softmax).",
)
@click.option(
    "--formulation",
    type=click.Choice(["mixed", "paper", "code"]),
    help="As the paper writes it, as its released code does it, or the former's norm term with the latter's loss [default].",
)
@click.option(
    "--cb", type=click.Choice(["softmax", "bce"]), help="Form of the class-balanced loss [default: the formulation's]."
)
@click.option("--beta", type=click.FloatRange(0, 1, max_open=True), help="β of the class-balanced loss.")
@click.option("--hardness", type=click.Choice(["vector", "scalar", "none"]), help="Sample-wise part of the target.")
@click.option(
    "--log-base", type=click.Choice(["2", "e"]), help="Of NC, the class-wise part [default: the formulation's]."
)
@click.option("--number/--no-number", default=None, help="Class-wise part of the target.")
@click.option("--divergence", type=click.Choice(["kl", "mse"]), help="How far the norms are from the target.")
@click.option(
    "--direction",
    type=click.Choice(["norms-to-target", "target-to-norms"]),
    help="KL(norms ‖ target) or KL(target ‖ norms) [default: the formulation's].",
)
@click.option(
    "--detach-target/--no-detach-target",
    default=None,
    help="Whether the target is held fixed in the gradient [default: the formulation's].",
)
@click.option("--kl-weight", metavar="W|batch", help="Weight of the KL term [default: the formulation's].")
@click.option(
    "--views", type=click.Choice(["augmented", "clean"]), help="Train on the augmented views or on the clean one."
)
@click.option("--seeds", metavar="0,1,2", help="Batch orders.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the features [default: the configuration's; 10].")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate [default: the configuration's].")
@click.option("--batch-size", type=click.IntRange(1), help="Features a step [default: the configuration's].")
@click.option(
    "--select-on", type=click.Choice(["val", "kfold"]), help="What the choice of λ is made on; never the test split."
)
@click.option(
    "--out",
    type=PATH,
    help="Where results go [default: rebalance/ beside features.zarr, NAME-rebalance/ beside another NAME.zarr].",
)
@click.option(
    "--spread",
    type=click.Choice(["rows", "heads"]),
    help="With several processes: share each batch, or the heads [default: rows].",
)
@dry_run
@workers
@settings
@shared
def rebalance_command(store, config, out, dry_run, nproc, device, sets, as_json, debug, **options):
    """Fit the classifier on the cached features: class-balanced loss + KL(weight norms ‖ target P), many λ in one pass.

    STORE is a feature store, a run's folder, or the name of a configuration whose run has one. Where methods compete, every
    trained one gets the same number of trials, chosen on validation; only then is the test split looked at. Where --config
    lists variants, as ablations/table3 does, each is fitted and chosen for itself, and one table and figure compare them.
    """
    if options["seeds"] is not None:
        options["seeds"] = list(whole_numbers("--seeds", options["seeds"]) or ())
    options["method"] = list(options["method"]) or None
    talk, path, tree = store_and_tree(store, config, sets=sets)
    from pipeline.config import apply_setting, find_config, make_rebalance_config
    from pipeline.paths import results_folder

    for key, value in options.items():
        if value is not None:
            tree.setdefault("rebalance", {})[key] = number(value) if key == "kl_weight" else value
    for setting in sets:
        apply_setting(tree, setting)
    chosen = make_rebalance_config(tree, "rebalance settings")
    if chosen.variants and (fixed := [f"--{key}" for key in ("method", "loss", "formulation") if options[key]]):
        raise ConfigError(
            f"{', '.join(fixed)}: the variants of --config {config} say this themselves, and their names would be wrong; "
            "leave it away, or write variants of your own"
        )
    variants = f"{len(chosen.variants)} variants; " if chosen.variants else ""
    own = results_folder(path, "ablations") / tree.get("name", "variants") if variants else results_folder(path)
    if dry_run:
        from pipeline.plan.stage2 import plan_rebalance

        show(plan_rebalance(path, chosen, out=out or own, device=device, world=processes(nproc, device)), as_json)
        return
    if relaunched(nproc):
        return
    from pipeline.rebalance import ablate, rebalance

    taken = config or (find_config(None) if store is None else "the store's")
    talk.say(f"store: {path}; settings: {taken}; {variants}results: {out or own}")
    fit = ablate if variants else rebalance
    show(fit(path, chosen, out=out or own, device=device, report=talk.say), as_json)


@click.command(
    "evaluate",
    short_help="The table of given heads on a split; nothing is fitted.",
    cls=Examples,
    example="pipeline evaluate runs/digits-lt --split val",
)
@click.argument("store", required=False, shell_complete=stores)
@click.option(
    "--heads",
    type=PATH,
    help="heads.safetensors of a rebalance [default: rebalance/heads.safetensors beside the store].",
)
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True, help="Of which samples."
)
@shared
def evaluate_command(store, heads, split, as_json, debug):
    """The table of given heads on one split; nothing is fitted and nothing is chosen."""
    talk, path, _ = store_and_tree(store, None)
    from pipeline.paths import results_folder
    from pipeline.rebalance import evaluate

    heads = heads or results_folder(path) / "heads.safetensors"
    talk.say(f"store: {path}; heads: {heads}")
    show(evaluate(path, heads, split=split), as_json)


@click.command(
    "verify",
    short_help="Check every byte of a feature store.",
    cls=Examples,
    example="pipeline verify runs/digits-lt/features.zarr",
)
@click.argument("store", required=False, shell_complete=stores)
@shared
def verify_command(store, as_json, debug):
    """Read a whole feature store against its checksums; exit code 3 and the damaged rows where something is wrong."""
    talk, path, _ = store_and_tree(store, None, settings_from_store=False)
    from pipeline.info import verify

    talk.say(f"store: {path}")
    show(verify(path), as_json)


COMMANDS = (rebalance_command, evaluate_command, verify_command)
