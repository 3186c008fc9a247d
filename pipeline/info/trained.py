"""Description of networks: checkpoints, trainings, weights from elsewhere, exported models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.info.artefact import Artefact, Facts, read_json
from pipeline.method_names import PROBE
from pipeline.results.documents import read_export
from pipeline.results.summary import class_facts, export_summary
from pipeline.results.tables import network_text

EXTERNAL_BACKBONE = "backbone brought along"
NAMES = ("last.pt", "best.pt", "previous.pt")  # what a training calls its own
NAMED = {"train": "training", "val": "validation"}


def checkpoint(path: Path) -> Artefact:
    """A checkpoint of a training here, else of anybody's network."""
    from pipeline.backbone.external_checkpoint import OWN_KEYS
    from pipeline.backbone.weights import find_tensors, read_file, weights_file
    from pipeline.backbone.weights_metadata import read_metadata

    file = weights_file(path, read_metadata(path).weights if path.is_dir() else None)
    if file.name in NAMES and not path.is_dir():
        return own_checkpoint(file)
    content = read_file(file)
    if isinstance(content, Mapping) and content.keys() >= OWN_KEYS:
        return own_checkpoint(file)
    tensor_tree, metadata = find_tensors(content, file), read_metadata(path)
    tensors = tensor_tree.tensors
    heads = [(name, tuple(t.shape)) for name, t in tensors.items() if t.ndim == 2 and name.endswith("weight")]
    facts: Facts = {
        "network": f"{metadata.model}, as {metadata.origin} says"
        if metadata.model
        else "not named; say it with --set backbone.model=…",
        "tensors": f"{len(tensors):,}, {sum(t.numel() for t in tensors.values()):,} numbers, "
        + ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "taken from": ".".join(tensor_tree.keys) or None,
        "not taken": ", ".join(tensor_tree.unused_keys) or None,
        "last linear layer": f"{heads[-1][0]}: {heads[-1][1][0]:,} × {heads[-1][1][1]:,}" if heads else None,
        "epoch": content.get("epoch")
        if isinstance(content, Mapping) and isinstance(content.get("epoch"), int)
        else None,
        "classes": f"{len(metadata.class_names):,} ({', '.join(metadata.class_names[:8])} …)"
        if metadata.class_names
        else None,
        "next": f"pipeline dump-features CONFIG --checkpoint {path}",
    }
    return Artefact(path, "weights from elsewhere", facts)


def own_checkpoint(path: Path) -> Artefact:
    from pipeline.backbone.checkpoint import read, weights_digest

    state = read(path)
    data = state["dataset"]
    external = state.get("brought")
    best = f"{state['best']:.2f} %" if state["best"] is not None else None
    facts = {
        "network": network_text(state["network"]),
        "trained": None if external else _how_far(path, state),
        "trained with": None if external else _choices(state["config"]["backbone"]),
        "best validation accuracy (mean over classes)": best,
        "head": None
        if external is None
        else f"{PROBE}, fitted when features are dumped"
        if state["probe"]
        else "its own",
        **class_facts(state["class_names"], state["counts"], left_out=_left_out(path, state)),
        "dataset": f"{data['name']}, fingerprint {data['fingerprint']}",
        "input": state["transform"],
        "weights digest": weights_digest(state["model"]),
    }
    return Artefact(
        path, EXTERNAL_BACKBONE if state.get("brought") else "stage-1 checkpoint", facts, state["provenance"]
    )


def _how_far(path: Path, state: dict[str, Any]) -> str:
    from pipeline.backbone.checkpoint import read

    epoch, epochs = state["epoch"], state["config"]["backbone"]["epochs"]
    if path.name == "best.pt":
        last = path.with_name("last.pt")
        try:
            complete = state["complete"] or (last.is_file() and read(last)["complete"])
        except DataError:
            complete = False
        return (
            f"the best of {epochs} epochs (epoch {epoch})"
            if complete
            else f"epoch {epoch} of {epochs}, the best so far"
        )
    done = "complete" if state["complete"] else f"unfinished, step {state['step_in_epoch']} of the next epoch"
    return f"{epoch} of {epochs} epochs, {done}"


def _choices(settings: dict[str, Any]) -> str | None:
    """Loss, sampler and average of stage 1; None where all are as always."""
    parts = [f"loss {settings['loss']}"] if settings.get("loss", "ce") != "ce" else []
    parts += [f"{s} sampling"] if (s := settings.get("sampler", "instance")) != "instance" else []
    parts += [f"weights averaged with decay {d:g}"] if (d := settings.get("ema", 0)) else []
    return ", ".join(parts) or None


def training(folder: Path) -> Artefact:
    """The last checkpoint of a training, the one before it where that cannot be read, and how its history ends."""
    from pipeline.backbone.checkpoint import DamagedCheckpoint, previous_of
    from pipeline.backbone.events import accuracies, pace
    from pipeline.backbone.training_dir import read_history

    last, damage = folder / "last.pt", None
    try:
        artefact = own_checkpoint(last)
    except DamagedCheckpoint as error:
        if not previous_of(last).is_file():
            raise
        artefact, damage = own_checkpoint(previous_of(last)), str(error)
    facts: Facts = {"damaged": damage, **artefact.facts}
    if history := read_history(folder):
        end = history[-1]
        facts["last epoch told"] = f"{end['epoch']}, loss {end['loss']:.4f}; {pace(end)}"
        facts |= {f"its {name} accuracy": accuracies(end, split) for split, name in NAMED.items()}
        validated = [line for line in history if line.get("val_accuracy") is not None]
        if validated:
            best = max(validated, key=lambda line: line["val_accuracy"])
            facts["best epoch told"] = f"{best['epoch']}, validation {accuracies(best, 'val')}"
    return Artefact(artefact.path, artefact.kind, facts, artefact.provenance)


def _left_out(checkpoint: Path, state: dict[str, Any]) -> int:
    """Return the number of training images that could not be read in a checkpoint's last epoch, by the history beside it."""
    from pipeline.backbone.training_dir import read_history

    lines = read_history(checkpoint.parent)
    left_out = next((line.get("left_out") for line in lines if line.get("epoch") == state["epoch"]), None) or 0
    drawn_once = state["config"]["backbone"].get("sampler", "instance") == "instance"
    return left_out if drawn_once else 0


def exported(path: Path) -> Artefact:
    """The folder of `pipeline export`, or one of timm's with weights and a config.json."""
    document = read_json(path / "config.json")
    if "head" not in document:
        return checkpoint(path)
    document = read_export(path / "config.json")
    return Artefact(path, "exported model", export_summary(document), document.get("provenance", {}))
