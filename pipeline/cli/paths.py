"""Which configuration, store and run a command means: CONFIG and STORE may be left out."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import STORE
from pipeline.errors import ConfigError, DataError
from pipeline.hosts import TOLD, in_worker

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.console import Talk


def take_config(name: str | None, sets: Any, *, told: bool = True) -> "tuple[Talk, Config]":
    """The console and the configuration a command works with; says which it took."""
    from pipeline.config import find_config, load_config
    from pipeline.console import Talk

    talk, path = Talk(), find_config(name)
    chosen = load_config(path, sets)
    if told and not (in_worker() and TOLD in os.environ):  # its launcher has said so
        talk.say(f"configuration: {chosen.name} ({path})")
    return talk, chosen


def backbones_of(run: Path) -> list[Path]:
    """The seed-N folders of a run of several backbones, in the order of N; none of any other."""
    found = [file.parents[1] for file in run.glob("seed-*/backbone/last.pt")]
    return sorted(found, key=lambda place: (len(place.name), place.name))


def run_folder(run: str | None) -> Path:
    """A run's folder from a path, the name of a configuration, or nothing (the default configuration's)."""
    from pipeline.config import find_config, load_config

    if run is not None and is_store(run):
        from pipeline.paths import results_folder

        of_run = Path(run).parent if "://" not in run and Path(run).name == "features.zarr" else results_folder(run)
        raise DataError(f"{run}: a feature store, not a run; give the run it is of, such as {of_run}")
    if run is not None and (Path(run) / "last.pt").is_file():
        raise DataError(f"{run}: the training of a run; give the run itself, such as {Path(run).parent}")
    if run is not None and Path(run).exists():
        return Path(run)
    try:
        return load_config(find_config(run)).run_dir
    except ConfigError:
        return Path(run or "")


def is_store(place: str) -> bool:
    """Whether a path or URL is that of a feature store itself, not of a run that has one."""
    return "://" in place or (Path(place) / "zarr.json").is_file()


def store_and_tree(
    store: str | None, config: str | None, *, sets: Any = (), settings_from_store: bool = True
) -> "tuple[Talk, Path | str, dict]":
    """(console, store, configuration tree) of a rebalance: settings of --config, else of the store, else of the default.

    Where --config has a rebalance section alone, that is laid over the store's.
    """
    from pipeline.config import find_config, is_rebalance_only, load_config, read_tree
    from pipeline.console import Talk
    from pipeline.paths import near, store_tree, what_else

    talk, over = Talk(), {}
    path: Path | str
    if config and is_rebalance_only(tree := read_tree(find_config(config))):
        over, config = {"name": find_config(config).stem} | tree, None
    named = load_config(find_config(config), sets) if config or store is None else None
    if store is None:
        assert named is not None
        path = named.run_dir / "features.zarr"
    elif "://" in store:
        path = STORE.convert(store, None, None)
    elif Path(store).exists():
        path = Path(store) / "features.zarr" if (Path(store) / "features.zarr").exists() else Path(store)
    else:
        try:
            path = load_config(find_config(store)).run_dir / "features.zarr"
        except ConfigError:
            path = Path(store)
    if isinstance(path, Path) and not (path / "zarr.json").exists():
        run = path.parent if path.name == "features.zarr" else path
        if several := sorted(str(found.parent) for found in run.glob("seed-*/features.zarr")):
            raise DataError(f"{run}: a run of several backbones; name one of them, such as {several[0]}")
    if isinstance(path, Path) and not path.exists():
        raise DataError(f"{path}: no such feature store{near(path)}; make one with `pipeline dump-features`")
    if isinstance(path, Path) and not (path / "zarr.json").exists() and (other := what_else(path)):
        raise DataError(f"{path}: not a feature store{other}")
    if named is not None and not over:
        own = {"rebalance": named.rebalance.model_dump(mode="json", exclude_unset=True)}  # a default is not insisted on
        return talk, path, named.model_dump(mode="json") | own
    if not settings_from_store:
        return talk, path, {}
    own = store_tree(path)
    return talk, path, own | over | {"rebalance": own["rebalance"] | over.get("rebalance", {})}
