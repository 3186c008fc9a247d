"""The whole model with a rebalanced head, as a folder that timm, onnxruntime, this program and people can read."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cache import write_durably
from pipeline.errors import ConfigError, DataError
from pipeline.provenance import provenance
from pipeline.report.sections import Line, summary
from pipeline.report.study import Backbone, Study, read_study
from pipeline.results.head_id import HeadId
from pipeline.results.heads import Linear, Scorer
from pipeline.text import Shown

if TYPE_CHECKING:
    from pipeline.backbone.checkpoint import Checkpoint

FORMAT = 1
ARRAYS = ("digits", "cifar10", "cifar100", "npz")  # sources whose images are the network's input whole, never cropped
WEIGHTS = {"timm": "model.pth", "safetensors": "model.safetensors", "onnx": "model.onnx"}
STAGE1 = "stage1_head.safetensors"


@dataclass(frozen=True)
class Exported(Shown):
    """An exported model: its folder, the file with its weights, and which head it carries.

    onnx: of --to onnx, what the graph takes and gives, and how far onnxruntime's logits were from PyTorch's.
    """

    out: Path
    weights: Path
    network: str
    model_args: dict[str, Any]
    classes: int
    head: dict[str, Any]
    onnx: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        facts = {"network": self.network, "model_args": self.model_args, "classes": self.classes, "head": self.head}
        facts |= {} if self.onnx is None else {"onnx": self.onnx}
        return {"out": str(self.out), "weights": str(self.weights), **facts}

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.network} with the head {HeadId.of_row(self.head)}", f"load it: {self.python}"]
        if self.onnx:
            height, width = self.onnx["input"]["shape"][2:]
            found = self.onnx["checked"]
            lines += [
                f"it takes: uint8 RGB images, batch × 3 × {height} × {width}, 0 … 255; the normalisation is inside",
                f"checked: onnxruntime {self.onnx['versions']['onnxruntime']} gives PyTorch's logits; at most "
                f"{found['largest_difference']:.0e} apart, where the largest is {found['largest_logit']:.1f}",
            ]
        return "\n".join([*lines, f"label images: pipeline predict {self.out} IMAGES"])

    @property
    def python(self) -> str:
        """One line of Python that makes the model."""
        if self.onnx:
            return f"import onnxruntime; session = onnxruntime.InferenceSession({str(self.weights)!r})"
        return create_call(self.network, self.model_args, self.classes, str(self.weights))


def export_model(
    run: Path | str,
    *,
    to: Literal["timm", "safetensors", "onnx"] = "timm",
    out: Path | str,
    lam: float | None = None,
    method: str | None = None,
) -> Exported:
    """Writes the model, config.json, the head stage 2 started from (for comparison) and a model card into the folder `out`.

    run: as for write_report; of several backbones the first is taken. lam, method: the head of this λ or method instead of
    the selected one; of a method with several λ that which validation prefers. Of several batch orders the first seed's
    head is taken: the mean of several heads was never measured.
    Raises DataError where run, head or checkpoint are missing or do not belong together, ConfigError for an `out` that
    holds something else and for ONNX without its packages, PipelineError where torch cannot translate the network to ONNX.
    """
    out = Path(out)
    study, kind, checkpoint = settled(Path(run), to=to, out=out, lam=lam, method=method)
    backbone = study.first
    what, scorer = backbone.head(kind)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)  # it is written last: a folder with it is whole
    for name in (*WEIGHTS.values(), "model.onnx.data"):
        (out / name).unlink(missing_ok=True)  # whoever loads the folder must not find what it held before
    head = {
        **{key: what.get(key) for key in ("method", "loss", "lam", "seed")},
        "backbone": backbone.name if len(study.backbones) > 1 else None,
        "of_seeds": sum(kind.matches(other) for other, _ in backbone.scorers),
        "chosen_on": study.chosen_on if lam is None and (method is None or kind.lam is not None) else None,
    }
    weights, facts = out / WEIGHTS[to], _facts(checkpoint, study.counts, head)
    if to == "onnx":
        facts["onnx"] = _write_graph(weights, checkpoint, scorer, facts)
    else:
        write_durably(weights, _weights(checkpoint, carried(scorer, checkpoint, kind), to))
    write_durably(out / STAGE1, _stage1(backbone))
    exported = Exported(
        out, weights, facts["architecture"], facts["model_args"], facts["num_classes"], head, facts.get("onnx")
    )
    config = facts | {
        "weights": weights.name,
        "stage1_head": STAGE1,
        "results": [line.to_dict() for line in main_table(study, head)],
        "provenance": provenance(
            command="export",
            made_from={"checkpoint": checkpoint.weights_digest, "store": backbone.store.digest},
            dataset=checkpoint.dataset.get("fingerprint"),
        ),
    }
    from pipeline.deploy.card import model_card

    write_durably(out / "README.md", model_card(study, exported, config))
    write_durably(out / "config.json", json.dumps(config, indent=1, ensure_ascii=False))
    return exported


def settled(
    run: Path, *, to: str, out: Path, lam: float | None, method: str | None
) -> "tuple[Study, HeadId, Checkpoint]":
    """The run, the heads that are meant and the network they belong to; raises all that can be known before writing."""
    if out.exists() and not is_exported(out) and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty and holds no exported model; take another --out")
    if to == "onnx":
        from pipeline.deploy.onnx import check_packages

        check_packages()
    study = read_study(run)
    kind = wanted_kind(study, lam=lam, method=method)
    _, scorer = study.first.head(kind)
    checkpoint = matching_checkpoint(study.first)
    if to != "onnx":
        carried(scorer, checkpoint, kind)
    return study, kind, checkpoint


def rebalanced_head(run: Path | str, *, lam: float | None = None, method: str | None = None) -> Scorer:
    """The head that stage 2 selected, or that of a λ or method, to be used on features (M, D) wherever they come from.

    run: as for `export_model`, also the results of a store of one's own features. Returns a head whose
    `array_logits(features)` are the logits (M, C) of an array, `logits(features)` those of a torch tensor; a linear one has
    `weight` (C, D) and `bias` (C,). Of several backbones or batch orders the first is taken. Raises DataError where results
    or the head are missing.
    """
    study = read_study(Path(run))
    _, scorer = study.first.head(wanted_kind(study, lam=lam, method=method))
    return scorer


def wanted_kind(study: Study, *, lam: float | None, method: str | None) -> HeadId:
    """The heads that are meant: the selected ones, or those of a λ or method; DataError naming the λ there are."""
    selected = study.first.selected
    if lam is None and method in (None, selected.method):
        return selected
    name = method or (selected.method if selected.lam is not None else "iwb")
    own = [what for what, _ in study.first.scorers if HeadId.of_row(what).method == name]
    losses = {what.get("loss") for what in own}
    loss = selected.loss if selected.loss in losses else next(iter(sorted(losses, key=str)), None)
    lams = sorted({what["lam"] for what in own if what.get("lam") is not None})
    if lam is not None:
        if own and not lams:
            raise ConfigError(f"--lam {lam:g}: {name} has no λ; leave it out")
        return HeadId(
            name, loss, next((known for known in lams if f"{known:g}" == f"{lam:g}"), lam)
        )  # as tables show it
    tuned = study.first.tuned_lam(name)
    if tuned is None and lams:  # λ = 0 is a reference that nothing was chosen from
        candidates = [HeadId(name, loss, known) for known in lams if known] or [HeadId(name, loss, lams[0])]
        return max(candidates, key=lambda kind: _validated(study, kind))
    return HeadId(name, loss, tuned)


def _validated(study: Study, kind: HeadId) -> float:
    found = study.spread(kind, study.choosing_split, "all")
    return -1.0 if found is None or found.mean is None else found.mean


def create_call(network: str, model_args: dict[str, Any], classes: int, weights: str) -> str:
    """The Python line that makes the model with timm; the CIFAR networks come from this package."""
    own = "import pipeline.backbone.cifar; " if network.startswith("cifar_") else ""
    extra = "".join(f", {key}={value!r}" for key, value in model_args.items())
    call = f"timm.create_model({network!r}, num_classes={classes}{extra}, checkpoint_path={weights!r})"
    return f"import timm; {own}model = {call}"


def is_exported(folder: Path) -> bool:
    """Whether a folder is one of `pipeline export`, whole or not; others may have a config.json too."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / STAGE1).is_file()  # left by an export that was ended
    return isinstance(found, dict) and "stage1_head" in found


