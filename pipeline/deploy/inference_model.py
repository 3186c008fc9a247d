"""The model that labels images: encoder and head, from an exported folder or straight from a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from torch import Tensor, nn

from pipeline.backbone.build import build_model, classifier, encode
from pipeline.backbone.checkpoint import Checkpoint, load_checkpoint
from pipeline.backbone.weights import read_file
from pipeline.config import BackboneConfig
from pipeline.data.transform import Transform
from pipeline.deploy.onnx import runner
from pipeline.distributed import choose_device
from pipeline.errors import DataError, PipelineError
from pipeline.longtail import class_groups
from pipeline.paths import STAGE1_HEAD
from pipeline.report.study import Backbone, read_study
from pipeline.resources import keep_freed_memory
from pipeline.results.documents import read_export
from pipeline.results.heads import Linear, Scorer, head_problem, scorer_of

RESULTS = ("results.json", "rebalance/results.json", "seed-*/rebalance/results.json")  # of a run
UNCROPPED = ("digits", "cifar10", "cifar100", "npz")  # sources whose images have the network's input size


class EncoderAndHead(nn.Module):
    """uint8 RGB images (B, 3, H, W) → logits (B, C) and features (B, D): normalisation, encoder, head."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, head: Scorer, transform: Transform):
        super().__init__()
        self.network, self.head_arrays = network.eval(), len(head.arrays)
        for name, values in (("mean", transform.mean), ("std", transform.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255)
        for i, array in enumerate(head.arrays):
            self.register_buffer(f"head_{i}", torch.from_numpy(array).float())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = encode(self.network, (images.float() - self.mean) / self.std)
        head = scorer_of([getattr(self, f"head_{i}") for i in range(self.head_arrays)])
        return head.logits(features), features


@dataclass(frozen=True, eq=False)
class InferenceModel:
    """A model that labels images.

    Arguments:
        run: uint8 images (B, 3, H, W) → logits (B, C), features (B, D), all on the CPU.
        stage1: the head before rebalancing, on the same features.
        counts: (C,) usable training images of each class.
    """

    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    stage1: Linear
    transform: Transform
    class_names: tuple[str, ...]
    counts: np.ndarray

    @property
    def groups(self) -> dict[str, str]:
        """Group (many, medium or few) of each class name."""
        members = class_groups(self.counts).items()
        return {self.class_names[c]: group for group, mask in members for c in np.flatnonzero(mask)}


def load_model(path: Path | str, *, device: str = "auto") -> InferenceModel:
    """Return the model in a folder of `pipeline export`, or the first backbone of a run with its selected head.

    Raises: DataError: anything else.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _exported(path, device)
    if not any(any(path.glob(pattern)) for pattern in RESULTS):
        kind = "neither a folder of `pipeline export` nor a rebalanced run" if path.is_dir() else "no such folder"
        raise DataError(f"{path}: {kind}; give one of `pipeline export --out DIR` or `pipeline run`")
    study = read_study(path)
    checkpoint = matching_checkpoint(study.first)
    transform = Transform.from_dict(input_facts(checkpoint), str(checkpoint.path))
    _, head = study.first.head(study.first.selected)
    return InferenceModel(
        _torch_runner(EncoderAndHead(checkpoint.model, head, transform), device),
        Linear(*study.first.store.classifier),
        transform,
        checkpoint.class_names,
        study.counts,
    )


def _exported(path: Path, device: str) -> InferenceModel:
    try:
        config = read_export(path / "config.json")
        transform, weights = (
            Transform.from_dict(config["transform"], str(path / "config.json")),
            path / config["weights"],
        )
        stage1 = load_arrays(path / STAGE1_HEAD)
        start = Linear(stage1["weight"], stage1["bias"])
        heads = {STAGE1_HEAD: start}
        if weights.suffix == ".onnx":
            run = runner(weights, device)
        else:
            network = _network(config, weights)
            layer = classifier(network)
            bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
            head = heads[weights.name] = Linear(layer.weight.detach().numpy(), bias.detach().numpy())
            run = _torch_runner(EncoderAndHead(network, head, transform), device)
        names, counts = tuple(config["class_names"]), np.array(config["counts"])
        for name, linear in heads.items():
            if problem := head_problem(linear, classes=len(names), width=config["num_features"]):
                raise DataError(f"{path / name}: its classifier {problem}; export the run again")
        return InferenceModel(run, start, transform, names, counts)
    except PipelineError as error:
        if str(error).endswith(("export it again", "export the run again")):
            raise
        raise type(error)(f"{error}; export it again") from error
    except Exception as error:  # torch and onnxruntime raise a dozen types for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable model of `pipeline export` ({reason}); export it again") from error


def _network(config: dict[str, Any], weights: Path) -> nn.Module:
    args = dict(config["model_args"])
    width = args.pop("width", 1.0)
    settings = BackboneConfig.model_validate({"model": config["architecture"], "width": width, "model_args": args})
    network = build_model(settings, num_classes=config["num_classes"])
    network.load_state_dict(read_file(weights))
    return network


def _torch_runner(model: EncoderAndHead, device: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    target = choose_device(device)
    if target.type == "cpu":
        keep_freed_memory()
    model = model.to(target)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            logits, features = model(images.to(target))
        return logits.cpu(), features.cpu()

    return run


def matching_checkpoint(backbone: Backbone) -> Checkpoint:
    """Return the checkpoint whose features the store holds; DataError where it is another or there is none."""
    store = backbone.store.path  # one in an object store has its run where its results are
    folder = (store.parent if isinstance(store, Path) else backbone.results_path.parent.parent) / "backbone"
    digest = backbone.store.fingerprint.get("checkpoint")
    digests = {}
    for name in ("last.pt", "best.pt"):
        if (folder / name).is_file():
            checkpoint = load_checkpoint(folder / name)
            if checkpoint.weights_digest == digest:
                if checkpoint.class_names != backbone.store.class_names:
                    raise DataError(f"{folder / name}: names other classes than {store}; train again with --overwrite")
                return checkpoint
            digests[name] = checkpoint.weights_digest[:12]
    if digest is None:
        raise DataError(
            f"{store}: features that no network of this program made, so there is only the head: "
            f"pipeline.rebalanced_head({str(backbone.results_path.parent)!r}).array_logits(features) in Python"
        )
    if not digests:
        raise DataError(f"{folder}: no checkpoint beside the store; copy the run's backbone/last.pt there")
    present = ", ".join(f"{name} has weights {digest}" for name, digest in digests.items())
    raise DataError(
        f"{folder}: the store's features come from weights {str(digest)[:12]}, {present}; "
        f"run `pipeline dump-features --checkpoint {folder / 'last.pt'} --overwrite` and `pipeline rebalance` again"
    )


def input_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the evaluation transform for image files; images that were trained on uncropped are not cropped either."""
    facts = checkpoint.transform.to_dict()
    return facts | {"crop_pct": 1.0} if checkpoint.config.data.source in UNCROPPED else facts
