"""The complete model with a rebalanced head, as a folder that timm, onnxruntime, this program and people can read."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from cache import refuse_unwritable, write_durably
from pipeline.backbone.build import classifier, network_facts
from pipeline.backbone.checkpoint import Checkpoint, checkpoint_bytes
from pipeline.data.transform import Transform
from pipeline.deploy.card import main_table, model_card
from pipeline.deploy.exported import WEIGHTS, ExportedModel, is_exported
from pipeline.deploy.inference_model import EncoderAndHead, input_facts, matching_checkpoint
from pipeline.deploy.onnx import check_packages, write_onnx
from pipeline.deploy.run_head import requested_head
from pipeline.errors import ConfigError, DataError
from pipeline.paths import STAGE1_HEAD
from pipeline.prepared import Prepared, Write, replaced_or_new
from pipeline.provenance import shared_provenance
from pipeline.report.outdated import PAGE, is_outdated
from pipeline.report.study import Backbone, Study, read_study
from pipeline.results.files import header, write_artefact
from pipeline.results.head_id import HeadId
from pipeline.results.heads import Linear, Scorer

FORMAT = 1
Target = Literal["timm", "safetensors", "onnx"]


@dataclass(frozen=True, eq=False)
class PreparedExport:
    """An export that has passed every check; `write` executes it.

    Arguments:
        head: method, loss, λ and seed of the head, its backbone, of how many batch orders it is one, and the split it was
            chosen on.
    """

    run: Path
    to: Target
    out: Path
    study: Study
    head_id: HeadId
    head: dict[str, Any]
    scorer: Scorer
    checkpoint: Checkpoint

    @property
    def notes(self) -> tuple[str, ...]:
        """The reasons why a person may have expected another head."""
        if not is_outdated(self.run):
            return ()
        older = f"{self.run / PAGE} is older than the results, which select {self.study.first.selected}"
        return (f"{older}; draw it again: pipeline report {self.run}",)

    @property
    def description(self) -> Prepared:
        checkpoint, head = self.checkpoint, {"method": self.head_id.method, "lam": self.head_id.lam}
        network = network_facts(checkpoint.config.backbone, checkpoint.model)
        model = f"{network['network']}, {network['parameters']:,} parameters, {len(checkpoint.class_names):,} classes"
        return Prepared(
            "export",
            {},
            {
                "model": f"{model}; weights of {checkpoint.path}",
                "head": f"{self.head_id} of {self.study.first.results_path}",
            },
            {"run": str(self.run), "to": self.to, "network": network, "head": head},
            (Write(self.out, checkpoint_bytes(checkpoint.model), replaced_or_new(self.out)),),
            self.notes,
        )

    def write(self) -> ExportedModel:
        """Write weights, the head that stage 2 started from, model card and config.json, which makes the folder valid."""
        out, backbone = self.out, self.study.first
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
        for name in (*WEIGHTS.values(), "model.onnx.data"):
            (out / name).unlink(missing_ok=True)  # whoever loads the folder must not find the weights of another export
        weights, facts = out / WEIGHTS[self.to], _facts(self.checkpoint, self.study.counts, self.head)
        if self.to == "onnx":
            facts["onnx"] = _write_graph(weights, self.checkpoint, self.scorer, facts)
        else:
            layer = as_linear(self.scorer, self.checkpoint, self.head_id)
            write_durably(weights, _weights(self.checkpoint, layer, self.to))
        write_durably(out / STAGE1_HEAD, _stage1(backbone))
        exported = ExportedModel(
            out, weights, facts["architecture"], facts["model_args"], facts["num_classes"], self.head, facts.get("onnx"),
            self.notes,
        )  # fmt: skip
        config = facts | {
            "weights": weights.name,
            "stage1_head": STAGE1_HEAD,
            "results": [line.to_dict() for line in main_table(self.study, self.head)],
            "provenance": shared_provenance(
                command="export",
                made_from={"checkpoint": self.checkpoint.weights_digest, "store": backbone.store.digest},
                dataset=self.checkpoint.dataset.get("fingerprint"),
            ),
        }
        write_durably(out / "README.md", model_card(self.study, exported, config))
        write_artefact(out / "config.json", "export", config)
        return exported


def prepare_export(
    run: Path | str, *, to: Target = "timm", out: Path | str, lam: float | None = None, method: str | None = None
) -> PreparedExport:
    """Return the export that `export_model` would execute, checked; nothing is written.

    Arguments and raises: those of `export_model`.
    """
    run, out = Path(run), Path(out)
    if out.exists() and not is_exported(out) and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty and holds no exported model; take another --out")
    if to == "onnx":
        check_packages()
    study = read_study(run)
    head_id = requested_head(study, lam=lam, method=method)
    row, scorer = study.first.head(head_id)
    checkpoint = matching_checkpoint(study.first)
    if to != "onnx":
        as_linear(scorer, checkpoint, head_id)
    refuse_unwritable(out)
    head = {
        **{key: row.get(key) for key in ("method", "loss", "lam", "seed")},
        "backbone": study.first.name if len(study.backbones) > 1 else None,
        "of_seeds": sum(head_id.matches(entry) for entry, _ in study.first.scorers),
        "chosen_on": study.chosen_on if lam is None and (method is None or head_id.lam is not None) else None,
    }
    return PreparedExport(run, to, out, study, head_id, head, scorer, checkpoint)


def export_model(
    run: Path | str, *, to: Target = "timm", out: Path | str, lam: float | None = None, method: str | None = None
) -> ExportedModel:
    """Write the model, config.json, the head stage 2 started from (for comparison) and a model card into the folder `out`.

    Arguments:
        run: as for `write_report`; of several backbones the first is taken.
        lam, method: the head of this λ or method instead of the selected one; of a method with several λ, the one that
            validation prefers. Of several batch orders the first seed's head is taken, as no mean of heads was measured.
    Raises:
        DataError: run, head or checkpoint are missing or do not belong together.
        ConfigError: an `out` that holds something else, or ONNX without its packages.
        PipelineError: torch cannot translate the network to ONNX.
    """
    return prepare_export(run, to=to, out=out, lam=lam, method=method).write()


def as_linear(scorer: Scorer, checkpoint: Checkpoint, head_id: HeadId) -> Linear:
    """Return the head as the network's own classifier can hold it; DataError where only an ONNX graph can."""
    instead = "--to onnx carries it whole"
    if not isinstance(scorer, Linear):
        raise DataError(
            f"{head_id}: is no linear layer (its weight depends on the image), so timm's network cannot carry it; {instead}"
        )
    if classifier(checkpoint.model).bias is None and scorer.bias.any():
        raise DataError(
            f"{checkpoint.path}: the network's classifier has no bias, so it cannot carry the rebalanced one; {instead}"
        )
    return scorer


