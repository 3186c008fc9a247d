"""Configurations found, read from YAML, overlaid with KEY=VALUE settings and validated."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import yaml
from pydantic import ValidationError

from pipeline.config.experiment import Config, RebalanceOnly
from pipeline.config.plain_yaml import plain_yaml
from pipeline.config.rebalance import RebalanceConfig
from pipeline.config.section import explanations, nearest
from pipeline.errors import ConfigError
from pipeline.shipped import shipped_configs

DEFAULT = "digits-lt"


def find_config(name: str | None) -> Path:
    """Return the file of a CONFIG argument: a path, a shipped name, else ./pipeline.yaml, else the embedded default.

    Raises: ConfigError: neither a file nor a shipped configuration has this name.
    """
    shipped = shipped_configs()
    if name is None:
        local = Path("pipeline.yaml")
        return local if local.is_file() else shipped[DEFAULT]
    path = Path(name)
    if path.is_file():
        return path
    stem = str(path.with_suffix("")).removeprefix("configs/") if path.suffix in (".yaml", ".yml") else name
    if stem in shipped and not path.is_absolute():
        return shipped[stem]
    if (path / "pipeline.yaml").is_file():
        return path / "pipeline.yaml"
    if path.is_dir():
        raise ConfigError(f"no configuration {name}: it is a folder; `pipeline init {name}` writes one for its images")
    files = [str(file) for file in path.parent.glob("*") if file.suffix in (".yaml", ".yml")]
    raise ConfigError(
        f"no configuration {name}: neither a file nor a shipped name{nearest(name, [*files, *shipped])}; "
        f"shipped: {', '.join(sorted(shipped))}"
    )


def is_rebalance_only(tree: dict) -> bool:
    """Return True where a tree has settings of stage 2 alone, which take the place of a store's own settings."""
    return "rebalance" in tree and tree.keys() <= RebalanceOnly.model_fields.keys()


def read_tree(path: Path) -> dict:
    """Return the plain tree of a YAML file; raise ConfigError where it holds none."""
    try:
        tree = plain_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a configuration, which is a text in YAML; give such a file, or a shipped name such as {DEFAULT}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys such as `name:` and `data:`, got {type(tree).__name__}")
    return tree


def load_config(path: Path | str | None = None, settings: Iterable[str] = ()) -> Config:
    """Return the configuration of a YAML file; `a.b=c` settings replace its values.

    Arguments:
        path: a file, or text or None as `find_config` takes them. Data paths in it are relative to the file.
        settings: texts such as `backbone.epochs=10`, as after --set.
    Raises: ConfigError: names the file, the key that is wrong and the nearest key that exists.
    """
    path = path if isinstance(path, Path) else find_config(path)
    tree = read_tree(path)
    tree.setdefault("name", path.stem)
    if is_rebalance_only(tree):
        raise ConfigError(
            f"{path}: data is missing: these are settings of stage 2 alone, for `pipeline rebalance STORE --config …`"
        )
    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("path", "train_list", "val_list", "test_list", "class_names"):
            value = data.get(key)
            if isinstance(value, str) and not Path(value).expanduser().is_absolute():
                data[key] = str(path.parent / value) if path not in shipped_configs().values() else value
    settings = tuple(settings)
    for setting in settings:
        apply_setting(tree, setting)
    return make_config(tree, " ".join([str(path), *(f"--set {s}" for s in settings)]))


def make_config(tree: dict, origin: str) -> Config:
    """Return the typed configuration of a plain tree.

    Arguments:
        origin: where the tree comes from, for errors.
    Raises: ConfigError: names origin and every wrong key.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explanations(error, origin, Config))) from error


def make_rebalance_config(tree: dict, origin: str) -> RebalanceConfig:
    """Return the settings of stage 2 in a tree; other sections may be missing. Raises ConfigError as make_config does."""
    if "data" in tree:
        return make_config(tree, origin).rebalance
    try:
        return RebalanceOnly.model_validate(tree).rebalance
    except ValidationError as error:
        raise ConfigError("\n".join(explanations(error, origin, RebalanceOnly))) from error


def apply_setting(tree: dict, setting: str) -> None:
    """Set `a.b=c` in a tree of dictionaries; the value is read as YAML, so 1e-3, true, null and [1, 2] are no text."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting}: expected KEY=VALUE, for example --set backbone.epochs=10")
    try:
        value = plain_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not YAML") from error
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 takes 1e-3 for text
    *parents, last = key.strip().split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {setting}: {parent} is not a section")
    tree[last] = value
