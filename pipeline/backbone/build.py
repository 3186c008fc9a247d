"""A timm model with one linear classifier, or a CIFAR network, as encoder and classifier."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.backbone import cifar
from pipeline.backbone.pretrained import weights_file_of
from pipeline.config import BackboneConfig, DataConfig, nearest
from pipeline.data.dataset import Split
from pipeline.data.transform import IMAGENET_MEAN, IMAGENET_STD, Transform, channel_statistics
from pipeline.errors import ConfigError, DataError
from pipeline.seeds import derive


def build_model(config: BackboneConfig, *, num_classes: int, size: tuple[int, int] | None = None) -> nn.Module:
    """Return a model with `num_classes` logits, its fresh parameters a function of config.seed alone.

    Raises: ConfigError: an unknown name, a width that the model does not take, a classifier that is not one nn.Linear, or
        pretrained weights that cannot be fetched.
    """
    import timm

    name = config.model
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"backbone.model={name}: unknown to timm{nearest(name, timm.list_models())}")
    extra: dict[str, Any] = dict(config.model_args or {})
    if cifar.takes_width(name):
        extra["width"] = config.width
    elif config.width != 1:
        raise ConfigError(f"backbone.width={config.width}: {name} has no width multiplier; leave it at 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "init"))
        try:
            if config.pretrained:
                extra["pretrained_cfg_overlay"] = weights_file_of(name)
            model = timm.create_model(name, pretrained=config.pretrained, num_classes=num_classes, **extra)
        except Exception as error:
            reason = " ".join(str(error).split())
            if config.pretrained:
                raise ConfigError(
                    f"backbone.model={name}: no pretrained weights to be had ({reason}); set backbone.pretrained=false, "
                    "or bring the folder HF_HOME of a host that has fetched them"
                ) from error
            reason = reason[:300]
            raise ConfigError(f"backbone.model={name}: timm cannot build it ({reason})") from error
    classifier(model)
    return model


def classifier(model: nn.Module) -> nn.Linear:
    """Return the model's one linear classifier; raise ConfigError for distilled, cosine, convolutional or missing heads."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__ if head is not None else "none"
        if isinstance(head, tuple | list):
            kind = f"a pair of {' and '.join(type(h).__name__ for h in head)} (a distilled network)"
        raise ConfigError(
            f"{type(model).__name__}: its classifier is {kind}, not one nn.Linear; "
            "choose another backbone.model, such as resnet50"
        )
    return head


def classifier_name(model: nn.Module) -> str:
    """Return the name of the model's classifier in its state dict, such as `fc` or `head.fc`."""
    head = classifier(model)
    return next(name for name, module in model.named_modules() if module is head)


def encode(model: nn.Module, images: Tensor) -> Tensor:
    """Return features (B, D) of images (B, 3, H, W): exactly the input of the classifier."""
    return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]


def network_facts(config: BackboneConfig, model: nn.Module) -> dict[str, Any]:
    """Return the facts that stand beside every number: network, parameters, feature width."""
    width = "" if config.width == 1 else f" ×{config.width:g}"
    width += "".join(f", {key} {value}" for key, value in sorted((config.model_args or {}).items()))
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "network": f"{config.model}{width}",
        "parameters": parameters,
        "feature_width": classifier(model).in_features,
    }
    if config.loss == "ldam-drw":
        facts["classifier"] = (
            "cosine in training, kept as unit class vectors times s / mean |x|: it decides alike, its probabilities are "
            "those of a feature of mean length"
        )
    return facts


def usual_input(name: str) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a network, which holds the facts of its input; empty where there is none."""
    import timm

    pretrained_cfg = None if cifar.is_cifar(name) else timm.get_pretrained_cfg(name)
    return pretrained_cfg.to_dict() if pretrained_cfg else {}


def augmentation_facts(config: BackboneConfig, transform: Transform) -> dict[str, str]:
    """Return the augmentation beyond crops and flips, which stands beside every number too; empty where there is none."""
    randaugment = f" {transform.rand_n} × {transform.rand_m}" if transform.policy == "randaugment" else ""
    parts = [f"{transform.policy}{randaugment}"] if transform.policy != "none" else []
    parts += [f"cutout {transform.cutout}"] if transform.cutout else []
    parts += [f"mixup {config.mixup:g}"] if config.mixup else []
    return {"augmentation": ", ".join([transform.augment, *parts])} if parts else {}


def input_transform(
    data: DataConfig, backbone: BackboneConfig, train: Split, *, input_facts: Mapping[str, Any] | None = None
) -> Transform:
    """Return the transform of images: with the pretrained model's statistics, else the training images', else ImageNet's.

    Images in memory keep their size, and those of a frozen encoder get its own.

    Arguments:
        input_facts: of external weights, as in timm's pretrained_cfg; data.mean, data.std and data.image_size come first.
    """
    if train.images is not None:
        height, width = train.images.shape[1:3]
        size, augmentation = (int(height), int(width)), data.augment or "crop-flip"
        if augmentation == "resized-crop-flip":
            raise ConfigError(
                "data.augment=resized-crop-flip is for image files; for arrays take crop-flip, crop or none"
            )
    else:
        size, augmentation = (data.image_size or 224,) * 2, data.augment or "resized-crop-flip"
    facts: dict[str, Any] = {"crop_pct": 0.875, "interpolation": "bilinear"}
    mean: Any = IMAGENET_MEAN
    std: Any = IMAGENET_STD
    input_values = usual_input(backbone.model) if input_facts is None else input_facts
    if input_values:
        from timm.data import resolve_data_config

        resolved = resolve_data_config({}, pretrained_cfg=dict(input_values))
        facts = {"crop_pct": resolved["crop_pct"], "interpolation": resolved["interpolation"]}
        mean, std = resolved["mean"], resolved["std"]
        if data.image_size is None and (train.images is None or backbone.frozen):
            size = tuple(resolved["input_size"][1:])
    if facts["interpolation"] not in ("nearest", "bilinear", "bicubic"):
        facts["interpolation"] = "bicubic"
    if backbone.frozen:
        size = (data.image_size or size[0],) * 2
    if backbone.frozen or (train.images is None and input_facts is None and augmentation in ("crop", "crop-flip")):
        facts["crop_pct"] = 1.0  # what is trained on whole images, or on whatever fills its image, is not cut at test
    if train.images is not None and not backbone.pretrained and not input_facts:
        mean, std = channel_statistics(train.images)
    if data.cutout >= min(size):
        raise ConfigError(
            f"data.cutout={data.cutout}: would hide whole images of {size[0]} × {size[1]}; take half of it"
        )
    if data.policy == "randaugment":
        facts |= {"rand_n": data.rand_n, "rand_m": data.rand_m}
    return Transform(
        size=size, mean=tuple(data.mean or mean), std=tuple(data.std or std), augment=augmentation,
        policy=data.policy, cutout=data.cutout, **facts,
    )  # fmt: skip


@torch.inference_mode()
def check_input(model: nn.Module, transform: Transform, device: torch.device) -> None:
    """Raise DataError where the model cannot take images of this size."""
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, 3, *transform.size, device=device))
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        built = " or, to build it for them, backbone.model_args.img_size" if hasattr(model, "patch_embed") else ""
        raise DataError(
            f"the model cannot take {transform.size[0]}×{transform.size[1]} images ({reason}); set data.image_size{built}"
        ) from error
    finally:
        model.train(was_training)


def class_accuracy(correct: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return (C,) accuracy in 0…1 per class, nan where nothing was seen."""
    return np.where(total > 0, correct / np.maximum(total, 1), np.nan)