def _weights(checkpoint: Checkpoint, head: Linear, to: str) -> bytes:
    """Return the file of the model with the head in place of the stage-1 classifier."""
    layer = classifier(checkpoint.model)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head.weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(head.bias))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    if to == "safetensors":
        return save_tensors(state, metadata={"format": "pt", "header": json.dumps(header("weights", {}))})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write_graph(path: Path, checkpoint: Checkpoint, scorer: Scorer, facts: dict[str, Any]) -> dict[str, Any]:
    transform = Transform.from_dict(facts["transform"], "config.json")
    entries = {"header": header("graph", {"network": facts["architecture"]})}
    entries |= {key: facts[key] for key in ("class_names", "transform", "head")}
    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in entries.items()}
    model = EncoderAndHead(checkpoint.model, scorer, transform)
    return write_onnx(path, model, network=facts["architecture"], size=transform.size, metadata=metadata)


def _stage1(backbone: Backbone) -> bytes:
    weight, bias = backbone.store.classifier
    summary = {"weight": f"{weight.shape[0]} classes × {weight.shape[1]} features"}
    return save_arrays({"weight": weight, "bias": bias}, {"header": json.dumps(header("stage 1 head", summary))})


def _facts(checkpoint: Checkpoint, counts: np.ndarray, head: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of config.json that suffice to build the model, feed it and name its classes.

    Arguments:
        counts: (C,) usable training images, as in the table; a checkpoint counts unreadable ones too.
    """
    transform, settings = input_facts(checkpoint), checkpoint.config.backbone
    return {
        "format": FORMAT,
        "architecture": settings.model,
        "model_args": ({"width": settings.width} if settings.width != 1 else {}) | (settings.model_args or {}),
        "num_classes": len(checkpoint.class_names),
        "num_features": checkpoint.network["feature_width"],
        "parameters": checkpoint.network["parameters"],
        "pretrained": settings.pretrained,
        "head": head,
        "class_names": list(checkpoint.class_names),
        "counts": counts.tolist(),
        "transform": transform,
        "pretrained_cfg": {  # timm's names for the same
            "input_size": [3, *transform["size"]],
            "mean": transform["mean"],
            "std": transform["std"],
            "interpolation": transform["interpolation"],
            "crop_pct": transform["crop_pct"],
        },
        "label_names": list(checkpoint.class_names),
    }
