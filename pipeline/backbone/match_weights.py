"""The match of a file's tensors with the encoder and head of a network, and the advice where they do not match."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.backbone.build import build_model, classifier, classifier_name, usual_input
from pipeline.backbone.weights import common_prefix
from pipeline.config import BackboneConfig
from pipeline.errors import ConfigError, DataError, PipelineError

BATCH_COUNT = "num_batches_tracked"  # of batch normalisation: changes nothing in evaluation
# what training leaves beside an encoder, none of it used to encode
NOT_ENCODING = re.compile(
    r"^(fc|head|heads|classifier|proj\w*|pred\w*|prototypes|queue\w*|mlp|decoder\w*|loss\w*|criterion|n_averaged|aux\w*)(\.|$)"
    r"|(relative_position_index|relative_coords_table|attn_mask|" + BATCH_COUNT + r")$"
)
KINDS = ("weight", "bias", "running_mean", "running_var")
MOMENTUM_COPY = re.compile(r"(_k|momentum|key)\.")  # of two networks the one that is mostly left out
MOST_NAMES, MOST_CANDIDATES = 3, 24
FAMILY_MARKS = {  # a name in a file → a network of its family
    "layer1.0.conv1.weight": "resnet18",
    "blocks.0.attn.qkv.weight": "vit_tiny_patch16_224",
    "stages.0.blocks.0.conv_dw.weight": "convnext_tiny",
    "blocks.0.0.conv_dw.weight": "efficientnet_b0",
    "features.0.weight": "vgg11",
}


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier: weight (C, D), bias (C,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class MatchedWeights:
    """The tensors of a file that belong to a network.

    Arguments:
        encoder: under the network's names.
        head: the file's linear head, if it has one.
        prefix: that stood before the names in the file.
        by_order: the names are others; the tensors were matched by their order and shapes.
    """

    encoder: dict[str, Tensor]
    head: LinearHead | None
    prefix: str
    notes: list[str] = field(default_factory=list)
    by_order: bool = False


def match_weights(
    tensors: Mapping[str, Tensor], network: nn.Module, *, name: str, path: Path, probe: bool
) -> MatchedWeights:
    """Return the tensors of a file that belong to the network called `name`.

    Arguments:
        probe: leave out the file's head.

    Raises:
        DataError: a part of the encoder is missing, has another shape or is too much (the error names the network of its
            family that fits); or the head is no plain linear layer but may be one of these classes.
        ConfigError: the file holds several networks that fit.
    """
    head_name = classifier_name(network)
    expected = {key: t for key, t in network.state_dict().items() if not key.startswith(f"{head_name}.")}
    prefix, tied = common_prefix(tensors, expected)
    if tied and all(prefix + key in tensors for key in expected if not key.endswith(BATCH_COUNT)):
        choice = ", ".join(p or "(nothing)" for p in (prefix, *tied))
        prefix_to_drop = next((p for p in (prefix, *tied) if MOMENTUM_COPY.search(p)), tied[0])
        raise ConfigError(
            f"{path}: holds {len(tied) + 1} networks that fit {name} equally well, behind {choice}; leave out all but one "
            f"with --key-map FILE, a file of lines such as '^{re.escape(prefix_to_drop)}': null"
        )
    stripped = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    renamed = None if expected.keys() <= stripped.keys() else match_by_order(tensors, network, head_name)
    if renamed is not None:
        stripped, prefix = renamed, ""
    _refuse_distilled(stripped, path)
    _refuse_misfit(stripped, expected, network, head_name, name=name, path=path)
    left_out = [] if renamed else [key for key in tensors if not key.startswith(prefix)]
    left_out += [f"{prefix}{key}" for key in stripped if key not in expected and not key.startswith(f"{head_name}.")]
    left_out = [key for key in left_out if not key.endswith(BATCH_COUNT)]
    notes = [f"left out, no part of the encoder: {_first_names(left_out)}"] if left_out else []
    if renamed is not None:
        pair = next((a, b) for a, b in zip(tensors, renamed, strict=False) if a != b)
        notes.append(
            f"the file's names are not those of {name}; its {len(renamed)} tensors are matched by order and shapes, such as "
            f"{pair[0]} with {pair[1]}"
        )
    encoder = {key: stripped[key] for key in expected if key in stripped}
    head = _head_of(stripped, head_name, classifier(network), path, probe=probe)
    return MatchedWeights(encoder, head, prefix, notes, renamed is not None)


def match_by_order(tensors: Mapping[str, Tensor], network: nn.Module, head_name: str) -> dict[str, Tensor] | None:
    """Return a file's tensors under the network's names where both stand in the same order, else None.

    Shapes are equal, but for the number of classes of the head, which may also be missing; and where the last part of a name
    is a usual one, such as running_var, it is the same.
    """
    stored = {key: tensor for key, tensor in tensors.items() if not key.endswith(BATCH_COUNT)}
    target = {key: tensor for key, tensor in network.state_dict().items() if not key.endswith(BATCH_COUNT)}
    encoder = [key for key in target if not key.startswith(f"{head_name}.")]
    names = list(target) if len(stored) == len(target) else encoder
    if len(stored) != len(names) or (names != encoder and names[: len(encoder)] != encoder):
        return None
    for name, (key, tensor) in zip(names, stored.items(), strict=True):
        kind, stored_kind = name.rpartition(".")[2], key.rpartition(".")[2]
        skipped = int(name.startswith(f"{head_name}."))  # the first dimension of the head is of any number of classes
        if tensor.ndim != target[name].ndim or tensor.shape[skipped:] != target[name].shape[skipped:]:
            return None
        if stored_kind in KINDS and stored_kind != kind:
            return None
    return dict(zip(names, stored.values(), strict=True))


def _refuse_distilled(stripped: Mapping[str, Tensor], path: Path) -> None:
    marks = [key for key in stripped if key.split(".")[0] in ("dist_token", "head_dist")]
    if marks:
        raise DataError(
            f"{path}: of a distilled network ({marks[0]}): its logits are the mean of two heads, not one nn.Linear, which is "
            "what stage 2 refits; take a checkpoint of the network without distillation token"
        )


def _refuse_misfit(
    stripped: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    network: nn.Module,
    head_name: str,
    *,
    name: str,
    path: Path,
) -> None:
    """Raise DataError where the tensors are not the expected ones; it names the first few of each kind."""
    missing = [key for key in expected if key not in stripped and not key.endswith(BATCH_COUNT)]
    shapes = [
        f"{key} {_shape(stripped[key])} instead of {_shape(tensor)}"
        for key, tensor in expected.items()
        if key in stripped and stripped[key].shape != tensor.shape and not key.endswith(BATCH_COUNT)
    ]
    surplus = [
        key
        for key in stripped
        if key not in expected and not key.startswith(f"{head_name}.") and not NOT_ENCODING.search(key)
    ]
    if not (missing or shapes or surplus):
        return
    total = sum(not key.endswith(BATCH_COUNT) for key in expected)
    problems = (
        [f"{len(missing)} of {total} tensors of its encoder are missing: {_first_names(missing)}"] if missing else []
    )
    if 2 * len(missing) > total:  # of another family: every name would be told twice
        shapes, surplus = [], []
        problems.append(f"the file has {_first_names(stripped)}")
    problems += [f"{len(shapes)} have another shape: {_first_names(shapes)}"] if shapes else []
    problems += [f"{len(surplus)} are none of its: {_first_names(surplus)}"] if surplus else []
    raise DataError(
        f"{path}: does not fit {name}: {'; '.join(problems)}. {_advice(stripped, missing, shapes, surplus, network, name)}"
    )


def _advice(
    stripped: Mapping[str, Tensor],
    missing: list[str],
    shapes: list[str],
    surplus: list[str],
    network: nn.Module,
    name: str,
) -> str:
    fitting = fitting_network(stripped, name)
    if fitting:
        return f"It fits {fitting}: --set backbone.model={fitting}"
    if any("pos_embed" in shape for shape in shapes) and not missing:
        return "Positions are learnt for one image size: --set backbone.model_args.img_size=SIZE of its training"
    if surplus and not missing and not shapes:
        names = "  ".join(f"'^{re.escape(key)}$': null" for key in surplus[:1])
        return f"If they play no part in encoding, leave them out with --key-map FILE, a file of lines such as {names}"
    return (
        "Name the network it is of with --set backbone.model=…, or, where only the names differ, map them with --key-map "
        "FILE (docs/backbones.md)"
    )


def fitting_network(stripped: Mapping[str, Tensor], requested: str) -> str | None:
    """Return the timm network whose encoder these tensors are, from the requested one's family or one that the names suggest.

    Networks are built without memory or computation, at most MOST_CANDIDATES of a family whose first layer is in the
    file, the plainest names first.
    """
    import timm

    relatives = [requested, *(model for key, model in FAMILY_MARKS.items() if key in stripped)]
    modules = dict.fromkeys(
        timm.model_entrypoint(model.split(".")[0]).__module__.rpartition(".")[2] for model in relatives
    )
    for module in modules:
        candidates = sorted(timm.list_models(module=module), key=lambda n: (len(n), n))
        for candidate in [n for n in candidates if usual_input(n).get("first_conv", "") + ".weight" in stripped][
            :MOST_CANDIDATES
        ]:
            try:
                with torch.device("meta"):
                    network = build_model(BackboneConfig(model=candidate), num_classes=2)
            except (PipelineError, RuntimeError, NotImplementedError):
                continue
            head = f"{classifier_name(network)}."
            expected = {
                k: t.shape
                for k, t in network.state_dict().items()
                if not k.startswith(head) and not k.endswith(BATCH_COUNT)
            }
            present = {
                k: t.shape
                for k, t in stripped.items()
                if k in expected or not (k.startswith(head) or NOT_ENCODING.search(k))
            }
            if expected == present:
                return candidate
    return None


def _head_of(
    stripped: Mapping[str, Tensor], name: str, layer: nn.Linear, path: Path, *, probe: bool
) -> LinearHead | None:
    """Return the file's linear head of any number of classes; None where it has none, or another kind of other classes."""
    head_tensors = {key[len(name) + 1 :]: tensor for key, tensor in stripped.items() if key.startswith(f"{name}.")}
    if not head_tensors or probe:
        return None
    weight, bias = head_tensors.get("weight"), head_tensors.get("bias")
    plain = head_tensors.keys() == {"weight", "bias"} and weight is not None and bias is not None
    if plain and weight.ndim == 2 and weight.shape[1] == layer.in_features and bias.shape == weight.shape[:1]:  # type: ignore[union-attr]
        if not all(torch.isfinite(tensor).all() for tensor in head_tensors.values()):
            raise DataError(f"{path}: its head {name} holds numbers that are not finite; --probe fits another one")
        return LinearHead(weight.float(), bias.float())  # type: ignore[union-attr]
    if any(tensor.ndim and len(tensor) == layer.out_features for tensor in head_tensors.values()):
        head_text = _first_names([f"{name}.{key} {_shape(tensor)}" for key, tensor in head_tensors.items()])
        raise DataError(
            f"{path}: its head is not one nn.Linear with bias ({head_text}: cosine, convolutional or several layers), which is "
            "what stage 2 refits; --probe leaves it out and fits a linear one on the features"
        )
    return None


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def _first_names(names: Iterable[str], most: int = MOST_NAMES) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
