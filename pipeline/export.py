"""The whole model with a rebalanced head, as a folder that timm, this program and people can read."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache import write_durably
from pipeline.errors import ConfigError, DataError
from pipeline.metrics import class_groups
from pipeline.provenance import provenance
from pipeline.report.sections import Line, summary
from pipeline.report.source import BOUNDS, SPLITS, Backbone, Kind, Study, read_study
from pipeline.shown import Shown

if TYPE_CHECKING:
    from pipeline.backbone.checkpoint import Checkpoint

FORMAT = 1
ARRAYS = ("digits", "cifar10", "cifar100", "npz")  # sources whose images are the network's input whole, never cropped
WEIGHTS = {"timm": "model.pth", "safetensors": "model.safetensors"}
STAGE1 = "stage1_head.safetensors"


@dataclass(frozen=True)
class Exported(Shown):
    """An exported model: its folder, the file timm loads, and which head it carries."""

    out: Path
    weights: Path
    network: str
    model_args: dict[str, Any]
    classes: int
    head: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        facts = {"network": self.network, "model_args": self.model_args, "classes": self.classes, "head": self.head}
        return {"out": str(self.out), "weights": str(self.weights), **facts}

    def __str__(self) -> str:
        return f"{self.out}: {self.network} with the head {_head_text(self.head)}\nload it: {self.python}"

    @property
    def python(self) -> str:
        """One line of Python that makes the model."""
        return create_call(self.network, self.model_args, self.classes, str(self.weights))


def export_model(
    run: Path,
    *,
    to: Literal["timm", "safetensors"] = "timm",
    out: Path,
    lam: float | None = None,
    method: str | None = None,
) -> Exported:
    """Writes model weights, config.json, the head stage 2 started from (for comparison) and a model card into the folder `out`.

    run: as for write_report; of several backbones the first is taken. lam, method: the head of this λ or method instead of
    the selected one. Of several batch orders the first seed's head is taken: the mean of several heads was never measured.
    Raises DataError where run, head or checkpoint are missing or do not belong together, ConfigError for an `out` that
    holds something else.
    """
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty and holds no exported model; take another --out")
    study = read_study(run)
    backbone = study.first
    kind = backbone.selected
    if lam is not None:
        kind = Kind("iwb", kind.loss, lam)
    elif method is not None:
        kind = Kind(method, None, None)
    index = backbone.head_number(kind)
    heads, weight, bias = backbone.heads
    checkpoint = matching_checkpoint(backbone)
    settings = checkpoint.config.backbone
    model_args = ({"width": settings.width} if settings.width != 1 else {}) | (settings.model_args or {})
    head = {
        **{key: heads[index].get(key) for key in ("method", "loss", "lam", "seed")},
        "backbone": backbone.name if len(study.backbones) > 1 else None,
        "of_seeds": sum(kind.matches(head) for head in heads),
        "chosen_on": study.chosen_on if lam is None and method is None else None,
    }
    exported = Exported(
        out, out / WEIGHTS[to], checkpoint.config.backbone.model, model_args, len(checkpoint.class_names), head
    )
    (out / "config.json").unlink(missing_ok=True)  # it is written last: a folder with it is whole
    write_durably(exported.weights, _weights(checkpoint, weight[index], bias[index], to))
    write_durably(out / STAGE1, _stage1(backbone))
    config = _config(checkpoint, exported, study)
    write_durably(out / "README.md", model_card(study, exported, config))
    write_durably(out / "config.json", json.dumps(config, indent=1, ensure_ascii=False))
    return exported


def create_call(network: str, model_args: dict[str, Any], classes: int, weights: str) -> str:
    """The Python line that makes the model with timm; the CIFAR networks come from this package."""
    own = "import pipeline.backbone.cifar; " if network.startswith("cifar_") else ""
    extra = "".join(f", {key}={value!r}" for key, value in model_args.items())
    call = f"timm.create_model({network!r}, num_classes={classes}{extra}, checkpoint_path={weights!r})"
    return f"import timm; {own}model = {call}"


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
    if not digests:
        raise DataError(f"{folder}: no checkpoint beside the store; copy the run's backbone/last.pt there")
    found = ", ".join(f"{name} has weights {digest}" for name, digest in digests.items())
    raise DataError(
        f"{folder}: the store's features come from weights {str(wanted)[:12]}, {found}; "
        f"run `pipeline dump-features --checkpoint {folder / 'last.pt'} --overwrite` and `pipeline rebalance` again"
    )


def _weights(checkpoint: "Checkpoint", weight: Any, bias: Any, to: str) -> bytes:
    """The file of the model with the head in place of the stage-1 classifier."""
    import torch

    from pipeline.backbone.model import classifier

    layer = classifier(checkpoint.model)
    if layer.bias is None:
        raise DataError(
            f"{checkpoint.path}: the network's classifier has no bias, so it cannot carry the rebalanced head"
        )
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    if to == "safetensors":
        from safetensors.torch import save

        return save(state, metadata={"format": "pt"})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _stage1(backbone: Backbone) -> bytes:
    from safetensors.numpy import save

    weight, bias = backbone.store.classifier
    return save({"weight": weight, "bias": bias})


def _config(checkpoint: "Checkpoint", exported: Exported, study: Study) -> dict[str, Any]:
    """What config.json says: enough to build the model, feed it, name its classes and know where it comes from."""
    transform = input_facts(checkpoint)
    return {
        "format": FORMAT,
        "architecture": exported.network,
        "model_args": exported.model_args,
        "num_classes": exported.classes,
        "num_features": checkpoint.network["feature_width"],
        "parameters": checkpoint.network["parameters"],
        "weights": exported.weights.name,
        "stage1_head": STAGE1,
        "head": exported.head,
        "class_names": list(checkpoint.class_names),
        "counts": checkpoint.counts.tolist(),
        "transform": transform,
        "pretrained_cfg": {  # timm's names for the same
            "input_size": [3, *transform["size"]],
            "mean": transform["mean"],
            "std": transform["std"],
            "interpolation": transform["interpolation"],
            "crop_pct": transform["crop_pct"],
        },
        "results": [line.to_dict() for line in _table(study, exported.head)],
        "provenance": provenance(
            command="export",
            made_from={"checkpoint": checkpoint.weights_digest, "store": study.first.store.digest},
            dataset=checkpoint.dataset.get("fingerprint"),
        ),
    }


def input_facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    """The evaluation transform for image files: what was trained on whole arrays is not cropped in the middle either."""
    facts = checkpoint.transform.to_dict()
    return facts | {"crop_pct": 1.0} if checkpoint.config.data.source in ARRAYS else facts


def model_card(study: Study, exported: Exported, config: dict[str, Any]) -> str:
    """README.md of the exported folder."""
    head, counts, names, transform = exported.head, study.counts, config["class_names"], config["transform"]
    columns = ("many", "medium", "few", "all", "ece")
    table = [f"| {line.name} | {' | '.join(str(line.cells[c]) for c in columns)} |" for line in _table(study, head)]
    groups = ", ".join(f"{int(m.sum())} {g} ({BOUNDS[g]})" for g, m in class_groups(counts).items())
    shown = ", ".join(names[:20]) + (f" … ({len(names)} in config.json)" if len(names) > 20 else "")
    chosen = f"λ was chosen on {SPLITS[head['chosen_on']]}." if head["chosen_on"] else "λ was given, not chosen."
    (height, width), folder = transform["size"], exported.out.resolve().name
    return f"""# {study.folder.resolve().name}: {exported.network}, {exported.classes} classes, rebalanced

