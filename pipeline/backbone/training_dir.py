"""The folder of a training: checkpoints, history, and whether what lies there is of the same training."""

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache import CacheError, Lock, Unlockable, write_durably
from pipeline.backbone import checkpoint, diagnosis
from pipeline.backbone.arithmetic import recorded_precision
from pipeline.backbone.events import Epoch
from pipeline.backbone.tensorboard import EventFiles
from pipeline.config import BackboneConfig, DataConfig
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.killpoint import KillPoint

# what may differ when a training goes on
FREE = {
    "frozen",
    "encoder",
    "save_every_minutes",
    "validate_every",
    "pretrained",
    "compile",
    "tensorboard",
    "diagnose_every",
    "diagnose_per_class",
}
SEEN_WITHIN = 60.0  # seconds until every host sees what another has written; NFS looks that seldom
Found = tuple[dict[str, Any], str]  # a checkpoint's state, and the digest of its file


def refuse_among_images(path: Path, data: DataConfig) -> None:
    """ConfigError where a folder to be written lies where the next reading of the images would take it for a class."""
    if data.source != "folder" or data.path is None:
        return
    root = data.path.expanduser().resolve()
    classes = root / "train" if (root / "train").is_dir() else root
    if path.resolve().is_relative_to(classes):
        raise ConfigError(f"{path}: lies among the class folders of {classes}; take another --out")


@contextmanager
def alone_in(path: Path, ranks: Ranks) -> Iterator[list[str]]:
    """Nobody else trains into the folder, which is made, while this is entered; yields notes for a person.

    Raises DataError naming the process that does, PipelineError where the folder cannot be written. The system drops
    the lock with its owner, however that ends.
    """
    lock, notes = Lock(path), []
    new = [place for place in (path, *path.parents) if not place.exists()] if ranks.first else []

    def take() -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock.take()
        except Unlockable:
            notes.append(f"{path}: this file system cannot lock files; see to it that one training alone writes there")
        except CacheError as error:
            raise DataError(f"{error}; --out names another folder") from error
        except OSError as error:
            raise PipelineError(f"{path}: {error.strerror}; choose a folder you may write to with --out") from error

    try:
        ranks.together(lambda: take() if ranks.first else None)
        yield notes
    finally:
        lock.release()
        with suppress(OSError):  # what is refused leaves nothing
            for place in new:
                place.rmdir()


