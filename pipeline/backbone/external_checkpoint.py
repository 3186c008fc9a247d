"""Somebody's checkpoint as a backbone of ours: which network it is, whether it fits, and what its head is worth here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache import write_durably
from pipeline.backbone import checkpoint
from pipeline.backbone.build import build_model, check_input, classifier, input_transform, network_facts, usual_input
from pipeline.backbone.checkpoint import Checkpoint, weights_digest
from pipeline.backbone.cifar import takes_width
from pipeline.backbone.match_weights import Head, take
from pipeline.backbone.pretrained import encoder_path, load_encoder
from pipeline.backbone.weights import find_tensors, read_file, read_key_map, renamed, weights_file
from pipeline.config import RESERVED_MODEL_ARGS, BackboneConfig, Config
from pipeline.data import Dataset, load_dataset
from pipeline.data.transform import Transform
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError, DataError
from pipeline.provenance import provenance

OWN = {"format", "model", "config", "transform"}  # keys of what `pipeline train-backbone` writes


@dataclass(frozen=True)
class Beside:
    """What is said of weights beside them; None or empty where nothing is.

    origin: who says it; input: as timm's pretrained_cfg; weights: the name of the file.
    """

    origin: str = ""
    model: str | None = None
    model_args: Mapping[str, Any] | None = None
    width: float = 1.0
    input: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] = ()
    weights: str | None = None


def load_external(
    path: Path | None,
    config: Config,
    *,
    dataset: Dataset,
    model: str | None = None,
    key_map: Path | None = None,
    probe: bool = False,
) -> Checkpoint:
    """The backbone in any checkpoint of a timm network, ready to encode the data set.

    path: safetensors, or a pickle of tensors, of which nothing is executed; or a folder with a timm config.json; None
    for the pretrained network that config.backbone.encoder names. The
    network is `model` if given, else what config.json says, else config.backbone.model. key_map: see read_key_map.
    The head is the file's own where it is one of these classes, unless probe asks otherwise; else a linear probe that is
    fitted when the features are there. Raises DataError for a file that cannot be read or does not fit, ConfigError for
    a network or key map that will not do.
    """
    if path is None and (path := encoder_path(config.backbone.encoder or "")) is None:
        return _load_pretrained(config, dataset)
    path = Path(path)
    said = read_beside(path)
    file = weights_file(path, said.weights)
    content = read_file(file)
    if isinstance(content, Mapping) and content.keys() >= OWN:
        said = _said_by_own(content, file)
    settings, notes = _settings(config.backbone, said, model)
    network = build_model(settings, num_classes=len(dataset.class_names))
    found = find_tensors(content, file)
    if found.others:
        notes.append(f"taken from {'.'.join(found.where)} of the file; not from its {', '.join(found.others)}")
    tensors = renamed(found.tensors, read_key_map(key_map), key_map) if key_map else found.tensors
    taken = take(tensors, network, name=settings.model, path=file, probe=probe)
    notes += taken.notes
    head, told = _head(taken.head, said, dataset, probe=probe)
    notes.append(told)
    _load(network, taken.encoder, head, file)
    known = said.input or usual_input(settings.model) or None
    transform = input_transform(config.data, settings, dataset.train, known=known)
    check_input(network, transform, torch.device("cpu"))
    notes += _about_input(said, known, transform.size, settings.model)
    epoch = content.get("epoch") if isinstance(content, Mapping) else None
    external = {
        "sha256": _sha256(file),
        "taken_from": ".".join([*found.where, *filter(None, [taken.prefix.rstrip(".")])]) or None,
        "key_map": None if key_map is None else str(key_map),
        "notes": notes,
    }
    chosen = config.model_copy(update={"backbone": settings})
    return _external_checkpoint(
        network, chosen, dataset, transform=transform, path=path, external=external, probe=head is None,
        epoch=epoch if isinstance(epoch, int) else 0,
    )  # fmt: skip


def _load_pretrained(config: Config, dataset: Dataset) -> Checkpoint:
    """Return the pretrained network that the configuration names, to be given a linear probe for the data's classes."""
    settings = config.backbone
    assert settings.encoder is not None
    pretrained = load_encoder(settings.encoder, model_args=settings.model_args, size=config.data.image_size)
    settings = settings.model_copy(
        update={
            "model": pretrained.model,
            "model_args": dict(pretrained.model_args) or None,
            "width": 1.0,
            "pretrained": False,
        }
    )
    network = build_model(settings, num_classes=len(dataset.class_names))
    path = pretrained.file or Path(pretrained.name)
    _load(network, take(pretrained.tensors, network, name=pretrained.model, path=path, probe=True).encoder, None, path)
    transform = input_transform(config.data, settings, dataset.train, known=pretrained.input)
    check_input(network, transform, torch.device("cpu"))
    height, width = transform.size
    notes = [
        f"encoder: {pretrained.origin}; a linear probe is fitted on the features",
        f"input: whole images at {height}×{width}, mean and standard deviation of the network's own training; another size: "
        "--set data.image_size=…",
    ]
    digest = _sha256(pretrained.file) if pretrained.file else None
    return _external_checkpoint(
        network, config.model_copy(update={"backbone": settings}), dataset, transform=transform, path=path,
        external={"encoder": pretrained.name, "sha256": digest, "notes": notes}, probe=True, epoch=0,
    )  # fmt: skip


