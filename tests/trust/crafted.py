"""Artefacts changed by hand, with every checksum made right again: what a stranger could send."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cache.chunks import checksum
from cache.layout import canonical

KEPT = Path(__file__).parents[1] / "golden" / "format-0.1"
NONSENSE = (None, "", -1, 10**12, 1e308, [], {}, "x", True, [[]], {"a": 1}, "../../escape")


def fields(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value of a JSON tree; of a list the first two entries."""
    yield path
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from fields(value, (*path, key))


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    """Return a copy of a JSON tree with another value in one place."""
    if not path:
        return value
    copy = place = json.loads(json.dumps(tree))
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def signed(document: Any) -> Any:
    """Return the root document of a store with the digest and checksum that its attributes ask for."""
    attributes = document["attributes"]
    if not isinstance(attributes, dict):
        return document
    attributes.pop("check", None)
    names = ("format_version", "layout", "class_names", "counts", "fingerprint", "manifest")
    content = {name: attributes.get(name) for name in names}
    content |= {"skipped": attributes["skipped"]} if attributes.get("skipped") else {}
    attributes["digest"] = hashlib.sha256(canonical(content)).hexdigest()
    attributes["check"] = checksum(canonical(attributes))
    return document


def crafted_store(folder: Path, path: tuple, value: Any) -> Path:
    """Return a copy of a sealed store in which one attribute is replaced."""
    store = shutil.copytree(KEPT / "one/features.zarr", folder / "features.zarr")
    document = json.loads((store / "zarr.json").read_text())
    (store / "zarr.json").write_text(json.dumps(signed(replaced(document, ("attributes", *path), value))))
    return store


def crafted_file(source: Path, target: Path, path: tuple, value: Any, sign: Callable[[Any], Any] = lambda d: d) -> Path:
    """Return the target, a copy of a JSON file in which one value is replaced."""
    target.write_text(json.dumps(sign(replaced(json.loads(source.read_text()), path, value))))
    return target
