"""The description of a command before it runs: what it would compute and write, and what is already there."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from pipeline.data.dataset import Dataset
from pipeline.longtail import class_groups
from pipeline.text import Shown, columns, size, wrapped

WIDTH = 100  # columns at most


@dataclass(frozen=True)
class Write:
    """A file, folder or store that would be written.

    Arguments:
        bytes: its size, None where nobody can know it before.
        state: one phrase on what is there now, such as `new` or `replaced`.
    """

    path: Path | str
    bytes: int | None
    state: str

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "state": self.state}


@dataclass(frozen=True)
class Prepared(Shown):
    """The description of a command before it runs. `--dry-run` prints it; its `to_dict()` is that of `--dry-run --json`.

    Arguments:
        config: the settings as they would be used.
        facts: name → text for a person.
        numbers: the same for scripts: epochs, steps, images, ranks, device, precision, …
        parts: the stages of a command that has several, in the order in which they run.
        title: the heading of a part; its command by default.
    """

    command: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    numbers: Mapping[str, Any]
    writes: tuple[Write, ...]
    notes: tuple[str, ...] = ()
    parts: tuple["Prepared", ...] = ()
    title: str = ""

    @property
    def bytes(self) -> int:
        """Bytes that would be written in all, as far as they are known."""
        return sum(write.bytes or 0 for write in self.writes) + sum(part.bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        document = {"dry_run": True, "command": self.command, "config": dict(self.config), **self.numbers}
        document |= {"bytes": self.bytes, "writes": [w.to_dict() for w in self.writes], "notes": list(self.notes)}
        return document | ({"parts": [part.to_dict() for part in self.parts]} if self.parts else {})

    def __str__(self) -> str:
        width = columns(WIDTH)
        lines = [
            f"{self.command} would start; nothing was written",
            *_config_lines(self.config, width),
            *self._lines(width),
        ]
        for part in self.parts:
            lines += ["", part.title or part.command, *part._lines(width)]
        for note in dict.fromkeys((*self.notes, *(n for part in self.parts for n in part.notes))):
            lines += wrapped("note: ", note, width, indent=6)
        return "\n".join([*lines, *self._space_lines()])

    def _lines(self, width: int) -> list[str]:
        writes = [("writes", f"{w.path}: {size(w.bytes)}, {w.state}") for w in self.writes]
        return [
            line
            for name, text in (*self.facts.items(), *writes)
            for line in wrapped(f"{name:<10}", text, width, indent=10)
        ]

    def _space_lines(self) -> list[str]:
        """Total and free space, with a warning where the one exceeds the other."""
        writes = self._all_writes()
        if not writes:
            return []
        total = size(self.bytes if any(w.bytes is not None for w in writes) else None)
        local = [w.path for w in writes if "://" not in str(w.path)]
        if not local:
            return [f"in all {total}"]
        free = shutil.disk_usage(nearest_folder(Path(local[0]))).free
        little = f"; free some space before: {size(self.bytes - free)} are missing" if free < self.bytes else ""
        return [f"in all {total}; free there: {size(free)}{little}"]

    def _all_writes(self) -> list[Write]:
        return [*self.writes, *(w for part in self.parts for w in part._all_writes())]


def nearest_folder(path: Path) -> Path:
    """Return the path itself where it exists, else the nearest folder above it that does."""
    return next(p for p in (path, *path.parents) if p.exists())


def replaced_or_new(path: Path) -> str:
    """Return the state of a file that is written whole."""
    return "replaced" if path.exists() else "new"


def data_facts(dataset: Dataset) -> dict[str, str]:
    """Return the sizes of the splits and of the classes as facts of a `Prepared`."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    return {"data": f"{dataset.name}: {sizes}", "classes": classes_text(dataset.class_names, dataset.counts)}


def classes_text(names: Sequence[str], counts: np.ndarray, most: int = 3) -> str:
    """Return how many classes there are, their groups, and the largest and smallest by name."""
    groups = ", ".join(f"{int(m.sum()):,} {g}" for g, m in class_groups(counts).items() if m.any())
    classes = [f"{names[c]} ({counts[c]:,})" for c in np.argsort(-counts, kind="stable")]
    examples = ", ".join(classes if len(classes) <= 2 * most else [*classes[:most], "…", *classes[-most:]])
    return f"{len(names):,} ({groups}); training images: {examples}"


class Processes(Protocol):
    """The device and the number of the processes that a command computes in, such as `pipeline.distributed.Ranks`."""

    @property
    def device(self) -> object: ...

    @property
    def world(self) -> int: ...


def device_numbers(ranks: Processes, precision: str) -> dict[str, Any]:
    """Return the numbers of a `Prepared` that say where it is computed."""
    return {"device": str(ranks.device), "precision": precision, "ranks": ranks.world}


def device_text(ranks: Processes, precision: str) -> str:
    """Return the fact of a `Prepared` that says where it is computed."""
    return f"{ranks.device}, {precision}, {ranks.world} rank(s)"


def _config_lines(config: Mapping[str, Any], width: int) -> list[str]:
    """Return a paragraph for each section, with every key that has a value."""
    lines = ["configuration"] if config else []
    for section, value in config.items():
        if isinstance(value, Mapping):
            value = {key: inner for key, inner in value.items() if inner is not None}
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        lines += wrapped(f"  {section}: ", text.removesuffix("...\n").strip(), width, indent=4)
    return lines