def _external_checkpoint(
    network: nn.Module,
    config: Config,
    dataset: Dataset,
    *,
    transform: Transform,
    path: Path,
    external: dict[str, Any],
    probe: bool,
    epoch: int,
) -> Checkpoint:
    """Return the network with what a dump and a later reader need to know of it."""
    facts, summary = network_facts(config.backbone, network), dataset.summary()
    return Checkpoint(
        path=path,
        model=network.eval(),
        config=config,
        transform=transform,
        class_names=dataset.class_names,
        counts=dataset.counts,
        network=facts,
        dataset=summary,
        epoch=epoch,
        complete=True,
        weights_digest=weights_digest(network.state_dict()),
        provenance=provenance(
            command="dump-features",
            config=config.model_dump(mode="json"),
            dataset=summary,
            network=facts,
            made_from={"checkpoint": str(path), **external},
        ),
        probe=probe,
        external=external,
    )


def origin_text(backbone: Checkpoint) -> str:
    """Return `encoder: lite0` or `checkpoint: FILE`, as a backbone was asked for."""
    name = (backbone.external or {}).get("encoder")
    return f"encoder: {name}" if name else f"checkpoint: {backbone.path}"


def load_external_for_run(
    path: Path | None,
    config: Config,
    folder: Path,
    *,
    model: str | None = None,
    key_map: Path | None = None,
    probe: bool = False,
    overwrite: bool = False,
    ranks: Ranks,
) -> tuple[Checkpoint, Dataset]:
    """(load_foreign of the configuration's images; the images), unless the folder it is to be kept in has another one."""
    dataset = ranks.together(lambda: load_dataset(config.data, resize=not config.backbone.frozen))
    backbone = ranks.together(
        lambda: load_external(path, config, dataset=dataset, model=model, key_map=key_map, probe=probe)
    )
    ranks.together(lambda: refuse_other(backbone, folder, overwrite=overwrite))
    return backbone, dataset


def is_own(path: Path) -> bool:
    """Whether a file was written by `pipeline train-backbone`, as far as can be seen; so is a damaged last.pt or best.pt."""
    try:
        content = read_file(weights_file(path))
    except DataError:
        return path.name in ("last.pt", "best.pt")
    return isinstance(content, Mapping) and content.keys() >= OWN


