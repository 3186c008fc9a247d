"""A checkpoint that was not trained here, as a backbone: its network, its input, and the use of its head."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.backbone import checkpoint
from pipeline.backbone.build import build_model, check_input, classifier, input_transform, network_facts, usual_input
from pipeline.backbone.checkpoint import Checkpoint, weights_digest
from pipeline.backbone.cifar import takes_width
from pipeline.backbone.match_weights import LinearHead, match_weights
from pipeline.backbone.pretrained import encoder_path, load_encoder
from pipeline.backbone.weights import find_tensors, read_file, read_key_map, rename_tensors, weights_file
from pipeline.backbone.weights_metadata import WeightsMetadata, own_metadata, read_metadata
from pipeline.config import BackboneConfig, Config
from pipeline.data import Dataset, Split, load_dataset
from pipeline.data.transform import Loader, Transform
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError, DataError
from pipeline.provenance import provenance
from pipeline.results.files import write_artefact

CROP_SAMPLE, STATISTICS_SAMPLE = 16, 32  # training images looked at
MOST_DEVIATION = 2.0  # standard deviations of the means of a batch norm's input from the stored ones
OWN_KEYS = {"format", "model", "config", "transform"}  # keys of what `pipeline train-backbone` writes


def load_external(
    path: Path | None,
    config: Config,
    *,
    dataset: Dataset,
    model: str | None = None,
    key_map: Path | None = None,
    probe: bool = False,
) -> Checkpoint:
    """Return the backbone in any checkpoint of a timm network, ready to encode the data set.

    Its head is the file's where that is of these classes, else a linear probe, which is fitted on the features later.

    Arguments:
        path: safetensors, or a pickle of tensors, of which nothing is executed; or a folder with a timm config.json; None
            for the pretrained network that config.backbone.encoder names.
        model: the timm name of the network, by default that in config.json, else config.backbone.model.
        key_map: a file as `read_key_map` takes it.
        probe: fit a linear probe even where the file has a head.

    Raises:
        DataError: the file cannot be read or does not fit the network.
        ConfigError: the network or the key map cannot be used.
    """
    if path is None and (path := encoder_path(config.backbone.encoder or "")) is None:
        return _load_pretrained(config, dataset)
    path = Path(path)
    metadata = read_metadata(path)
    file = weights_file(path, metadata.weights)
    content = read_file(file)
    if isinstance(content, Mapping) and content.keys() >= OWN_KEYS:
        metadata = own_metadata(content, file)
    settings, notes = _settings(config.backbone, metadata, model)
    network = build_model(settings, num_classes=len(dataset.class_names))
    stored = find_tensors(content, file)
    if stored.unused_keys:
        notes.append(f"taken from {'.'.join(stored.keys)} of the file; not from its {', '.join(stored.unused_keys)}")
    tensors = rename_tensors(stored.tensors, read_key_map(key_map), key_map) if key_map else stored.tensors
    matched = match_weights(tensors, network, name=settings.model, path=file, probe=probe)
    notes += matched.notes
    head, head_note = _head(matched.head, metadata, dataset, probe=probe)
    notes.append(head_note)
    _load(network, matched.encoder, head, file)
    input_facts = metadata.input or usual_input(settings.model) or None
    transform = input_transform(config.data, settings, dataset.train, input_facts=input_facts)
    check_input(network, transform, torch.device("cpu"))
    notes += _input_notes(metadata, input_facts, transform.size, settings.model)
    notes += _crop_notes(transform, dataset.train, path)
    if matched.by_order:
        notes.append(check_statistics(network, transform, dataset.train, file))
    epoch = content.get("epoch") if isinstance(content, Mapping) else None
    external = {
        "sha256": _sha256(file),
        "taken_from": ".".join([*stored.keys, *filter(None, [matched.prefix.rstrip(".")])]) or None,
        "key_map": None if key_map is None else str(key_map),
        "classes_named": head is None or (bool(metadata.class_names) and not matched.by_order),
        "notes": notes,
    }
    return _external_checkpoint(
        network, config.model_copy(update={"backbone": settings}), dataset, transform=transform, path=path,
        external=external, probe=head is None, epoch=epoch if isinstance(epoch, int) else 0,
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
    _load(
        network,
        match_weights(pretrained.tensors, network, name=pretrained.model, path=path, probe=True).encoder,
        None,
        path,
    )
    transform = input_transform(config.data, settings, dataset.train, input_facts=pretrained.input)
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
    """Return the network with the facts that a dump and its readers need."""
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
    """Return `encoder: lite0` or `checkpoint: FILE`, the way a backbone was named."""
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
    """Return the backbone of `load_external` and the configuration's images.

    Raises: ConfigError: `folder`, into which it will be saved, has another backbone; what `load_external` raises.
    """
    dataset = ranks.together(lambda: load_dataset(config.data, resize=not config.backbone.frozen))
    backbone = ranks.together(
        lambda: load_external(path, config, dataset=dataset, model=model, key_map=key_map, probe=probe)
    )
    ranks.together(lambda: refuse_other_backbone(backbone, folder, overwrite=overwrite))
    return backbone, dataset


def is_own_checkpoint(path: Path) -> bool:
    """Return whether a file was written by `pipeline train-backbone`; a damaged last.pt or best.pt counts as such."""
    try:
        content = read_file(weights_file(path))
    except DataError:
        return path.name in ("last.pt", "best.pt")
    return isinstance(content, Mapping) and content.keys() >= OWN_KEYS


def refuse_other_backbone(backbone: Checkpoint, folder: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where a folder holds a backbone that was trained there or, without overwrite, another external one."""
    path = folder / "last.pt"
    if not path.is_file():
        return
    saved, expected = checkpoint.read(path), _identity(backbone)
    if not saved.get("brought"):
        raise ConfigError(f"{path}: a backbone that was trained here; it is not replaced: choose another --out")
    saved_identity = saved.get("identity", {})
    differing_keys = [key for key in expected if saved_identity.get(key) != expected[key]]
    if differing_keys and not overwrite:
        source = saved["provenance"].get("made_from", {}).get("checkpoint", "another checkpoint")
        differences = {
            "weights": "other weights",
            "head": f"as its head {expected['head']} instead of {saved_identity.get('head')}",
            "transform": "another input transform",
        }
        raise ConfigError(
            f"{path}: holds the external backbone of {source}; the requested one, of {backbone.path}, has "
            f"{', '.join(differences[key] for key in differing_keys)}. Choose another --out, or replace it with --overwrite"
        )


