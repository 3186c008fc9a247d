"""Checkpoints: plain dictionaries, written whole or not at all, read without executing anything."""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from cache import write_durably
from pipeline.backbone.build import build_model
from pipeline.backbone.weights import read_file
from pipeline.config import Config, make_config
from pipeline.data.transform import Transform
from pipeline.errors import DataError
from pipeline.results.files import header
from pipeline.results.tables import network_text

FORMAT = 1
RECORD_BYTES, REST_BYTES = 250, 8_500  # of a file beside the numbers of its tensors: of each tensor, of all else
TRAINING_FILES = ("last.pt", "best.pt", "previous.pt")  # of `pipeline train-backbone`


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained backbone.

    Arguments:
        model: in evaluation mode, on the CPU.
        probe: whether its head, for want of one for these classes, is still to be fitted on the features.
        external: file and notes of a backbone that was not trained by this program.
    """

    path: Path
    model: nn.Module
    config: Config
    transform: Transform
    class_names: tuple[str, ...]
    counts: np.ndarray
    network: dict[str, Any]
    dataset: dict[str, Any]
    epoch: int
    complete: bool
    weights_digest: str
    provenance: dict[str, Any]
    probe: bool = False
    external: dict[str, Any] | None = None

    @property
    def head_is_final(self) -> bool:
        """True where the head's rows are the data's classes; else it waits for the features: to be fitted, or ordered by them."""
        return not self.probe and (self.external or {}).get("classes_named", True)


class DamagedCheckpoint(DataError):
    """A file that is not a whole checkpoint of this program: torn, changed, or something else."""


def save(path: Path, state: dict[str, Any], *, previous: Path | None = None) -> None:
    """Replace the file by the state, durably; its old content stays as `previous`, at every moment under one name or both.

    Raises: OSError: disk full, no permission; both files are then as they were.
    """
    summary = {"network": network_text(state.get("network", {}))}

    def content(file: BinaryIO) -> None:
        _write({"header": header("checkpoint", summary), "format": FORMAT, **state}, file)
        if previous is not None and path.exists():
            file.flush()
            os.fsync(file.fileno())  # two whole checkpoints are there until this one is safe
            link_as(path, previous)

    write_durably(path, content)


def read(path: Path) -> dict[str, Any]:
    """Return the state saved in a file.

    Raises:
        DataError: the file is missing or of another format.
        DamagedCheckpoint: it is damaged, or not a checkpoint of this program.
    """
    return read_with_digest(path)[0]


def read_with_digest(path: Path) -> tuple[dict[str, Any], str]:
    """Return (state, digest of all content), as `read` does; equal files have equal digests."""
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; make one with `pipeline train-backbone`")
    try:
        digest = _records_digest(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises a dozen types for a damaged file
        if path.name not in TRAINING_FILES:
            raise _external_error(path) from error
        changed = isinstance(error, zipfile.BadZipFile) and str(error).startswith("its record")
        reason = str(error) if changed else "it ends too early or is damaged"
        raise DamagedCheckpoint(f"{path}: not a readable checkpoint: {reason}; {_remedy(path)}") from error
    if not isinstance(state, dict) or not {"format", "model", "config", "transform"} <= state.keys():
        if previous_of(path).is_file():
            raise DamagedCheckpoint(f"{path}: a checkpoint, but not one of `pipeline train-backbone`; {_remedy(path)}")
        raise _external_error(path)
    if state["format"] != FORMAT:
        raise DataError(
            f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}; train again with --overwrite"
        )
    return state, digest


def link_as(path: Path, second_name: Path) -> None:
    """Give a file a second name; where the file system has no hard links, rename it."""
    spare = path.with_name(f".{second_name.name}.link.tmp")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
        os.replace(spare, second_name)
    except OSError:
        os.replace(path, second_name)
    finally:
        spare.unlink(missing_ok=True)  # replacing one name of a file by another leaves both


def previous_of(path: Path) -> Path:
    """Return the path of the checkpoint before a last.pt."""
    return path.with_name("previous.pt")


def _remedy(path: Path) -> str:
    if path.name == "last.pt" and previous_of(path).is_file():
        return f"the same `pipeline train-backbone` command goes on from {previous_of(path)}, the checkpoint before it"
    return "train again with --overwrite"


def _external_error(path: Path) -> DamagedCheckpoint:
    """Return the error for a file of another program: how to use its weights, or why they cannot be read."""
    try:
        read_file(path)
    except DataError as error:
        return DamagedCheckpoint(str(error))
    return DamagedCheckpoint(
        f"{path}: not one of `pipeline train-backbone`; weights from elsewhere are taken with "
        f"`pipeline dump-features CONFIG --checkpoint {path}`"
    )


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    watched = _WatchedFile(file)
    try:
        torch.save(state, watched)  # type: ignore[arg-type]  # it uses no more of a file
    except RuntimeError as error:  # what torch makes of a full disk
        raise watched.failure or error from None


class _WatchedFile:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO):
        self._file, self.failure = file, None  # type: BinaryIO, OSError | None
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise


def _records_digest(path: Path) -> str:
    """Return the sha256 over name, size and crc32 of each record, every one of which is read against its crc32.

    torch writes these sums, for tensors too, and never looks at them.
    """
    with zipfile.ZipFile(path) as records:
        if (damaged := records.testzip()) is not None:
            raise zipfile.BadZipFile(f"its record {damaged} was changed after it was written")
        sums = [(record.filename, record.file_size, record.CRC) for record in records.infolist()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the backbone in a last.pt or best.pt, ready to encode; raise DataError as `read` does."""
    state = read(path)
    config = make_config(state["config"], f"{path} (config)")
    names = tuple(state["class_names"])
    model = build_model(config.backbone.model_copy(update={"pretrained": False}), num_classes=len(names))
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise DataError(
            f"{path}: weights do not fit {config.backbone.model}: {' '.join(str(error).split())[:200]}"
        ) from error
    return Checkpoint(
        path=path,
        model=model.eval(),
        config=config,
        transform=Transform.from_dict(state["transform"], str(path)),
        class_names=names,
        counts=np.array(state["counts"]),
        network=state["network"],
        dataset=state["dataset"],
        epoch=state["epoch"],
        complete=state["complete"],
        weights_digest=weights_digest(state["model"]),
        provenance=state["provenance"],
        probe=state.get("probe", False),
        external=state.get("brought"),
    )


def checkpoint_bytes(model: nn.Module) -> int:
    """Return about how large the checkpoint of a model is, without what resuming its training needs."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in tensors) + RECORD_BYTES * len(tensors) + REST_BYTES


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 over names, shapes, types and values: equal weights in any file have equal digests."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        if tensor.numel():
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
