"""The places of a run's files, and how files record paths."""

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cache import Cache

PATHS = ("store", "out")  # of a results document
STAGE1_HEAD = "stage1_head.safetensors"  # of an exported model: the head before rebalancing
_WHOLE = (  # folders that hold one artefact and nothing else: files that all are there, names of the folder, kind
    (("zarr.json",), (), "feature store"),
    (("config.json", "model.[ops]*"), (), "exported model"),
    (("last.pt",), ("backbone",), "training"),
    (("results.json", "heads.safetensors"), ("rebalance",), "results"),
)
_OF_A_RUN = ("backbone/last.pt", "features.zarr", "rebalance/results.json", "seed-*/backbone", "seed-*/features.zarr")


def near(path: Path) -> str:
    """`; did you mean …?` with the name beside a path that is most like it, or nothing."""
    matches = get_close_matches(path.name, [entry.name for entry in path.parent.glob("*")], 1)
    return f"; did you mean {path.with_name(matches[0])}?" if matches else ""


def is_run(folder: Path) -> bool:
    """Return True where a folder has a training, features or results of its own, or of several backbones."""
    return any(next(folder.glob(part), None) is not None for part in _OF_A_RUN)


def enclosing_artefact(path: Path | str) -> str:
    """Return the kind and the folder of the artefact around a path, such as `the feature store a.zarr`, or nothing."""
    if "://" in str(path):
        return ""
    for folder in Path(os.path.abspath(path)).parents:
        for files, names, kind in _WHOLE:
            if (not names or folder.name in names) and all(next(folder.glob(file), None) for file in files):
                return f"the {kind} {folder}"
    return ""


def holds_runs(folder: Path) -> str:
    """Return a sentence that names the runs in a folder that is none itself, or nothing."""
    runs = [] if is_run(folder) else sorted(str(path) for path in folder.glob("*") if is_run(path))
    if not runs:
        return ""
    examples = f" ({len(runs)} in all: {', '.join(Path(run).name for run in runs[:8])}" if runs[1:] else ""
    examples += (", …)" if runs[8:] else ")") if examples else ""
    return f"{folder}: holds runs, is none; name one, such as {runs[0]}{examples}"


def results_folder(store: Cache | Path | str, kind: str = "rebalance") -> Path:
    """Where results of a store go: rebalance/ beside a run's features.zarr, NAME-rebalance/ beside another NAME.zarr.

    Those of a store in a bucket go to NAME-rebalance/ in the working folder; NAME of …/cifar/features.zarr is cifar.
    """
    place = store.path if isinstance(store, Cache) else store
    if "://" in str(place):
        *_, parent, name = str(place).split("/")
        return Path(f"{parent if name == 'features.zarr' else Path(name).stem}-{kind}")
    place = Path(place)
    return place.parent / (kind if place.name == "features.zarr" else f"{place.stem}-{kind}")


def recorded_path(path: Path | str, folder: Path) -> str:
    """Return the text by which a file in `folder` records a path: relative to `folder`, so that both can move together.

    A URL stays as it is.
    """
    text = os.fspath(path)
    if "://" in text:
        return text
    return os.path.relpath(os.path.realpath(text), os.path.realpath(folder))


def read_path(text: str, folder: Path) -> str:
    """Return the path that a file in `folder` records as `text`, so that it leads there from the working directory.

    Files of format 0.1 record a path relative to the directory in which the command was typed. Where nothing lies at the
    path relative to `folder`, the working directory and the folders above `folder` are tried in turn.
    """
    if "://" in text or os.path.isabs(text):
        return text
    candidates = [base / text for base in (folder, Path(), *folder.resolve().parents)]
    path = os.path.realpath(next((path for path in candidates if path.exists()), candidates[0]))
    from_here = os.path.relpath(path)
    return path if from_here.startswith(os.pardir) else from_here


def recorded_document(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return results as a file in `folder` records them: `store` (one, or one a backbone) and `out` by `recorded_path`."""
    return document | {name: _each(text, recorded_path, folder) for name, text in document.items() if name in PATHS}


def read_document(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return results that a file in `folder` records, with paths that lead there from the working directory."""
    return document | {name: _each(text, read_path, folder) for name, text in document.items() if name in PATHS}


def names_only(tree: Any) -> Any:
    """Return a JSON tree with the last names in place of absolute paths, as what is shared with others holds it."""
    if isinstance(tree, dict):
        return {key: names_only(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [names_only(value) for value in tree]
    if not isinstance(tree, str) or "://" in tree:
        return tree
    return re.sub(r"^([\w.-]*[=:])?[/~].*?([^/]*)/*$", r"\1\2", tree, flags=re.S)


def _each(text: Any, change: Callable[[str, Path], str], folder: Path) -> Any:
    if isinstance(text, list):
        return [_each(item, change, folder) for item in text]
    return change(text, folder) if isinstance(text, str) else text
