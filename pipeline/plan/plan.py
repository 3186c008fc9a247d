"""A plan: what would be computed, what would be written, what is already there."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.metrics import class_groups
from pipeline.text import Shown, columns, size, wrapped

WIDTH = 100  # columns at most


@dataclass(frozen=True)
class Write:
    """A file, folder or store that would be written: how many bytes, None where nobody can know, and what is there now."""

    path: Path | str
    bytes: int | None
    state: str

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "state": self.state}


@dataclass(frozen=True)
class Plan(Shown):
    """What a command would do; nothing was written.

    config: as it would be used; facts: name → what a person reads; numbers: the same for scripts (epochs, steps, images,
    ranks, device, precision, …); parts: the plans of its stages.
    """

    command: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    numbers: Mapping[str, Any]
    writes: tuple[Write, ...]
    notes: tuple[str, ...] = ()
    parts: tuple["Plan", ...] = ()
    title: str = ""

    @property
    def bytes(self) -> int:
        """What would be written in all, as far as it is known."""
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
        return "\n".join([*lines, *self._room()])

    def _lines(self, width: int) -> list[str]:
        writes = [(f"{w.path}", f"{size(w.bytes)}, {w.state}") for w in self.writes]
        facts = [*self.facts.items(), *(("writes", f"{path}: {told}") for path, told in writes)]
        return [line for name, text in facts for line in wrapped(f"{name:<10}", text, width, indent=10)]

    def _room(self) -> list[str]:
        """Total and free space, and a warning where they do not fit."""
        writes = self._all_writes()
        if not writes:
            return []
        total = size(self.bytes if any(w.bytes is not None for w in writes) else None)
        local = [w.path for w in writes if "://" not in str(w.path)]
        if not local:
            return [f"in all {total}"]
        free = shutil.disk_usage(existing(Path(local[0]))).free
        little = f"; free some space before: {size(self.bytes - free)} are missing" if free < self.bytes else ""
        return [f"in all {total}; free there: {size(free)}{little}"]

    def _all_writes(self) -> list[Write]:
        return [*self.writes, *(w for part in self.parts for w in part._all_writes())]


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def classes_text(names: Sequence[str], counts: np.ndarray, most: int = 3) -> str:
    """How many classes, their groups, and the largest and smallest by name."""
    groups = ", ".join(f"{int(m.sum()):,} {g}" for g, m in class_groups(counts).items() if m.any())
    order = np.argsort(-counts, kind="stable")
    told = [f"{names[c]} ({counts[c]:,})" for c in order]
    listed = ", ".join(told if len(told) <= 2 * most else [*told[:most], "…", *told[-most:]])
    return f"{len(names):,} ({groups}); training images: {listed}"


def _config_lines(config: Mapping[str, Any], width: int) -> list[str]:
    """Each section with every key that has a value."""
    lines = ["configuration"] if config else []
    for section, value in config.items():
        known = {key: of for key, of in value.items() if of is not None} if isinstance(value, Mapping) else value
        text = yaml.safe_dump(known, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        lines += wrapped(f"  {section}: ", text.removesuffix("...\n").strip(), width, indent=4)
    return lines