def matching_checkpoint(backbone: Backbone) -> "Checkpoint":
    """The checkpoint whose features the store holds; DataError where it is another."""
    from pipeline.backbone.checkpoint import load_checkpoint

    store = backbone.store.path  # one in an object store has its run where its results are
    folder = (store.parent if isinstance(store, Path) else backbone.results_path.parent.parent) / "backbone"
    wanted = backbone.store.fingerprint.get("checkpoint")
    digests = {}
    for name in ("last.pt", "best.pt"):
        if (folder / name).is_file():
            checkpoint = load_checkpoint(folder / name)
            if checkpoint.weights_digest == wanted:
                return checkpoint
            digests[name] = checkpoint.weights_digest[:12]
    if wanted is None:
        raise DataError(
            f"{store}: features that no network of this program made, so there is only the head: "
            f"pipeline.rebalanced_head({str(backbone.results_path.parent)!r}).array_logits(features) in Python"
        )
    if not digests:
        raise DataError(f"{folder}: no checkpoint beside the store; copy the run's backbone/last.pt there")
    found = ", ".join(f"{name} has weights {digest}" for name, digest in digests.items())
    raise DataError(
        f"{folder}: the store's features come from weights {str(wanted)[:12]}, {found}; "
        f"run `pipeline dump-features --checkpoint {folder / 'last.pt'} --overwrite` and `pipeline rebalance` again"
    )


