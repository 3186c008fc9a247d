"""The folder of a training: checkpoints, history, and whether what lies there is of the same training."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache import write_durably
from pipeline.backbone import checkpoint, diagnosis
from pipeline.backbone.events import Epoch
from pipeline.config import BackboneConfig
from pipeline.errors import ConfigError

# what may differ when a training goes on
FREE = {"save_every_minutes", "validate_every", "pretrained", "compile", "diagnose_every", "diagnose_per_class"}


class TrainingFolder:
    """last.pt, best.pt, metrics.jsonl, diagnostics.csv and run.json of one training; identity: what decides its result."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity = path, identity

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    def clear(self) -> None:
        """Takes away what an earlier training left."""
        for name in ("last.pt", "best.pt", "metrics.jsonl", "diagnostics.csv"):
            (self.path / name).unlink(missing_ok=True)

    def state(self) -> dict[str, Any] | None:
        """What the last checkpoint holds, None where there is none; ConfigError if it is of another training."""
        if not self.last.is_file():
            return None
        state = checkpoint.read(self.last)
        self._refuse_other(state.get("identity", {}))
        return state

    def begin(self, provenance: dict[str, Any], *, epoch: int) -> None:
        """Makes the folder ready for a training that goes on after `epoch` epochs."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_durably(self.path / "run.json", json.dumps(provenance, indent=1))
        write_durably(self.path / "metrics.jsonl", "".join(_lines_until(self.path / "metrics.jsonl", epoch)))
        diagnosed = self.path / "diagnostics.csv"
        if diagnosed.is_file():
            write_durably(diagnosed, diagnosis.HEADER + "".join(_rows_until(diagnosed, epoch)))

    def append(self, epoch: Epoch, diagnosed: str | None = None) -> None:
        """One line more in metrics.jsonl, and those of an epoch in diagnostics.csv where it was diagnosed."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(epoch)) + "\n")
        if diagnosed is not None:
            with open(self.path / "diagnostics.csv", "a", encoding="utf-8") as file:
                file.write(diagnosed if file.tell() else diagnosis.HEADER + diagnosed)

    def save(self, state: dict[str, Any], *, resume: dict[str, Any], best: bool) -> None:
        """Replaces last.pt, which also holds what resuming needs, and best.pt where this is the best."""
        if best:
            checkpoint.save(self.path / "best.pt", state)
        checkpoint.save(self.last, state | resume)

    @property
    def last_line(self) -> dict[str, Any] | None:
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return json.loads(lines[-1]) if lines else None

    def _refuse_other(self, theirs: dict[str, Any]) -> None:
        mine = self.identity
        theirs = _defaults() | theirs  # settings that an earlier version did not have
        differing = [k for k in mine | theirs if mine.get(k) != theirs.get(k)]
        if differing:
            shown = "; ".join(f"{k} was {_short(theirs.get(k))}, now {_short(mine.get(k))}" for k in differing)
            raise ConfigError(
                f"{self.last} is of another training: {shown}. Take another --out, or --overwrite to start anew"
            )


def identity_of(settings: BackboneConfig, *, dataset: str, transform: dict[str, Any]) -> dict[str, Any]:
    """What decides the result: two checkpoints that differ in any of it are different trainings. dataset: fingerprint."""
    images = {"dataset": dataset, "transform": json.dumps(transform, sort_keys=True)}
    return _settings(settings) | {f"data ({key})": value for key, value in images.items()}


def _settings(settings: BackboneConfig) -> dict[str, Any]:
    return dict(_flat("backbone", settings.model_dump(mode="json", exclude=FREE)))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting of a section and of the sections in it."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(f"{name}.{key}", inner)


def _defaults() -> dict[str, Any]:
    return _settings(BackboneConfig())


def _lines_until(path: Path, epoch: int) -> list[str]:
    """The metric lines of epochs that the checkpoint has; a torn last line is dropped."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["epoch"] <= epoch and line.endswith("\n"):
                kept.append(line)
        except ValueError:
            continue
    return kept


def _rows_until(path: Path, epoch: int) -> list[str]:
    """The lines of diagnostics.csv of epochs that the checkpoint has."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    return [r for r in rows if r.endswith("\n") and r.partition(",")[0].isdigit() and int(r.partition(",")[0]) <= epoch]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
