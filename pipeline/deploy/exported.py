"""The folder of an exported model: its files, the head it carries, and the line of Python that loads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.paths import STAGE1_HEAD
from pipeline.results.head_id import HeadId
from pipeline.text import Shown

WEIGHTS = {"timm": "model.pth", "safetensors": "model.safetensors", "onnx": "model.onnx"}


@dataclass(frozen=True)
class ExportedModel(Shown):
    """A folder of `pipeline export`.

    Arguments:
        weights: the file with the weights or the graph.
        network, model_args, classes: arguments of `timm.create_model`.
        head: method, loss, lam and seed of the head, and of how many it is one.
        onnx: for --to onnx, inputs and outputs of the graph, and how far onnxruntime's logits were from PyTorch's.
    """

    out: Path
    weights: Path
    network: str
    model_args: dict[str, Any]
    classes: int
    head: dict[str, Any]
    onnx: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        facts = {"network": self.network, "model_args": self.model_args, "classes": self.classes, "head": self.head}
        facts |= {} if self.onnx is None else {"onnx": self.onnx}
        facts |= {"notes": list(self.notes)} if self.notes else {}
        return {"out": str(self.out), "weights": str(self.weights), **facts}

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.network} with the head {HeadId.of_row(self.head)}", f"load it: {self.python}"]
        if self.onnx:
            height, width = self.onnx["input"]["shape"][2:]
            check = self.onnx["checked"]
            lines += [
                f"it takes: uint8 RGB images, batch × 3 × {height} × {width}, 0 … 255; the normalisation is inside",
                f"checked: onnxruntime {self.onnx['versions']['onnxruntime']} gives PyTorch's logits; at most "
                f"{check['largest_difference']:.0e} apart, where the largest is {check['largest_logit']:.1f}",
            ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"label images: pipeline predict {self.out} IMAGES"])

    @property
    def python(self) -> str:
        """One line of Python that makes the model."""
        if self.onnx:
            return f"import onnxruntime; session = onnxruntime.InferenceSession({str(self.weights)!r})"
        return create_call(self.network, self.model_args, self.classes, str(self.weights))

    @property
    def needs_package(self) -> bool:
        """True where timm alone does not know the network, because this package defines it."""
        return self.network.startswith("cifar_")


def create_call(network: str, model_args: dict[str, Any], classes: int, weights: str) -> str:
    """Return the Python line that makes the model with timm; the CIFAR networks come from this package."""
    registration = "import pipeline.backbone.cifar; " if network.startswith("cifar_") else ""
    extra = "".join(f", {key}={value!r}" for key, value in model_args.items())
    call = f"timm.create_model({network!r}, num_classes={classes}{extra}, checkpoint_path={weights!r})"
    return f"import timm; {registration}model = {call}"


def is_exported(folder: Path) -> bool:
    """Return true for a folder of `pipeline export`, complete or not; timm's folders have a config.json too."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / STAGE1_HEAD).is_file()  # left by an export that was ended
    return isinstance(config, dict) and "stage1_head" in config
