"""The command import-features: features of other programs as a feature store."""

from pathlib import Path
from typing import Any

import click

from pipeline.cli.exit_codes import show
from pipeline.cli.options import PATH, STORE, Command, dry_run, option, shared
from pipeline.errors import ConfigError

SPLITS = ("train", "val", "test")


@click.command(
    "import-features",
    cls=Command,
    example="pipeline import-features features.npz --out runs/imported/features.zarr",
)
@click.argument("file", required=False, type=PATH)
@option("--train", type=PATH, nargs=2, metavar="X.npy Y.npy", help="Training features and labels, instead of FILE.")
@option("--val", type=PATH, nargs=2, metavar="X.npy Y.npy", help="Validation features and labels.")
@option("--test", type=PATH, nargs=2, metavar="X.npy Y.npy", help="Test features and labels.")
@option("--weight", type=PATH, metavar="W.npy", help="Weight (C, D) of a classifier to start from.")
@option("--bias", type=PATH, metavar="B.npy", help="Its bias (C,).")
@option("--class-names", type=PATH, metavar="FILE", help="Class names, one a line.")
@option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True,
        help="Precision of the stored features.")  # fmt: skip
@option("--out", type=STORE, metavar="FOLDER|URL", help="Store to write.", shown_default="runs/FILE-NAME/features.zarr")
@option("--overwrite", is_flag=True, help="Replace a store of other features.")
@dry_run
@shared
def import_command(file, train, val, test, weight, bias, class_names, dtype, out, overwrite, dry_run, as_json, debug):
    """Make a sealed store of features, labels and a classifier that another program computed.

    FILE is an .npz with train_features (N, D), train_labels (N,) and optionally val_*, test_*, weight (C, D), bias (C,) and
    class_names. Without weight a linear probe is fitted, the head that stage 2 starts from.
    """
    if (file is None) == (train is None):
        raise ConfigError("give either FILE.npz or --train X.npy Y.npy")
    from pipeline.console import Talk
    from pipeline.data.dataset import listed_names
    from pipeline.import_features import prepare_import, read_array, read_arrays, store_from_arrays

    arrays: dict[str, Any] = {} if file is None else read_arrays(file)
    for split, pair in zip(SPLITS, (train, val, test), strict=True):
        if pair is not None:
            arrays |= {
                f"{split}_{kind}": read_array(path) for kind, path in zip(("features", "labels"), pair, strict=True)
            }
    arrays |= {name: read_array(path) for name, path in (("weight", weight), ("bias", bias)) if path is not None}
    names = arrays.pop("class_names", None)
    source = file or train[0]
    out = out or Path("runs") / source.stem / "features.zarr"
    names = names if class_names is None else listed_names(class_names)
    work = prepare_import if dry_run else store_from_arrays
    Talk().say(f"features: {source}; store: {out}")
    show(work(out, dtype=dtype, class_names=names, origin=str(source), overwrite=overwrite, **arrays), as_json)


COMMANDS = (import_command,)
