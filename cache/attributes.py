"""The attributes of a store, checked field by field: whoever made a store, nothing in it is believed before."""

import math
import re
from collections.abc import Iterable
from typing import Any

from cache.layout import STORED, Layout

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # of a split: a folder in the store, never one elsewhere
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
MOST_ROWS, MOST_VIEWS, MOST_CHUNKS = 2**40, 10_000, 2**24
CLASSIFIER = "classifier"
STATES = ("open", "sealed", "removing")


class Wrong(ValueError):
    """A field of the attributes is not what it has to be."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")


def checked_layout(attributes: dict[str, Any]) -> Layout:
    """Return the layout that attributes describe; Wrong names the field that describes none."""
    tree = _dictionary(attributes.get("layout"), "layout")
    splits: list[tuple[str, tuple[int, int]]] = []
    for number, entry in enumerate(_list(tree.get("splits"), "layout.splits")):
        field = f"layout.splits.{number}"
        name, views, rows = _list(entry, field, 3)
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == CLASSIFIER or name in dict(splits):
            raise Wrong(field, f"{name!r} is no name of a split")
        whole(views, f"{field} (views)", 1, MOST_VIEWS)
        splits.append((name, (views, whole(rows, f"{field} (rows)", 0, MOST_ROWS))))
    if "train" not in dict(splits):
        raise Wrong("layout.splits", "no training split")
    sizes = {key: whole(tree.get(key), f"layout.{key}", 1, 2**31 - 1) for key in ("width", "classes", "rows_per_chunk")}
    dtype = tree.get("dtype")
    if not isinstance(dtype, str) or dtype not in STORED or dtype == "int64":
        raise Wrong("layout.dtype", f"{dtype!r} is no type of features")
    layout = Layout(tuple((name, *numbers) for name, numbers in splits), dtype=str(dtype), **sizes)
    chunks = sum(views * -(-rows // layout.features(name).chunk[1]) for name, views, rows in layout.splits)
    if chunks > MOST_CHUNKS:
        raise Wrong("layout", f"{chunks:,} chunks of features, no store has more than {MOST_CHUNKS:,}")
    return layout


def check_attributes(attributes: dict[str, Any], layout: Layout) -> None:
    """Raise Wrong where the other attributes do not belong to a store of a layout."""
    names = _list(attributes.get("class_names"), "class_names", layout.classes)
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name or CONTROL.search(name):
            raise Wrong(f"class_names.{number}", f"{name!r} is no name")
    counts = _list(attributes.get("counts"), "counts", layout.classes)
    total = sum(whole(count, f"counts.{number}", 0, MOST_ROWS) for number, count in enumerate(counts))
    if total != layout.rows("train"):
        raise Wrong("counts", f"{total:,} in all, the training split has {layout.rows('train'):,} rows")
    for field in ("fingerprint", "provenance"):
        _dictionary(attributes.get(field), field)
    sealed = attributes.get("state") == "sealed"
    if attributes.get("state") not in STATES:
        raise Wrong("state", f"{attributes.get('state')!r} is none of {', '.join(STATES)}")
    arrays = {array.name: array for array in layout.arrays}
    manifest = _dictionary(attributes.get("manifest"), "manifest")
    _known(manifest, arrays, "manifest")
    for name, chunks in manifest.items():
        keys = _dictionary(chunks, f"manifest.{name}")
        chunk_count = math.prod(
            -(-size // step) for size, step in zip(arrays[name].shape, arrays[name].chunk, strict=True)
        )
        if len(keys) > chunk_count or (sealed and len(keys) != chunk_count):
            raise Wrong(f"manifest.{name}", f"{len(keys):,} chunks instead of {chunk_count:,}")
        _known(keys, set(arrays[name].keys), f"manifest.{name}")
        for key, crc in keys.items():
            whole(crc, f"manifest.{name}.{key}", 0, 2**32 - 1)
    metadata = _dictionary(attributes.get("metadata"), "metadata")
    _known(metadata, {*layout.groups, *arrays}, "metadata")
    if sealed and (missing := {*arrays} - manifest.keys() | {*layout.groups, *arrays} - metadata.keys()):
        raise Wrong("metadata", f"nothing of {min(missing)}")
    for name, crc in metadata.items():
        whole(crc, f"metadata.{name}", 0, 2**32 - 1)
    skipped = _dictionary(attributes.get("skipped", {}), "skipped")
    _known(skipped, {name for name, _, _ in layout.splits}, "skipped")
    for name, rows in skipped.items():
        for number, row in enumerate(_list(rows, f"skipped.{name}")):
            whole(row, f"skipped.{name}.{number}", 0, layout.rows(name) - 1)


def whole(value: Any, field: str, least: int, most: int) -> int:
    """Return a whole number between two bounds; Wrong where it is none."""
    if type(value) is not int or not least <= value <= most:
        raise Wrong(field, f"{str(value)[:40]} is no whole number from {least} to {most}")
    return value


def _dictionary(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(field, f"{str(value)[:40]} is no dictionary")
    return value


def _list(value: Any, field: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        size = f"{len(value):,} entries" if isinstance(value, list) else str(value)[:40]
        raise Wrong(field, f"{size}, expected a list" + ("" if length is None else f" of {length:,}"))
    return value


def _known(names: Iterable[str], known: Iterable[str], field: str) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise Wrong(field, f"{unknown[0]!r} is not in this store")
