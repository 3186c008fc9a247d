"""Which of a file's tensors make a network's encoder and head, and what to say where they do not."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.backbone.build import build_model, classifier, classifier_name, usual_input
from pipeline.backbone.weights import prefix_of
from pipeline.config import BackboneConfig
from pipeline.errors import ConfigError, DataError, PipelineError

COUNTED = "num_batches_tracked"  # of batch normalisation: changes nothing in evaluation
# what training leaves beside an encoder, none of it used to encode
ASIDE = re.compile(
    r"^(fc|head|heads|classifier|proj\w*|pred\w*|prototypes|queue\w*|mlp|decoder\w*|loss\w*|criterion|n_averaged|aux\w*)(\.|$)"
    r"|(relative_position_index|relative_coords_table|attn_mask|" + COUNTED + r")$"
)
AVERAGED = re.compile(r"(_k|momentum|key)\.")  # of two networks the one that is mostly left out
SHOWN, TRIED = 3, 24
TYPICAL = {  # a name in a file → a network of its family
    "layer1.0.conv1.weight": "resnet18",
    "blocks.0.attn.qkv.weight": "vit_tiny_patch16_224",
    "stages.0.blocks.0.conv_dw.weight": "convnext_tiny",
    "blocks.0.0.conv_dw.weight": "efficientnet_b0",
    "features.0.weight": "vgg11",
}


@dataclass(frozen=True)
class Head:
    """weight (C, D), bias (C,) of a linear classifier."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Taken:
    """The encoder's tensors under the network's names, the file's linear head if it has one, what stood before the names."""

    encoder: dict[str, Tensor]
    head: Head | None
    prefix: str
    notes: list[str] = field(default_factory=list)


def take(tensors: Mapping[str, Tensor], network: nn.Module, *, name: str, path: Path, probe: bool) -> Taken:
    """What of a file's tensors belongs to the network called `name`.

    Raises DataError where a part of the encoder is missing, of another shape or too much, naming the network that fits if
    one of its family does; and for a head that is no plain linear layer but may be one of these classes (not with probe).
    """
    head_name = classifier_name(network)
    wanted = {key: t for key, t in network.state_dict().items() if not key.startswith(f"{head_name}.")}
    prefix, others = prefix_of(tensors, wanted)
    if others and all(prefix + key in tensors for key in wanted if not key.endswith(COUNTED)):
        choice = ", ".join(p or "(nothing)" for p in (prefix, *others))
        spare = next((p for p in (prefix, *others) if AVERAGED.search(p)), others[0])
        raise ConfigError(
            f"{path}: holds {len(others) + 1} networks that fit {name} equally well, behind {choice}; leave out all but one "
            f"with --key-map FILE, a file of lines such as '^{re.escape(spare)}': null"
        )
    inside = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    _refuse_distilled(inside, path)
    _refuse_misfit(inside, wanted, network, head_name, name=name, path=path, outside=len(tensors) - len(inside))
    aside = [key for key in tensors if not key.startswith(prefix)]
    aside += [f"{prefix}{key}" for key in inside if key not in wanted and not key.startswith(f"{head_name}.")]
    aside = [key for key in aside if not key.endswith(COUNTED)]
    notes = [f"left out, no part of the encoder: {_listed(aside)}"] if aside else []
    encoder = {key: inside[key] for key in wanted if key in inside}
    return Taken(encoder, _head_of(inside, head_name, classifier(network), path, probe=probe), prefix, notes)


def _refuse_distilled(inside: Mapping[str, Tensor], path: Path) -> None:
    marks = [key for key in inside if key.split(".")[0] in ("dist_token", "head_dist")]
    if marks:
        raise DataError(
            f"{path}: of a distilled network ({marks[0]}): its logits are the mean of two heads, not one nn.Linear, which is "
            "what stage 2 refits; take a checkpoint of the network without distillation token"
        )


