"""Checkpoints: plain dictionaries, written whole or not at all, read without executing anything."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cache import write_durably
from pipeline.backbone.model import build_model
from pipeline.config import Config, make_config
from pipeline.data.transform import Transform
from pipeline.errors import DataError

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained backbone: model in evaluation mode on the CPU, and what it was made from.

    probe: whether its head is still to be fitted on the features, for want of one for these classes; brought: file and
    notes of a backbone that was not trained by this program.
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
    brought: dict[str, Any] | None = None


def save(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file by the state, durably."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_durably(path, buffer.getvalue())


def read(path: Path) -> dict[str, Any]:
    """The state saved in a file; DataError if it is missing, damaged, foreign or of another format."""
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; make one with `pipeline train-backbone`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{path}: not a readable checkpoint ({reason}); train again with --overwrite") from error
    if not isinstance(state, dict) or not {"format", "model", "config", "transform"} <= state.keys():
        raise DataError(f"{path}: a checkpoint, but not one of `pipeline train-backbone`; give the last.pt of a run")
    if state["format"] != FORMAT:
        raise DataError(
            f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}; train again with --overwrite"
        )
    return state


def load_checkpoint(path: Path) -> Checkpoint:
    """The backbone in a last.pt or best.pt, ready to encode. Raises DataError as `read` does."""
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
        transform=Transform.from_dict(state["transform"]),
        class_names=names,
        counts=np.array(state["counts"]),
        network=state["network"],
        dataset=state["dataset"],
        epoch=state["epoch"],
        complete=state["complete"],
        weights_digest=weights_digest(state["model"]),
        provenance=state["provenance"],
        probe=state.get("probe", False),
        brought=state.get("brought"),
    )


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, types and values: equal weights have equal digests, whatever file they came in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        if tensor.numel():
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
