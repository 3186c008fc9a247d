"""The configuration, store and run that a command works with; CONFIG and STORE may be left out."""

import os
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import STORE
from pipeline.errors import ConfigError, DataError
from pipeline.hosts import TOLD, in_worker

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.console import Talk

PROPOSED = "pipeline.yaml"  # the configuration of a command without CONFIG


def take_config(name: str | None, sets: Any, *, announce: bool = True) -> "tuple[Talk, Config]":
    """Return the console and the configuration of a command; print its name and file where `announce` is true."""
    from pipeline.config import find_config, load_config
    from pipeline.console import Talk

    talk, announce = Talk(), announce and not (in_worker() and TOLD in os.environ)  # its launcher has printed the lines
    if name is None and not Path(PROPOSED).is_file():
        from pipeline.proposal import refuse_ignored_images

        refuse_ignored_images()
    if name is not None and (folder := images_folder(name)):
        from pipeline.proposal import propose

        proposal = propose(folder)
        config = proposal.config(sets)
        if announce:
            talk.say(
                f"{proposal}\nThese settings were chosen from the images; to change them: pipeline init {quote(name)}"
            )
        return talk, config
    path = find_config(name)
    config = load_config(path, sets)
    if announce:
        talk.say(f"configuration: {config.name} ({path})")
    return talk, config


def images_folder(name: str) -> Path | None:
    """Return the folder of images that stands in the place of a CONFIG, None for a configuration.

    A folder with a pipeline.yaml of its own means that file.
    """
    path = Path(name)
    return path if path.is_dir() and not (path / PROPOSED).is_file() else None


def run_of_images(name: str) -> Path | None:
    """Return the run's folder of `pipeline run FOLDER`, None where a path is no folder of images."""
    path = Path(name)
    if not path.is_dir():
        return None
    from pipeline.paths import is_run

    if is_run(path):
        return None
    from pipeline.proposal import experiment_name, holds_images

    return Path("runs") / experiment_name(path) if holds_images(path) else None


def backbones_of(run: Path) -> list[Path]:
    """Return the seed-N folders of a run of several backbones, in the order of N; a run of one has none."""
    folders = [file.parents[1] for file in run.glob("seed-*/backbone/last.pt")]
    return sorted(folders, key=lambda folder: (len(folder.name), folder.name))


def run_folder(run: str | None) -> Path:
    """Return a run's folder from a path, the name of a configuration, or None (the default configuration's)."""
    from pipeline.config import find_config, load_config

    if run is not None and is_store(run):
        from pipeline.paths import results_folder

        folder = Path(run).parent if "://" not in run and Path(run).name == "features.zarr" else results_folder(run)
        raise DataError(f"{run}: a feature store, not a run; give its run, such as {folder}")
    if run is not None and (Path(run) / "last.pt").is_file():
        raise DataError(f"{run}: the training of a run; give the run itself, such as {Path(run).parent}")
    if run is not None and Path(run).exists():
        return run_of_images(run) or Path(run)
    try:
        return load_config(find_config(run)).run_dir
    except ConfigError:
        return Path(run or "")


def is_store(path: str) -> bool:
    """Return True where a path or URL is a feature store itself, not a run that has one."""
    return "://" in path or (Path(path) / "zarr.json").is_file()


def store_and_tree(
    store: str | None, config: str | None, *, sets: Any = (), settings_from_store: bool = True
) -> "tuple[Talk, Path | str, dict]":
    """Return the console, the store and the settings' tree of a command on features.

    The settings are those of --config, else of the store, else of the default configuration. Where --config has a rebalance
    section alone, its values replace the store's.
    """
    from pipeline.config import find_config, is_rebalance_only, load_config, read_tree
    from pipeline.console import Talk
    from pipeline.info.not_a_store import not_a_store
    from pipeline.paths import near
    from pipeline.store_settings import store_tree

    talk, replacements = Talk(), {}
    path: Path | str
    if config and is_rebalance_only(tree := read_tree(find_config(config))):
        replacements, config = {"name": find_config(config).stem} | tree, None
    named = load_config(find_config(config), sets) if config or store is None else None
    if store is None:
        assert named is not None
        path = named.run_dir / "features.zarr"
    elif "://" in store:
        path = STORE.convert(store, None, None)
    elif run := run_of_images(store):
        path = run / "features.zarr"
    elif Path(store).exists():
        path = Path(store) / "features.zarr" if (Path(store) / "features.zarr").exists() else Path(store)
    else:
        try:
            path = load_config(find_config(store)).run_dir / "features.zarr"
        except ConfigError:
            path = Path(store)
    if isinstance(path, Path) and not (path / "zarr.json").exists():
        run = path.parent if path.name == "features.zarr" else path
        if several := sorted(str(path.parent) for path in run.glob("seed-*/features.zarr")):
            raise DataError(f"{run}: a run of several backbones; name one of them, such as {several[0]}")
    if isinstance(path, Path) and not path.exists():
        raise DataError(f"{path}: no such feature store{near(path)}; make one with `pipeline dump-features`")
    if isinstance(path, Path) and not (path / "zarr.json").exists() and (kind := not_a_store(path)):
        raise DataError(f"{path}: not a feature store{kind}")
    if named is not None and not replacements:
        section = named.rebalance.model_dump(
            mode="json", exclude_unset=True
        )  # defaults may give way to the store's views
        return talk, path, named.model_dump(mode="json") | {"rebalance": section}
    if not settings_from_store:
        return talk, path, {}
    tree = store_tree(path)
    return talk, path, tree | replacements | {"rebalance": tree["rebalance"] | replacements.get("rebalance", {})}
