"""The folder of a training: checkpoints, history, and the check that both are of the same training."""

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
from pipeline.data.sources import split_folders
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.killpoint import KillPoint
from pipeline.results.files import write_artefact

# settings that may differ when a training goes on
NOT_IDENTITY = {
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
VISIBLE_WITHIN = 60.0  # seconds until every host sees what another has written; NFS looks that seldom
SavedState = tuple[dict[str, Any], str]  # a checkpoint's state, and the digest of its file


def refuse_among_images(path: Path, data: DataConfig) -> None:
    """Raise ConfigError where a folder lies among the class folders of the images, where what it holds would be read as such."""
    if data.source != "folder" or data.path is None:
        return
    root = data.path.expanduser().resolve()
    places = split_folders(root) if root.is_dir() else {}
    for classes in places.values() if "train" in places else [root]:
        if path.resolve().is_relative_to(classes):
            raise ConfigError(f"{path}: lies among the class folders of {classes}; take another --out")


@contextmanager
def exclusive(path: Path, ranks: Ranks) -> Iterator[list[str]]:
    """Hold the lock of a folder, which is made, so that no other process trains into it; yield notes for a person.

    The system drops the lock with its owner, however that ends.

    Raises:
        DataError: names the process that holds the lock.
        PipelineError: the folder cannot be written.
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
    """The files last.pt, previous.pt, best.pt, metrics.jsonl, diagnostics.csv and run.json of a training.

    Arguments:
        identity: the settings that decide the result (`identity_of`).
        kill: where a test lets the process die.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, kill: KillPoint | None = None):
        self.path, self.identity, self._kill = path, identity, kill or KillPoint(None, rank=0)
        self._best: dict[str, Any] | None = None
        self._events: EventFiles | None = None
        self.notes: list[str] = []  # for a person, on how the training was resumed

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def previous(self) -> Path:
        return checkpoint.previous_of(self.last)

    def resume(self, ranks: Ranks, *, overwrite: bool) -> dict[str, Any] | None:
        """Return the state that every rank goes on from, None for a training that begins.

        Where last.pt is damaged or gone, previous.pt takes its place, which `notes` says; the damaged file is renamed.

        Arguments:
            overwrite: remove the files of an earlier training first.

        Raises:
            ConfigError: the checkpoint is of another training, or ranks see different ones.
            DataError: no checkpoint in the folder is whole.
        """
        repaired = ranks.together(lambda: self._repaired(overwrite) if ranks.first else None)
        patience = time.monotonic() + VISIBLE_WITHIN
        while True:
            saved = ranks.together(lambda: repaired if ranks.first else self._last())
            digests = ranks.gathered((os.uname().nodename, saved and saved[1]))
            if len({digest for _, digest in digests}) == 1:
                return saved and saved[0]
            if ranks.largest(time.monotonic() > patience):
                break
            time.sleep(1)
        ranks.together(lambda: self._refuse_different(digests) if ranks.first else None)
        return None

    def state(self) -> dict[str, Any] | None:
        """Return the state in last.pt, None where there is none; raise ConfigError where it is of another training."""
        saved = self._last()
        return saved and saved[0]

    def peek(self, *, overwrite: bool) -> tuple[dict[str, Any] | None, str]:
        """Return the state that `resume` would return, and the reason where it is not that of last.pt; change nothing."""
        saved, reason = (None, "") if overwrite else self._usable()
        return saved and saved[0], reason

    def _repaired(self, overwrite: bool) -> SavedState | None:
        if overwrite:
            for name in (self.last.name, self.previous.name, "best.pt", "metrics.jsonl", "diagnostics.csv"):
                (self.path / name).unlink(missing_ok=True)
        saved, reason = self._usable()
        if saved is None or not reason:
            return saved
        renamed = f"; it is kept as {self._rename_damaged().name}" if self.last.is_file() else ""
        checkpoint.link_as(self.previous, self.last)
        state = saved[0]
        at = f"epoch {state['epoch']}" + (f", step {state['step_in_epoch']}" if state["step_in_epoch"] else "")
        self.notes.append(f"{reason}{renamed}. Going on from {self.previous.name}, which is of {at}")
        return saved

    def _usable(self) -> tuple[SavedState | None, str]:
        """Return the state in last.pt or, where that is damaged or gone, in previous.pt; and the fault of last.pt, if any."""
        try:
            if self.last.is_file() or not self.previous.is_file():
                return self._last(), ""
            reason = f"{self.last} is missing"
        except checkpoint.DamagedCheckpoint as error:
            reason = str(error).partition("; ")[0]
            if not self.previous.is_file():
                raise
        try:
            return self._read(self.previous), reason
        except checkpoint.DamagedCheckpoint as error:
            raise DataError(f"{reason}, and so is the one before it: {error}") from error

    def _last(self) -> SavedState | None:
        return self._read(self.last) if self.last.is_file() else None

    def _read(self, path: Path) -> SavedState:
        state, digest = checkpoint.read_with_digest(path)
        self._refuse_other(path, state.get("identity", {}) | {"backbone.precision": recorded_precision(state)})
        return state, digest

    def _rename_damaged(self) -> Path:
        """Rename a last.pt that cannot be read to last.pt.damaged, or with the first free number behind it; return the path."""
        names = itertools.chain(["last.pt.damaged"], (f"last.pt.damaged-{n}" for n in itertools.count(2)))
        free = next(path for path in map(self.path.joinpath, names) if not path.exists())
        return self.last.rename(free)

    def _refuse_different(self, digests: list[tuple[str, str | None]]) -> None:
        """Raise ConfigError naming a rank that sees another checkpoint; digests: (host, digest or None) by rank."""
        (host, first), *rest = digests
        rank, (other_host, digest) = next(o for o in enumerate(rest, 1) if o[1][1] != first)
        kinds = {None: "none", first: "one"}
        raise ConfigError(
            f"{self.last} is not the same file on all hosts: rank {rank} on {other_host} sees {kinds.get(digest, 'another')}, "
            f"rank 0 on {host} {kinds[first]}; give all of them one --out on a file system that they share, or copy the "
            "newest to each"
        )

    def begin(self, provenance: dict[str, Any], *, epoch: int) -> None:
        """Prepare the folder for a training that goes on after `epoch` epochs."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        write_artefact(self.path / "run.json", "record", provenance)
        write_durably(self.path / "metrics.jsonl", "".join(_lines_until(self.path / "metrics.jsonl", epoch)))
        diagnosed = self.path / "diagnostics.csv"
        if diagnosed.is_file():
            write_durably(diagnosed, diagnosis.HEADER + "".join(_rows_until(diagnosed, epoch)))

    def show_in_tensorboard(self) -> None:
        """Write tensorboard/ from metrics.jsonl, and add every epoch that follows."""
        self._events = EventFiles(self.path / "tensorboard", self.history())

    def close(self) -> None:
        """Close the TensorBoard files."""
        if self._events is not None:
            self._events.close()

    def append(self, epoch: Epoch, diagnosed: str | None = None) -> None:
        """Append a line to metrics.jsonl, and the lines of a diagnosed epoch to diagnostics.csv."""
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
        """Copy the best state for the next save."""
        model = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state["model"].items()}
        self._best = state | {"model": model}

    def save(self, state: dict[str, Any], *, resume: dict[str, Any], best: bool) -> None:
        """Replace last.pt, and best.pt where this state or one since the last save is the best.

        Arguments:
            resume: tensors that only resuming needs; they go into last.pt alone.

        The old last.pt becomes previous.pt.

        Raises: PipelineError: the file cannot be written; last.pt is then as it was.
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
        """Return the epochs in metrics.jsonl, without a last line torn by a kill."""
        return read_history(self.path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            consequence = f"{self.last} stays as it was" if self.last.is_file() else "no checkpoint was there before"
            raise PipelineError(
                f"{self.path}: cannot be written: {error.strerror or error}; {consequence}. "
                "Once there is room, the same command goes on"
            ) from error

    def _refuse_other(self, path: Path, saved_identity: dict[str, Any]) -> None:
        identity = self.identity
        if identity.get("backbone.precision") == "auto":  # it goes on in the precision of the checkpoint
            identity = identity | {"backbone.precision": saved_identity.get("backbone.precision")}
        saved_identity = _defaults() | saved_identity  # settings that an earlier version did not have
        changed = [k for k in identity | saved_identity if identity.get(k) != saved_identity.get(k)]
        if changed:
            changes = "; ".join(
                f"{k} was {_short(saved_identity.get(k))}, now {_short(identity.get(k))}" for k in changed
            )
            raise ConfigError(
                f"{path} is of another training: {changes}. Take another --out, or --overwrite to start anew"
            )


def refuse_frozen(settings: BackboneConfig) -> None:
    """Raise ConfigError where the configuration takes a pretrained network as it is."""
    if settings.frozen:
        raise ConfigError(
            f"backbone.encoder={settings.encoder}: this network is taken as it is, so there is nothing to train; go on with "
            "`pipeline dump-features` or `pipeline run`"
        )


def identity_of(settings: BackboneConfig, *, dataset: str, transform: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the result; checkpoints that differ in one of them are different trainings.

    Arguments:
        dataset: fingerprint of the training and validation images.
    """
    images = {"dataset": dataset, "transform": json.dumps(transform, sort_keys=True)}
    return _settings(settings) | {f"data ({key})": value for key, value in images.items()}


def _settings(settings: BackboneConfig) -> dict[str, Any]:
    return dict(_flat("backbone", settings.model_dump(mode="json", exclude=NOT_IDENTITY)))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting of a section and of the sections in it."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(f"{name}.{key}", inner)


def _defaults() -> dict[str, Any]:
    return _settings(BackboneConfig())


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs in a training's metrics.jsonl, without a last line torn by a kill; empty where there is none."""
    return [json.loads(line) for line in _lines_until(folder / "metrics.jsonl")]


def _lines_until(path: Path, epoch: float = math.inf) -> list[str]:
    """Return the lines of metrics.jsonl up to an epoch; a torn last line is dropped."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["epoch"] <= epoch and line.endswith("\n"):
                lines.append(line)
        except ValueError:
            continue
    return lines


def _rows_until(path: Path, epoch: int) -> list[str]:
    """Return the lines of diagnostics.csv up to an epoch."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    return [r for r in rows if r.endswith("\n") and r.partition(",")[0].isdigit() and int(r.partition(",")[0]) <= epoch]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
