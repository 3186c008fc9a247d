"""The whole model that labels images: encoder and head, from an exported folder or straight from a run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.backbone.build import build_model, classifier, encode
from pipeline.config import BackboneConfig
from pipeline.data.transform import Transform
from pipeline.deploy.export import STAGE1, input_facts, matching_checkpoint
from pipeline.distributed import choose_device
from pipeline.errors import DataError, PipelineError
from pipeline.longtail import class_groups
from pipeline.report.study import read_study
from pipeline.results.heads import Linear, Scorer, scorer_of

PLACES = ("results.json", "rebalance/results.json", "seed-*/rebalance/results.json")  # of a run's results


class Whole(nn.Module):
    """uint8 images (B, 3, H, W), RGB → logits (B, C) and features (B, D): normalisation, encoder, head."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, head: Scorer, transform: Transform):
        super().__init__()
        self.network, self.head = network.eval(), len(head.arrays)
        for name, values in (("mean", transform.mean), ("std", transform.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255)
        for i, array in enumerate(head.arrays):
            self.register_buffer(f"head_{i}", torch.from_numpy(array).float())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = encode(self.network, (images.float() - self.mean) / self.std)
        return scorer_of([getattr(self, f"head_{i}") for i in range(self.head)]).logits(features), features


@dataclass(frozen=True, eq=False)
class Model:
    """What labels images. run: uint8 images (B, 3, H, W) → logits (B, C), features (B, D), all on the CPU.

    stage1: the head before rebalancing, on the same features; counts (C,): usable training images a class.
    """

    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    stage1: Linear
    transform: Transform
    class_names: tuple[str, ...]
    counts: np.ndarray

    @property
    def groups(self) -> dict[str, str]:
        """many, medium or few of each class name."""
        members = class_groups(self.counts).items()
        return {self.class_names[c]: group for group, mask in members for c in np.flatnonzero(mask)}


def load_model(path: Path | str, *, device: str = "auto") -> Model:
    """The model in a folder of `pipeline export`, or of a run with its selected head; DataError for anything else.

    A run of several backbones gives the first.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _exported(path, device)
    if not any(any(path.glob(place)) for place in PLACES):
        kind = "neither a folder of `pipeline export` nor a rebalanced run" if path.is_dir() else "no such folder"
        raise DataError(f"{path}: {kind}; give one of `pipeline export --out DIR` or `pipeline run`")
    study = read_study(path)
    checkpoint = matching_checkpoint(study.first)
    transform = Transform.from_dict(input_facts(checkpoint))
    _, head = study.first.head(study.first.selected)
    return Model(
        _by_torch(Whole(checkpoint.model, head, transform), device),
        Linear(*study.first.store.classifier),
        transform,
        checkpoint.class_names,
        study.counts,
    )


def _exported(path: Path, device: str) -> Model:
    from safetensors.numpy import load_file as load_arrays

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        transform, weights = Transform.from_dict(config["transform"]), path / config["weights"]
        stage1 = load_arrays(path / STAGE1)
        if weights.suffix == ".onnx":
            from pipeline.deploy.onnx import runner

            run = runner(weights, device)
        else:
            network = _network(config, weights)
            layer = classifier(network)
            bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
            head = Linear(layer.weight.detach().numpy(), bias.detach().numpy())
            run = _by_torch(Whole(network, head, transform), device)
        names, counts = tuple(config["class_names"]), np.array(config["counts"])
        return Model(run, Linear(stage1["weight"], stage1["bias"]), transform, names, counts)
    except PipelineError:
        raise
    except Exception as error:  # torch and onnxruntime raise a dozen types for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable model of `pipeline export` ({reason}); export it again") from error


def _network(config: dict[str, Any], weights: Path) -> nn.Module:
    from safetensors.torch import load_file

    args = dict(config["model_args"])
    width = args.pop("width", 1.0)
    settings = BackboneConfig.model_validate({"model": config["architecture"], "width": width, "model_args": args})
    network = build_model(settings, num_classes=config["num_classes"])
    safe = weights.suffix == ".safetensors"
    network.load_state_dict(load_file(weights) if safe else torch.load(weights, map_location="cpu", weights_only=True))
    return network


def _by_torch(model: Whole, device: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    where = choose_device(device)
    model = model.to(where)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            logits, features = model(images.to(where))
        return logits.cpu(), features.cpu()

    return run
