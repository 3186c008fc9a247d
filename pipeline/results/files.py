"""The writers of JSON and CSV that every artefact goes through."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache import write_durably
from pipeline.provenance import library_version
from pipeline.results.summary import SUMMARIES

FORMULA = re.compile(r"[=@\t\r]|[+-](?![0-9.]+(e[+-]?[0-9]+)?$)")  # how text begins that is no number, to a spreadsheet
FORMAT = 2  # of documents with a header; those of version 0.1 have none


def json_text(document: Any) -> str:
    """Return a document as JSON, an entry a line; numbers that JSON does not know are refused with ValueError."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, document: Any) -> Path:
    """Write a document as JSON, whole or not at all."""
    return write_durably(path, json_text(document))


def header(kind: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header by which readers know a file's kind, its format, the version that made it and its main facts."""
    version = f"iwb-pipeline {library_version('iwb-pipeline')}"
    return {"kind": kind, "format": FORMAT, "made_by": version, "summary": dict(summary)}


def write_artefact(path: Path, kind: str, document: Mapping[str, Any]) -> Path:
    """Write a document behind its header, whole or not at all.

    Arguments:
        kind: a key of SUMMARIES.
    """
    return write_json(path, {"header": header(kind, SUMMARIES[kind](dict(document))), **document})


def csv_line(cells: Iterable[Any]) -> str:
    """Return one line of CSV without its end.

    None is an empty cell, text with a line break of any kind is quoted, and text that a spreadsheet would compute has an
    apostrophe before it.
    """
    safe = [f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell for cell in cells]
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(safe)  # Python 3.11 quotes only what is in the line's end
    return text.getvalue()[:-2]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a CSV file of rows, a column for every key that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines: list[list[Any]] = [columns, *([row.get(column) for column in columns] for row in rows)]
    return "".join(f"{csv_line(line)}\n" for line in lines)


def tensor_file(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file of arrays whose bytes follow from its content: safetensors writes metadata in a random order."""
    from safetensors.numpy import save

    content = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    ordered = {"__metadata__": dict(sorted(metadata.items())), **{key: entries[key] for key in sorted(tensors)}}
    text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])
