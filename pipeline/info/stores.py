"""Feature stores: sealed, unfinished, and as plain files."""

import json
from pathlib import Path

from cache import Cache, CacheError, Writer, open_cache, open_writer
from pipeline.errors import DataError
from pipeline.info.artefact import EXPECTED, Artefact, read_json
from pipeline.results.documents import RecordShape, checked
from pipeline.results.summary import class_facts, prefixed


def store(path: Path | str) -> Artefact:
    """A sealed store through its own reader; of one that is not, how far it has come."""
    try:
        writer = open_writer(path)
        if not writer.sealed:
            return _open_store(path, writer)
        opened = open_cache(path)
    except CacheError as error:
        raise DataError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable feature store ({error}); expected {EXPECTED}") from error
    checked(Path(path), opened.provenance, RecordShape, "dump again with --overwrite")
    sizes = {s: f"{opened.rows(s):,} samples, {opened.views(s)} view(s)" for s in opened.splits}
    facts = {"state": "sealed", **sizes, "features": f"{opened.width} wide, {opened.dtype}"}
    if head := opened.provenance.get("head"):
        facts["head"] = str(head)
    facts |= {f"skipped {split}": samples_text(ids) for split, ids in skipped_of(opened).items()}
    return Artefact(
        path,
        "feature store",
        {
            **facts,
            **class_facts(opened.class_names, opened.counts.tolist()),
            **prefixed(opened.fingerprint),
            "digest": opened.digest,
        },
        opened.provenance,
    )


def skipped_of(store: Cache) -> dict[str, list[int]]:
    """Split → ids of the samples without features, splits that have such."""
    skipped = {split: store.ids(split)[store.skipped(split)].tolist() for split in store.splits}
    return {split: ids for split, ids in skipped.items() if ids}


def samples_text(ids: list[int], most: int = 10) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return f"{len(ids)} unreadable image(s), left out wherever features are used: sample {', '.join(map(str, ids[:most]))}{more}"


def _open_store(path: Path | str, writer: Writer) -> Artefact:
    layout, chunks, place = writer.layout, writer.chunks, writer.place
    attributes = json.loads(place.read("zarr.json")[0])["attributes"]
    present = len({f"{chunk.array}/{chunk.key}" for chunk in chunks}.intersection(place.names()))
    sizes = {s: f"{rows:,} samples, {views} view(s)" for s, views, rows in layout.splits}
    facts = {
        "state": f"open: {present} of {len(chunks)} chunks are there; the same pipeline dump-features goes on with it",
        **sizes,
        "features": f"{layout.width} wide, {layout.dtype}",
        **class_facts(attributes["class_names"], attributes["counts"]),
        **prefixed(attributes["fingerprint"]),
    }
    return Artefact(path, "feature store, unfinished", facts, attributes["provenance"])


def plain_files(path: Path) -> Artefact:
    """The folder of `pipeline export STORE`."""
    document = read_json(path / "store.json")
    record = document.get("provenance", {})
    left_out = {split: rows for split, rows in document["rows_without_features"].items() if rows}
    facts = {
        "of": document["store"],
        "features": document["dtype"],
        **class_facts(document["class_names"], document["counts"]),
        **{f"without features {split}": samples_text(rows) for split, rows in left_out.items()},
        **prefixed(document["fingerprint"]),
        "digest": document["digest"],
    }
    return Artefact(path, "features as plain files", facts, record)