An image classifier trained on unbalanced classes ({counts.sum():,} images, {counts.max():,} … {counts.min():,} a class),
its linear head re-balanced with {_head_text(head)}.
{config["parameters"]:,} parameters, {config["num_features"]}-d features.

```python
{create_call(exported.network, exported.model_args, exported.classes, f"{folder}/{exported.weights.name}")}
```

Input: RGB, {height} × {width}, values in 0…1 with mean {transform["mean"]} and standard deviation {transform["std"]}
taken out. Or without Python: `pipeline predict {folder} IMAGES`.

## Accuracy

| head | many | medium | few | all | ECE |
|---|---|---|---|---|---|
{chr(10).join(table)}

In %, on the test split, which selected nothing; a group's accuracy is the mean over its classes: {groups} training images.
± is one standard deviation over {study.repeated}. {chosen if head["lam"] is not None else ""}

The table's numbers are means; this folder holds one head of them: {_one_head(head)}.

## Data

{exported.classes} classes: {shown}.
Training images per class are in config.json (`counts`); the data set's fingerprint is
`{config["provenance"]["dataset"]}`.

## Limits

- It knows these classes only and always answers with one of them.
{_weakest(study, head, names)}\
- Rebalancing trades accuracy on large classes for small ones. Where the images to be classified are as unbalanced as
  the training set, the head before rebalancing may be the better one: `pipeline predict --compare` shows both.
- Probabilities are softmax outputs, as well calibrated as ECE says.
"""


def _table(study: Study, head: dict[str, Any]) -> list[Line]:
    """The report's table, with the exported head where it is not the selected one."""
    kind = Kind(head["method"], head["loss"], head["lam"])
    return summary(study, also=None if kind == study.first.selected else kind)


def _weakest(study: Study, head: dict[str, Any], names: list[str]) -> str:
    """A line on the five classes that are recognised worst."""
    own = study.first.class_accuracy(Kind(head["method"], head["loss"], head["lam"]), "test")
    if own is None:
        return ""
    known = sorted((float(accuracy), c) for c, accuracy in enumerate(own) if accuracy == accuracy)[:5]
    listed = ", ".join(f"{names[c]} {accuracy:.0f} % ({study.counts[c]} training images)" for accuracy, c in known)
    return f"- Weakest classes on test: {listed}.\n"


def _one_head(head: dict[str, Any]) -> str:
    seed = f"batch order {head['seed']} of {head['of_seeds']}" if head["of_seeds"] > 1 else "the only one"
    return seed + (f", backbone {head['backbone']}" if head["backbone"] else "")


def _head_text(head: dict[str, Any]) -> str:
    loss = {"cb": "class-balanced loss", "ce": "cross-entropy"}.get(head["loss"] or "", head["loss"])
    name = "inverse weight-balancing" if head["method"] == "iwb" else head["method"]
    lam = f", λ = {head['lam']:g}" if head["lam"] is not None else ""
    return f"{name} ({loss}{lam})" if loss and loss != name else f"{name}{lam}"
