"""One artefact as it is told: what it is, its key facts, what made it; and how facts become text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.results import documents
from pipeline.text import Shown, columns, size, wrapped

EXPECTED = (
    "a run's folder, a checkpoint (last.pt, or any timm network's), a feature store (features.zarr), a folder of rebalance, "
    "of an ablation, of tries, of reproduce or of `pipeline export`, results.json, heads.safetensors, run.json, a result of "
    "`pipeline bench`, or a configuration (.yaml, or a shipped name)"
)
MADE = (
    "created",
    "argv",
    "git",
    "platform",
    "device",
    "ranks",
    "threads",
    "precision",
    "seed",
    "made_from",
    "versions",
)
NAME_WIDTH = 60  # longer names stand in a line with what is said of them
Facts = dict[str, Any]


@dataclass(frozen=True)
class Artefact(Shown):
    """A file or folder of this program.

    Arguments:
        kind: in words.
        facts: name → value of what a person should know.
        provenance: the record of its making; empty where there is none.
    """

    path: Path | str
    kind: str
    facts: Facts
    provenance: Facts = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "kind": self.kind, "facts": self.facts, "provenance": self.provenance}

    def __str__(self) -> str:
        record: Facts = {key: self.provenance[key] for key in MADE if self.provenance.get(key) is not None}
        if "argv" in record:
            record["argv"] = " ".join(map(str, record["argv"]))
        lines = (
            lines_of(self.facts) + ([("made by", "")] if record else []) + [(f"  {k}", v) for k, v in lines_of(record)]
        )
        config = self.provenance.get("config")
        if isinstance(config, dict) and config:
            sections = (
                config
                if any(isinstance(section, dict) for section in config.values())
                else {self.provenance.get("command", ""): config}
            )
            lines += [("configuration", ""), *((f"  {k}", v) for k, v in lines_of(sections))]
        name_width = min(max((len(name) for name, _ in lines), default=0), NAME_WIDTH)
        lines_out = [f"{self.path}: {self.kind}"]
        for name, text in lines:
            lines_out += wrapped(f"  {name:<{name_width}}  ", text, columns(), indent=name_width + 4)
        return "\n".join(lines_out)


def lines_of(facts: Facts) -> list[tuple[str, str]]:
    return [(name, text_of(value)) for name, value in facts.items() if value is not None]


def text_of(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {text_of(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_json(path: Path, kind: type = dict) -> Any:
    """The document in a file; DataError where it is none, or not of the kind expected."""
    try:
        document = documents.read_json(path)
    except DataError as error:
        raise DataError(f"{error}; expected {EXPECTED}") from error
    if not isinstance(document, kind):
        raise DataError(f"{path}: not an artefact of this program; expected {EXPECTED}")
    return document


def try_json(path: Path) -> Facts:
    try:
        return read_json(path)
    except DataError:
        return {}


def beside(path: Path) -> Facts:
    """Return the run.json beside a file, empty where there is none."""
    return documents.read_record(path.with_name("run.json"))


def size_on_disk(path: Path) -> str:
    """`12 files, 3.4 MB` of a folder and all below it, or `3.4 MB` of a file."""
    if path.is_file():
        return size(path.stat().st_size)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return f"{len(sizes):,} file(s), {size(sum(sizes))}"