def carried(scorer: Scorer, checkpoint: "Checkpoint", kind: HeadId) -> Linear:
    """The head as the network's own classifier can carry it; DataError where it cannot and only an ONNX graph does."""
    from pipeline.backbone.build import classifier

    instead = "--to onnx carries it whole"
    if not isinstance(scorer, Linear):
        raise DataError(
            f"{kind}: is no linear layer (its weight depends on the image), so timm's network cannot carry it; {instead}"
        )
    if classifier(checkpoint.model).bias is None and scorer.bias.any():
        raise DataError(
            f"{checkpoint.path}: the network's classifier has no bias, so it cannot carry the rebalanced one; {instead}"
        )
    return scorer


def _weights(checkpoint: "Checkpoint", head: Linear, to: str) -> bytes:
    """The file of the model with the head in place of the stage-1 classifier."""
    import torch

    from pipeline.backbone.build import classifier

    layer = classifier(checkpoint.model)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head.weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(head.bias))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    if to == "safetensors":
        from safetensors.torch import save

        return save(state, metadata={"format": "pt"})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write_graph(path: Path, checkpoint: "Checkpoint", scorer: Scorer, facts: dict[str, Any]) -> dict[str, Any]:
    from pipeline.data.transform import Transform
    from pipeline.deploy.inference_model import Whole
    from pipeline.deploy.onnx import write_onnx

    transform = Transform.from_dict(facts["transform"])
    inside = {key: facts[key] for key in ("class_names", "transform", "head")}
    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in inside.items()}
    model = Whole(checkpoint.model, scorer, transform)
    return write_onnx(path, model, network=facts["architecture"], size=transform.size, metadata=metadata)


def _stage1(backbone: Backbone) -> bytes:
    from safetensors.numpy import save

    weight, bias = backbone.store.classifier
    return save({"weight": weight, "bias": bias})


def _facts(checkpoint: "Checkpoint", counts: np.ndarray, head: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the model: enough to build it, feed it and name its classes.

    counts (C,): usable training images, as the table has them; a checkpoint counts unreadable ones too.
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


def input_facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    """The evaluation transform for image files: what was trained on whole arrays is not cropped in the middle either."""
    facts = checkpoint.transform.to_dict()
    return facts | {"crop_pct": 1.0} if checkpoint.config.data.source in ARRAYS else facts


def main_table(study: Study, head: dict[str, Any]) -> list[Line]:
    """The report's table, with the exported head where it is not the selected one."""
    kind = HeadId.of_row(head)
    return summary(study, also=None if kind == study.first.selected else kind)
