"""The store's root zarr.json: its state, what it is made of, and the checksums that decide whether it is whole."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from cache.attributes import Wrong, check_attributes, checked_layout
from cache.chunks import checksum
from cache.layout import FORMAT, CacheError, Layout, canonical
from cache.place import Place

Manifest = dict[str, dict[str, int]]

# what zarr puts into a group's zarr.json; not every version writes the last
FIELDS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}


@dataclass(frozen=True)
class Root:
    """The root attributes of a store; manifest, metadata and skipped are complete exactly when it is sealed.

    Arguments:
        manifest: array name → chunk key → crc32c of the chunk.
        metadata: name of a group or array → crc32c of its zarr.json.
        skipped: split → rows without features, which the fingerprint does not cover.
        tag: version of the object that it was read from or written to; None in a folder.
    """

    layout: Layout
    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    fingerprint: dict[str, Any]
    provenance: dict[str, Any]
    state: str = "open"
    manifest: Manifest = field(default_factory=dict)
    metadata: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    tag: Any = field(default=None, compare=False)

    @property
    def sealed(self) -> bool:
        return self.state == "sealed"

    @property
    def digest(self) -> str:
        """sha256 over all content: equal features, labels, classes and fingerprint have an equal one, whenever made.

        The metadata files are left out: what they say follows from the layout, how they are written from zarr's version.
        """
        return hashlib.sha256(canonical({**self._content(), "manifest": self.manifest})).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT,
            "layout": self.layout.to_json(),
            "class_names": list(self.class_names),
            "counts": list(self.counts),
            "fingerprint": self.fingerprint,
            **({"skipped": self.skipped} if self.skipped else {}),
        }

    def attributes(self) -> dict[str, Any]:
        digest = {"digest": self.digest} if self.sealed else {}
        document = {**self._content(), "state": self.state, "provenance": self.provenance, **digest}
        document |= {"manifest": self.manifest, "metadata": self.metadata}
        return {**document, "check": checksum(canonical(document))}


def read_root(place: Place) -> Root:
    """The root of the store at a place, its own checksum verified.

    Raises CacheError for a missing store, something else than a store, another format version, or damage.
    """
    again = f"dump again: pipeline dump-features … --out {place} --overwrite"
    damaged = f"{place}: the metadata in zarr.json is damaged; {again} (nothing else can vouch for the features)"
    try:
        content, tag = place.read("zarr.json")
        document = json.loads(content)
        attributes = dict(document["attributes"])
    except (FileNotFoundError, NotADirectoryError):
        if not place.exists():
            make = f"make it: pipeline dump-features … --out {place}"
            raise CacheError(f"{place}: no such feature store; {make}") from None
        raise CacheError(f"{place}: not a feature store (it has no zarr.json)") from None
    except OSError as error:
        raise CacheError(f"{place}/zarr.json: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheError(damaged) from error
    if "format_version" not in attributes and "check" not in attributes:
        raise CacheError(f"{place}: not a feature store: a zarr {document.get('node_type')} without format_version")
    check = attributes.pop("check", None)
    try:
        is_group = (document["zarr_format"], document["node_type"]) == (3, "group")
        intact = is_group and document.keys() <= FIELDS and check == checksum(canonical(attributes))
    except (ValueError, KeyError) as error:
        raise CacheError(damaged) from error
    if not intact:
        raise CacheError(damaged)
    version = attributes.get("format_version")
    if version != FORMAT:
        raise CacheError(f"{place}: format_version is {version}, this program reads {FORMAT}; {again}")
    try:
        layout = checked_layout(attributes)
        check_attributes(attributes, layout)
    except Wrong as error:
        raise CacheError(f"{place}: zarr.json: {error}; {again}") from error
    fields = {key: attributes[key] for key in ("fingerprint", "provenance", "state", "manifest", "metadata")}
    names, counts = tuple(attributes["class_names"]), tuple(attributes["counts"])
    root = Root(layout, names, counts, **fields, skipped=attributes.get("skipped", {}), tag=tag)
    if root.sealed and root.digest != attributes.get("digest"):
        raise CacheError(damaged)
    return root


def reopened(root: Root, damaged: list[tuple[str, str]]) -> Root:
    """An open root that still vouches for every chunk but the damaged (array, key) ones, and for no metadata file."""
    open_chunks = set(damaged)
    manifest = {
        array: {key: crc for key, crc in chunks.items() if (array, key) not in open_chunks}
        for array, chunks in root.manifest.items()
    }
    return replace(root, state="open", manifest=manifest, metadata={})