def save_external(backbone: Checkpoint, folder: Path) -> None:
    """Write last.pt and run.json of an external backbone, so that later stages need no other file."""
    path = folder / "last.pt"
    identity = _identity(backbone)
    if path.is_file():
        saved = checkpoint.read(path)
        if saved.get("identity") == identity and saved["dataset"] == backbone.dataset:
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
    write_artefact(folder / "run.json", "record", backbone.provenance)


def _identity(backbone: Checkpoint) -> dict[str, str]:
    return {
        "weights": f"brought along, {backbone.weights_digest[:16]}",
        "head": "linear probe" if backbone.probe else "the checkpoint's own",
        "transform": json.dumps(backbone.transform.to_dict(), sort_keys=True),
    }


def _settings(config: BackboneConfig, metadata: WeightsMetadata, model: str | None) -> tuple[BackboneConfig, list[str]]:
    """Return the settings of the network: those of `model`, else of the metadata, else the configuration's; and notes."""
    settings: dict[str, Any] = {"pretrained": False, "model": model or metadata.model or config.model}
    notes = []
    if metadata.model and not model:
        saved_args = config.model_args if config.model_args is not None else metadata.model_args
        settings |= {"model_args": saved_args, "width": metadata.width}
        notes.append(f"network: {metadata.model}, as {metadata.origin} says")
    if not takes_width(settings["model"]):
        settings["width"] = 1.0  # the configuration's is of another network
    return config.model_copy(update=settings), notes


