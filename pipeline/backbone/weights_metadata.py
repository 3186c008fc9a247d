"""The facts that stand beside weights: network, input, class names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RESERVED_MODEL_ARGS
from pipeline.errors import DataError


@dataclass(frozen=True)
class WeightsMetadata:
    """The facts that stand beside weights, or in a checkpoint of this program; None or empty where there are none.

    Arguments:
        origin: the file that states them.
        input: mean, std, input_size, … as in timm's pretrained_cfg.
        weights: the name of the file of the weights.
    """

    origin: str = ""
    model: str | None = None
    model_args: Mapping[str, Any] | None = None
    width: float = 1.0
    input: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] = ()
    weights: str | None = None


def read_metadata(path: Path) -> WeightsMetadata:
    """Return the facts in timm's config.json beside weights, or in a folder of weights; empty where there is none.

    Raises: DataError: names the field that makes no sense.
    """
    origin = (path if path.is_dir() else path.parent) / "config.json"
    if not origin.is_file():
        return WeightsMetadata()
    try:
        tree = json.loads(origin.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{origin}: not readable JSON ({error}); mend it, or move it away and name the network"
        ) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("architecture"), str):
        return WeightsMetadata()  # another program's
    saved_args = tree.get("model_args") or {}
    input_facts = dict(tree.get("pretrained_cfg") or {})
    names = tree.get("class_names") or tree.get("label_names") or input_facts.get("label_names") or ()
    for key, shape in (("mean", 3), ("std", 3), ("input_size", 3)):
        value = input_facts.get(key)
        valid = (
            isinstance(value, list | tuple) and len(value) == shape and all(isinstance(v, int | float) for v in value)
        )
        if value is not None and not valid:
            raise DataError(f"{origin}: pretrained_cfg.{key} is {value!r}, expected {shape} numbers")
    if not isinstance(saved_args, dict) or not isinstance(names, list | tuple):
        raise DataError(f"{origin}: model_args has to be a mapping and class names a list")
    model_args = {key: value for key, value in saved_args.items() if key not in RESERVED_MODEL_ARGS}
    return WeightsMetadata(
        origin=str(origin),
        model=tree["architecture"],
        model_args=model_args or None,
        width=float(saved_args.get("width", 1.0)),
        input=input_facts or None,
        class_names=tuple(map(str, names)),
        weights=tree.get("weights"),
    )


def own_metadata(state: Mapping[str, Any], file: Path) -> WeightsMetadata:
    """Return the facts in a checkpoint of `pipeline train-backbone`."""
    backbone, transform = state["config"]["backbone"], state["transform"]
    input_facts = {key: transform[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    return WeightsMetadata(
        origin=str(file),
        model=backbone["model"],
        model_args=backbone.get("model_args"),
        width=backbone["width"],
        input=input_facts | {"input_size": (3, *transform["size"])},
        class_names=tuple(state["class_names"]),
    )
