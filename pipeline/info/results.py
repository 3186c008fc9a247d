"""Description of results: JSON documents by the summary in their header, heads, and what `reproduce` leaves."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import DataError
from pipeline.info.artefact import EXPECTED, Artefact, Facts, beside, read_json, try_json
from pipeline.info.trained import checkpoint
from pipeline.paths import STAGE1_HEAD
from pipeline.results import documents
from pipeline.results.heads import read_scorers
from pipeline.results.summary import SUMMARIES, heads_summary

KINDS: dict[str, tuple[str, Callable[[Path], Facts]]] = {  # by header: what a document is, and its reader
    "results": ("rebalancing results", documents.read_results),
    "choice": ("choice before the test split was read", documents.read_choice),
    "ablation": ("ablation", documents.read_ablation),
    "sweep": ("settings tried in stage 1", documents.read_sweep),
    "bench": ("bench {name}", documents.read_bench),
    "record": ("record of pipeline {command}", documents.read_record),
    "export": ("exported model", documents.read_export),
}
FILES = {"results.json": "results", "ablation.json": "ablation", "selection.json": "choice", "run.json": "record"}
KEYS = {"measures": "bench", "tries": "sweep", "bootstrap": "ablation", "selected": "results", "argv": "record"}


def document(path: Path) -> Artefact:
    """Describe a JSON document by the summary in its header; one of format 0.1 has none, and is summarised here."""
    content = read_json(path, object)
    if isinstance(content, list) and content and "table" in content[0]:
        return reproduction(path)
    header = content.get("header", {}) if isinstance(content, dict) else {}
    kind = FILES.get(path.name) or header.get("kind") or next((KEYS[key] for key in KEYS if key in content), None)
    if kind not in KINDS:
        raise DataError(f"{path}: not an artefact of this program; expected {EXPECTED}")
    name, read = KINDS[kind]
    content = read(path)
    facts = {"store": content["store"]} if "store" in content else {}
    facts |= header.get("summary") or SUMMARIES[kind](content)
    provenance = content if kind == "record" else content.get("provenance") or content.get("machine") or beside(path)
    return Artefact(path, name.format(**{"command": "", **content}).rstrip(), facts, provenance)


def heads(path: Path) -> Artefact:
    """Describe a safetensors file: heads, hits, or weights from elsewhere."""
    if path.name == STAGE1_HEAD:
        return _stage_1_head(path)
    try:
        scorers = read_scorers(path)
    except DataError:
        if path.name == "heads.safetensors":
            raise
        return _hits(path) or checkpoint(path)
    classes, width = scorers[0][1].arrays[0].shape
    return Artefact(
        path, "rebalanced heads", heads_summary([entry for entry, _ in scorers], classes, width), beside(path)
    )


def _stage_1_head(path: Path) -> Artefact:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            classes, width = file.get_slice("weight").get_shape()
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); run `pipeline export` again") from error
    facts = {"weight": f"{classes} classes × {width} features", "of": "the exported model in the same folder"}
    return Artefact(
        path, "head before rebalancing", facts, try_json(path.with_name("config.json")).get("provenance", {})
    )


def _hits(path: Path) -> Artefact | None:
    """Describe a file of hits; None where it is none."""
    from pipeline.results.differences import read_hits

    try:
        hits = read_hits(path)
    except DataError:
        return None
    facts = {"test images": f"{len(hits.labels):,}", "heads": len(hits.heads)}
    return Artefact(path, "which test images each head got right", facts, beside(path))


def reproduction(path: Path) -> Artefact:
    """reproduction.json: how many rows of which tables, and how far they are from the paper's."""
    rows = read_json(path, list)
    tables: dict[str, int] = {}
    for row in rows:
        tables[f"{row['table']}, {row['config']}"] = tables.get(f"{row['table']}, {row['config']}", 0) + 1
    compared = sum(any(v is not None for v in (row.get("paper") or {}).values()) for row in rows)
    facts = {
        "rows": f"{len(rows)}, {compared} beside a number of the paper",
        **{f"  {table}": f"{n} rows" for table, n in tables.items()},
        "networks": sorted({str(row["network"]) for row in rows}),
        "devices": sorted({str(row["device"]) for row in rows}),
    }
    return Artefact(path, "reproduction of the paper's tables", facts, {})


def kept(path: Path) -> Artefact:
    """A folder under keep/ of `pipeline reproduce`: tables, heads and the clean view of a backbone's features."""
    from safetensors import safe_open

    with safe_open(path / "clean.safetensors", "np") as file:
        source_facts = json.loads(file.metadata()["facts"])
        sizes = {n: file.get_slice(n).get_shape() for n in file.keys() if n.endswith("_features")}  # noqa: SIM118
    facts = {
        "tables": sorted(p.name for p in path.iterdir() if p.is_dir()),
        "features": ", ".join(
            f"{name.removesuffix('_features')} {n:,} × {width}" for name, (n, width) in sizes.items()
        ),
        "network": source_facts["network"],
        "classes": f"{len(source_facts['class_names']):,}",
        "digest of the store": source_facts["digest"],
    }
    return Artefact(path, "kept of a reproduction", facts, beside(path / "clean.safetensors"))


def progress(path: Path) -> Artefact:
    """The folder of `pipeline progress`."""
    lines = (path / "progress.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    runs = list(dict.fromkeys(row[next(iter(row))] for row in rows))
    return Artefact(path, "progress of trainings compared", {"compares": runs, "rows": len(rows)}, {})