def _head(
    head: LinearHead | None, metadata: WeightsMetadata, dataset: Dataset, *, probe: bool
) -> tuple[LinearHead | None, str]:
    """Return the file's head in the order of the data's classes, None where a probe replaces it; and a note on the reason."""
    names, probe_note = dataset.class_names, "a linear probe is fitted on the features"
    if probe:
        return None, f"{probe_note}, as asked for"
    if head is None:
        return None, f"the file has no head that could be used: {probe_note}"
    if len(head.weight) != len(names):
        return None, f"the file's head has {len(head.weight):,} classes, the data {len(names):,}: {probe_note}"
    if not metadata.class_names:
        examples = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:3]))
        return head, (
            f"the file's head is taken, its classes matched by their number ({examples} …): nothing in the file names them; "
            "the dump tries other orders on the training features, and a probe takes its place where none fits"
        )
    if metadata.class_names == names:
        return head, "the file's head is taken: its classes are the data's, in the same order"
    if sorted(metadata.class_names) == sorted(names) and len(set(names)) == len(names):
        order = torch.tensor([metadata.class_names.index(name) for name in names])
        return (
            LinearHead(head.weight[order], head.bias[order]),
            "the file's head is taken, its classes matched by their names: they stand there in another order",
        )
    unmatched = next(
        name for name in (*metadata.class_names, *names) if (name in names) != (name in metadata.class_names)
    )
    return None, f"the file's head is of other classes ({unmatched!r} is one of the two only): {probe_note}"


def _load(network: nn.Module, encoder: Mapping[str, Tensor], head: LinearHead | None, path: Path) -> None:
    """Copy the tensors into the network, zeros into a head that is still to be fitted.

    Raises: DataError: a number is not finite.
    """
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


def _input_notes(
    metadata: WeightsMetadata, input_facts: Mapping[str, Any] | None, size: tuple[int, int], name: str
) -> list[str]:
    """Return notes on the source of the input transform, and on images much smaller than the network's own."""
    if input_facts is None:
        return ["input: mean and standard deviation of the training images; others: --set data.mean=… data.std=…"]
    source = metadata.origin if metadata.input else f"timm's for {name}"
    notes = (
        []
        if metadata.input
        else [
            f"input as is usual ({source}): mean and standard deviation are a guess, nothing in the file says them; others: "
            "--set data.mean=…, data.std=…, data.image_size=…"
        ]
    )
    input_size = input_facts.get("input_size")
    if input_size and size[0] < input_size[1] / 2:
        notes.append(
            f"images are {size[0]}×{size[1]}, the network was made for {input_size[1]}×{input_size[2]} ({source}): features are "
            f"mostly better at its own size, --set data.image_size={input_size[1]}"
        )
    return notes


def _crop_notes(transform: Transform, train: Split, path: Path) -> list[str]:
    """Return a note where only the middle of small images is used."""
    if train.images is not None or transform.crop_pct >= 1:
        return []
    rows = np.linspace(0, len(train) - 1, min(len(train), CROP_SAMPLE)).astype(int)
    sides = [min(image.size) for row in rows if (image := _readable(train, row)) is not None]
    if not sides or np.median(sides) >= min(transform.size):
        return []
    return [
        f"small images ({int(np.median(sides))} pixels) are enlarged and lose their edges: the middle {transform.crop_pct:.0%} "
        f"of a side is used, as networks are tested on photographs; --encoder {path} takes whole images, mostly better for these"
    ]


def _readable(split: Split, row: int) -> Any:
    """Return a stored image, None where it cannot be read."""
    try:
        return split.read(row)
    except DataError:
        return None


def check_statistics(network: nn.Module, transform: Transform, train: Split, path: Path) -> str:
    """Return a note on how far the batch norms' stored means are from those of real images, after a match by order.

    Raises: DataError: so far that the tensors cannot stand in the right places.
    """
    distances: list[float] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = layer.running_mean, layer.running_var
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            distance = (inputs[0].mean((0, 2, 3)) - mean).abs() / (variance + 1e-5).sqrt()
            distances.append(float(distance.median()))

    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(compare) for layer in layers]
    rows = np.linspace(0, len(train) - 1, min(len(train), STATISTICS_SAMPLE)).astype(np.int64)
    try:
        with torch.inference_mode():
            for images in Loader(train, transform, device=torch.device("cpu")).batches(
                [rows], unreadable=lambda row: None
            ):
                network.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not distances:
        return "the match by order could not be checked: the network has no batch normalisation"
    worst = float(np.quantile(distances, 0.9))
    if not worst < MOST_DEVIATION:
        raise DataError(
            f"{path}: its tensors have the shapes of the network's in the same order but not its places: on training images the "
            f"means of {len(distances)} batch norms are up to {worst:.1f} standard deviations from the stored ones; map the "
            "names with --key-map FILE (docs/backbones.md)"
        )
    return (
        f"the match by order holds on {len(rows)} training images: nine tenths of the batch norms' means are within {worst:.1f} "
        "standard deviations of the stored ones"
    )


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