def refuse_other(backbone: Checkpoint, folder: Path, *, overwrite: bool) -> None:
    """ConfigError where a folder holds a backbone that was trained there, or, without overwrite, another brought along."""
    path = folder / "last.pt"
    if not path.is_file():
        return
    there, wanted = checkpoint.read(path), _identity(backbone)
    if not there.get("brought"):
        raise ConfigError(f"{path}: a backbone that was trained here; it is not replaced: choose another --out")
    theirs = there.get("identity", {})
    other = [key for key in wanted if theirs.get(key) != wanted[key]]
    if other and not overwrite:
        source = there["provenance"].get("made_from", {}).get("checkpoint", "another checkpoint")
        told = {
            "weights": "other weights",
            "head": f"as its head {wanted['head']} instead of {theirs.get('head')}",
            "transform": "another input transform",
        }
        raise ConfigError(
            f"{path}: keeps the backbone brought along from {source}; what is asked for, from {backbone.path}, has "
            f"{', '.join(told[key] for key in other)}. Choose another --out, or replace it with --overwrite"
        )


def keep(backbone: Checkpoint, folder: Path) -> None:
    """Writes last.pt and run.json of a backbone that was brought along, so that all that follows needs no other file."""
    path = folder / "last.pt"
    identity = _identity(backbone)
    if path.is_file():
        there = checkpoint.read(path)
        if there.get("identity") == identity and there["dataset"] == backbone.dataset:
            return
    state = {
        "model": backbone.model.state_dict(),
        "config": backbone.config.model_dump(mode="json"),
        "identity": identity,
        "transform": backbone.transform.to_dict(),
        "class_names": list(backbone.class_names),
        "counts": backbone.counts.tolist(),
        "dataset": backbone.dataset,
        "network": backbone.network,
        "epoch": backbone.epoch,
        "step_in_epoch": 0,
        "sums": [0.0, 0.0, 0.0],
        "best": None,
        "complete": True,
        "provenance": backbone.provenance,
        "probe": backbone.probe,
        "brought": backbone.external,
    }
    checkpoint.save(path, state)
    write_durably(folder / "run.json", json.dumps(backbone.provenance, indent=1))


def _identity(backbone: Checkpoint) -> dict[str, str]:
    return {
        "weights": f"brought along, {backbone.weights_digest[:16]}",
        "head": "linear probe" if backbone.probe else "the checkpoint's own",
        "transform": json.dumps(backbone.transform.to_dict(), sort_keys=True),
    }


def read_beside(path: Path) -> Beside:
    """What the config.json beside weights, or in a folder of weights, says in timm's format; nothing where there is none.

    DataError names the field that makes no sense.
    """
    origin = (path if path.is_dir() else path.parent) / "config.json"
    if not origin.is_file():
        return Beside()
    try:
        tree = json.loads(origin.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{origin}: not readable JSON ({error}); mend it, or move it away and name the network"
        ) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("architecture"), str):
        return Beside()  # another program's
    args = tree.get("model_args") or {}
    known = dict(tree.get("pretrained_cfg") or {})
    names = tree.get("class_names") or tree.get("label_names") or known.get("label_names") or ()
    for key, shape in (("mean", 3), ("std", 3), ("input_size", 3)):
        value = known.get(key)
        good = (
            isinstance(value, list | tuple) and len(value) == shape and all(isinstance(v, int | float) for v in value)
        )
        if value is not None and not good:
            raise DataError(f"{origin}: pretrained_cfg.{key} is {value!r}, expected {shape} numbers")
    if not isinstance(args, dict) or not isinstance(names, list | tuple):
        raise DataError(f"{origin}: model_args has to be a mapping and class names a list")
    own = {key: value for key, value in args.items() if key not in RESERVED_MODEL_ARGS}
    return Beside(
        origin=str(origin),
        model=tree["architecture"],
        model_args=own or None,
        width=float(args.get("width", 1.0)),
        input=known or None,
        class_names=tuple(map(str, names)),
        weights=tree.get("weights"),
    )