def _refuse_misfit(
    inside: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    network: nn.Module,
    head_name: str,
    *,
    name: str,
    path: Path,
    outside: int,
) -> None:
    """DataError where the tensors are not the wanted ones, telling the first few of each kind."""
    missing = [key for key in wanted if key not in inside and not key.endswith(COUNTED)]
    shapes = [
        f"{key} {_shape(inside[key])} instead of {_shape(tensor)}"
        for key, tensor in wanted.items()
        if key in inside and inside[key].shape != tensor.shape and not key.endswith(COUNTED)
    ]
    own = (f"{head_name}.",)
    surplus = [key for key in inside if key not in wanted and not key.startswith(own) and not ASIDE.search(key)]
    if not (missing or shapes or surplus):
        return
    total = sum(not key.endswith(COUNTED) for key in wanted)
    told = [f"{len(missing)} of {total} tensors of its encoder are missing: {_listed(missing)}"] if missing else []
    if 2 * len(missing) > total:  # of another family: every name would be told twice
        shapes, surplus = [], []
        told.append(f"the file has {_listed(inside)}")
    told += [f"{len(shapes)} have another shape: {_listed(shapes)}"] if shapes else []
    told += [f"{len(surplus)} are none of its: {_listed(surplus)}"] if surplus else []
    raise DataError(
        f"{path}: does not fit {name}: {'; '.join(told)}. {_advice(inside, missing, shapes, surplus, network, name)}"
    )


def _advice(
    inside: Mapping[str, Tensor],
    missing: list[str],
    shapes: list[str],
    surplus: list[str],
    network: nn.Module,
    name: str,
) -> str:
    fitting = which_fits(inside, name)
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


def which_fits(inside: Mapping[str, Tensor], asked: str) -> str | None:
    """A timm network of the asked one's family, or of the family that the names suggest, whose encoder these tensors are.

    Networks are built without memory or computation, TRIED of a family whose first layer is in the file, the plainest names
    first.
    """
    import timm

    like = [asked, *(model for key, model in TYPICAL.items() if key in inside)]
    modules = dict.fromkeys(timm.model_entrypoint(model.split(".")[0]).__module__.rpartition(".")[2] for model in like)
    for module in modules:
        known = sorted(timm.list_models(module=module), key=lambda n: (len(n), n))
        for candidate in [n for n in known if usual_input(n).get("first_conv", "") + ".weight" in inside][:TRIED]:
            try:
                with torch.device("meta"):
                    network = build_model(BackboneConfig(model=candidate), num_classes=2)
            except (PipelineError, RuntimeError, NotImplementedError):
                continue
            head = f"{classifier_name(network)}."
            wanted = {
                k: t.shape
                for k, t in network.state_dict().items()
                if not k.startswith(head) and not k.endswith(COUNTED)
            }
            here = {k: t.shape for k, t in inside.items() if k in wanted or not (k.startswith(head) or ASIDE.search(k))}
            if wanted == here:
                return candidate
    return None


def _head_of(inside: Mapping[str, Tensor], name: str, layer: nn.Linear, path: Path, *, probe: bool) -> Head | None:
    """The file's linear head of whatever number of classes, None where it has none or another kind of other classes."""
    own = {key[len(name) + 1 :]: tensor for key, tensor in inside.items() if key.startswith(f"{name}.")}
    if not own or probe:
        return None
    weight, bias = own.get("weight"), own.get("bias")
    plain = own.keys() == {"weight", "bias"} and weight is not None and bias is not None
    if plain and weight.ndim == 2 and weight.shape[1] == layer.in_features and bias.shape == weight.shape[:1]:  # type: ignore[union-attr]
        if not all(torch.isfinite(tensor).all() for tensor in own.values()):
            raise DataError(f"{path}: its head {name} holds numbers that are not finite; --probe fits another one")
        return Head(weight.float(), bias.float())  # type: ignore[union-attr]
    if any(tensor.ndim and len(tensor) == layer.out_features for tensor in own.values()):
        listed = _listed([f"{name}.{key} {_shape(tensor)}" for key, tensor in own.items()])
        raise DataError(
            f"{path}: its head is not one nn.Linear with bias ({listed}: cosine, convolutional or several layers), which is "
            "what stage 2 refits; --probe leaves it out and fits a linear one on the features"
        )
    return None


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def _listed(names: Iterable[str], most: int = SHOWN) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