class TrainingFolder:
    """last.pt, previous.pt, best.pt, metrics.jsonl, diagnostics.csv and run.json; identity: what decides the result."""

    def __init__(self, path: Path, identity: dict[str, Any], *, kill: KillPoint | None = None):
        self.path, self.identity, self._kill = path, identity, kill or KillPoint(None, rank=0)
        self._best: dict[str, Any] | None = None
        self._events: EventFiles | None = None
        self.notes: list[str] = []  # what a person should know of how the training was taken up

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def previous(self) -> Path:
        return checkpoint.previous_of(self.last)

    def take_up(self, ranks: Ranks, *, overwrite: bool) -> dict[str, Any] | None:
        """The state that every rank goes on from, None for a training that begins; overwrite: what is there is removed.

        Where last.pt is damaged or gone, previous.pt takes its place, which `notes` says, and the damaged file is kept.
        Raises ConfigError for a checkpoint of another training, or where not every rank sees the same one, DataError
        where no checkpoint there is whole.
        """
        mended = ranks.together(lambda: self._mended(overwrite) if ranks.first else None)
        patience = time.monotonic() + SEEN_WITHIN
        while True:
            found = ranks.together(lambda: mended if ranks.first else self._whole_last())
            seen = ranks.gathered((os.uname().nodename, found and found[1]))
            if len({digest for _, digest in seen}) == 1:
                return found and found[0]
            if ranks.largest(time.monotonic() > patience):
                break
            time.sleep(1)
        ranks.together(lambda: self._refuse_different(seen) if ranks.first else None)
        return None

    def state(self) -> dict[str, Any] | None:
        """What last.pt holds, None where there is none; ConfigError if it is of another training. Nothing is changed."""
        found = self._whole_last()
        return found and found[0]

    def foresee(self, *, overwrite: bool) -> tuple[dict[str, Any] | None, str]:
        """(the state that `take_up` would go on from, why that is not last.pt's if so); raises as it does, changes nothing."""
        found, why = (None, "") if overwrite else self._found()
        return found and found[0], why

    def _mended(self, overwrite: bool) -> Found | None:
        if overwrite:
            for name in (self.last.name, self.previous.name, "best.pt", "metrics.jsonl", "diagnostics.csv"):
                (self.path / name).unlink(missing_ok=True)
        found, why = self._found()
        if found is None or not why:
            return found
        kept = f"; it is kept as {self._set_aside().name}" if self.last.is_file() else ""
        checkpoint.name_also(self.previous, self.last)
        state = found[0]
        at = f"epoch {state['epoch']}" + (f", step {state['step_in_epoch']}" if state["step_in_epoch"] else "")
        self.notes.append(f"{why}{kept}. Going on from {self.previous.name}, which is of {at}")
        return found

    def _found(self) -> tuple[Found | None, str]:
        """(what last.pt or, where that is damaged or gone, previous.pt holds; what is wrong with last.pt, else nothing)."""
        try:
            if self.last.is_file() or not self.previous.is_file():
                return self._whole_last(), ""
            why = f"{self.last} is missing"
        except checkpoint.Damaged as error:
            why = str(error).partition("; ")[0]
            if not self.previous.is_file():
                raise
        try:
            return self._of_this_training(self.previous), why
        except checkpoint.Damaged as error:
            raise DataError(f"{why}, and so is the one before it: {error}") from error

    def _whole_last(self) -> Found | None:
        return self._of_this_training(self.last) if self.last.is_file() else None

    def _of_this_training(self, path: Path) -> Found:
        state, digest = checkpoint.read_with_digest(path)
        self._refuse_other(path, state.get("identity", {}) | {"backbone.precision": recorded_precision(state)})
        return state, digest

    def _set_aside(self) -> Path:
        """The new name of a last.pt that cannot be read: last.pt.damaged, or the first number behind it that is free."""
        names = itertools.chain(["last.pt.damaged"], (f"last.pt.damaged-{n}" for n in itertools.count(2)))
        free = next(path for path in map(self.path.joinpath, names) if not path.exists())
        return self.last.rename(free)

    def _refuse_different(self, seen: list[tuple[str, str | None]]) -> None:
        """seen: (host, digest of the checkpoint it sees, None where it sees none) by rank."""
        (host, first), *others = seen
        rank, (other_host, other) = next(o for o in enumerate(others, 1) if o[1][1] != first)
        kinds = {None: "none", first: "one"}
        raise ConfigError(
            f"{self.last} is not the same file on all hosts: rank {rank} on {other_host} sees {kinds.get(other, 'another')}, "
            f"rank 0 on {host} {kinds[first]}; give all of them one --out on a file system that they share, or copy the "
            "newest to each"
        )

    def begin(self, provenance: dict[str, Any], *, epoch: int) -> None:
        """Makes the folder ready for a training that goes on after `epoch` epochs."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        write_durably(self.path / "run.json", json.dumps(provenance, indent=1))
        write_durably(self.path / "metrics.jsonl", "".join(_lines_until(self.path / "metrics.jsonl", epoch)))
        diagnosed = self.path / "diagnostics.csv"
        if diagnosed.is_file():
            write_durably(diagnosed, diagnosis.HEADER + "".join(_rows_until(diagnosed, epoch)))

    def show_in_tensorboard(self) -> None:
        """Writes tensorboard/, now what metrics.jsonl holds and with every epoch that follows."""
        self._events = EventFiles(self.path / "tensorboard", self.history())

    def close(self) -> None:
        """Ends what writes in the background."""
        if self._events is not None:
            self._events.close()

    def append(self, epoch: Epoch, diagnosed: str | None = None) -> None:
        """One line more in metrics.jsonl, and those of an epoch in diagnostics.csv where it was diagnosed."""
        with (
            self._kill.around(f"line-{epoch.epoch}"),
            self._writing(),
            open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(asdict(epoch)) + "\n")
        if self._events is not None:
            self._events.add(asdict(epoch))
        if diagnosed is not None:
            with self._writing(), open(self.path / "diagnostics.csv", "a", encoding="utf-8") as file:
                file.write(diagnosed if file.tell() else diagnosis.HEADER + diagnosed)

    def remember_best(self, state: dict[str, Any]) -> None:
        """Keeps the best state, copied, for the next save."""
        model = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state["model"].items()}
        self._best = state | {"model": model}

    def save(self, state: dict[str, Any], *, resume: dict[str, Any], best: bool) -> None:
        """Replaces last.pt, which also holds what resuming needs, and best.pt where this, or one since the last save, is best.

        What last.pt held stays as previous.pt. Raises PipelineError where it cannot be written; last.pt is then as it was.
        """
        epoch, size = state["epoch"], sum(tensor.nbytes for tensor in state["model"].values())
        best_state = state if best else self._best
        if best_state is not None:
            with self._kill.around(f"best-{epoch}", size=size), self._writing():
                checkpoint.save(self.path / "best.pt", best_state)
        with self._kill.around(f"last-{epoch}", size=size), self._writing():
            checkpoint.save(self.last, state | resume, previous=self.previous)
        self._best = None

    @property
    def last_line(self) -> dict[str, Any] | None:
        return next(reversed(self.history()), None)

    def history(self) -> list[dict[str, Any]]:
        """The epochs that metrics.jsonl holds, without a last line torn by a kill."""
        return read_history(self.path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"{self.last} stays as it was" if self.last.is_file() else "no checkpoint was there before"
            raise PipelineError(
                f"{self.path}: cannot be written: {error.strerror or error}; {kept}. "
                "Once there is room, the same command goes on"
            ) from error

    def _refuse_other(self, path: Path, theirs: dict[str, Any]) -> None:
        mine = self.identity
        if mine.get("backbone.precision") == "auto":  # it goes on in the precision of the checkpoint
            mine = mine | {"backbone.precision": theirs.get("backbone.precision")}
        theirs = _defaults() | theirs  # settings that an earlier version did not have
        differing = [k for k in mine | theirs if mine.get(k) != theirs.get(k)]
        if differing:
            shown = "; ".join(f"{k} was {_short(theirs.get(k))}, now {_short(mine.get(k))}" for k in differing)
            raise ConfigError(
                f"{path} is of another training: {shown}. Take another --out, or --overwrite to start anew"
            )


def refuse_frozen(settings: BackboneConfig) -> None:
    """Raise ConfigError where the configuration takes a pretrained network as it is."""
    if settings.frozen:
        raise ConfigError(
            f"backbone.encoder={settings.encoder}: this network is taken as it is, so there is nothing to train; go on with "
            "`pipeline dump-features` or `pipeline run`"
        )


def identity_of(settings: BackboneConfig, *, dataset: str, transform: dict[str, Any]) -> dict[str, Any]:
    """What decides the result: two checkpoints that differ in any of it are different trainings. dataset: fingerprint of
    the training and validation images."""
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


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The epochs that a training's metrics.jsonl holds, without a last line torn by a kill; empty where there is none."""
    return [json.loads(line) for line in _lines_until(folder / "metrics.jsonl")]


def _lines_until(path: Path, epoch: float = math.inf) -> list[str]:
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