def _said_by_own(state: Mapping[str, Any], file: Path) -> Beside:
    """What a checkpoint of `pipeline train-backbone` says of itself."""
    backbone, transform = state["config"]["backbone"], state["transform"]
    wanted = {key: transform[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    return Beside(
        origin=str(file),
        model=backbone["model"],
        model_args=backbone.get("model_args"),
        width=backbone["width"],
        input=wanted | {"input_size": (3, *transform["size"])},
        class_names=tuple(state["class_names"]),
    )


def _settings(config: BackboneConfig, said: Beside, model: str | None) -> tuple[BackboneConfig, list[str]]:
    """The settings of the network: of `model`, else as said beside the weights, else the configuration's."""
    chosen: dict[str, Any] = {"pretrained": False, "model": model or said.model or config.model}
    notes = []
    if said.model and not model:
        args = config.model_args if config.model_args is not None else said.model_args
        chosen |= {"model_args": args, "width": said.width}
        notes.append(f"network: {said.model}, as {said.origin} says")
    if not takes_width(chosen["model"]):
        chosen["width"] = 1.0  # the configuration's is of another network
    return config.model_copy(update=chosen), notes


def _head(head: Head | None, said: Beside, dataset: Dataset, *, probe: bool) -> tuple[Head | None, str]:
    """The file's head in the order of the data's classes, None where a probe has to take its place; and why."""
    names, fitted = dataset.class_names, "a linear probe is fitted on the features"
    if probe:
        return None, f"{fitted}, as asked for"
    if head is None:
        return None, f"the file has no head that could be used: {fitted}"
    if len(head.weight) != len(names):
        return None, f"the file's head has {len(head.weight):,} classes, the data {len(names):,}: {fitted}"
    if not said.class_names:
        shown = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:3]))
        return head, (
            f"the file's head is taken, its classes matched by their number ({shown} …): nothing in the file names them; "
            "if theirs is another order, --probe fits a new head"
        )
    if said.class_names == names:
        return head, "the file's head is taken: its classes are the data's, in the same order"
    if sorted(said.class_names) == sorted(names) and len(set(names)) == len(names):
        order = torch.tensor([said.class_names.index(name) for name in names])
        return (
            Head(head.weight[order], head.bias[order]),
            "the file's head is taken, its classes matched by their names: they stand there in another order",
        )
    strange = next(name for name in (*said.class_names, *names) if (name in names) != (name in said.class_names))
    return None, f"the file's head is of other classes ({strange!r} is one of the two only): {fitted}"


def _load(network: nn.Module, encoder: Mapping[str, Tensor], head: Head | None, path: Path) -> None:
    """Puts the tensors into the network, zeros into a head that is to be fitted; DataError where a number is none."""
    for name, tensor in encoder.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(
                f"{path}: {name} holds numbers that are not finite: its training probably diverged; take an earlier one"
            )
    network.load_state_dict(dict(encoder), strict=False)
    layer = classifier(network)
    with torch.no_grad():
        layer.weight.copy_(torch.zeros_like(layer.weight) if head is None else head.weight)
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros_like(layer.bias) if head is None else head.bias)


def _about_input(said: Beside, known: Mapping[str, Any] | None, size: tuple[int, int], name: str) -> list[str]:
    """Where the input transform comes from, and that images are smaller than those the network was made for."""
    if known is None:
        return ["input: mean and standard deviation of the training images; others: --set data.mean=… data.std=…"]
    whose = said.origin if said.input else f"timm's for {name}"
    notes = (
        [] if said.input else [f"input as is usual ({whose}); others: --set data.mean=…, data.std=…, data.image_size=…"]
    )
    usual = known.get("input_size")
    if usual and size[0] < usual[1] / 2:
        notes.append(
            f"images are {size[0]}×{size[1]}, the network was made for {usual[1]}×{usual[2]} ({whose}): features are "
            f"mostly better at its own size, --set data.image_size={usual[1]}"
        )
    return notes


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
