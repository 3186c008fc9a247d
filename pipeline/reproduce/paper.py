"""Accuracies that the paper prints, in %, settings that it names, and the differences of a configuration from them.

Inverse Weight-Balancing for Deep Long-Tailed Learning (AAAI 2024). No number in here was measured by this project.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.backbone.training_dir import NOT_IDENTITY
from pipeline.config import BackboneConfig, Config, DataConfig

Accuracies = dict[str, float]  # of many, medium, few, all, those that are printed
GROUPS = ("many", "medium", "few", "all")


def _four(*values: float) -> Accuracies:
    return dict(zip(GROUPS, values, strict=True))


@dataclass(frozen=True)
class Published:
    """One data set of the paper.

    Arguments:
        network: the one behind its numbers, as far as is known.
        backbone, stage_2: the settings that the paper gives.
        methods: its comparison of methods, trained in many ways and on several networks.
        rows: of its other tables and figures, by the name of the variant here.
        lams: IWB + CB at a given λ.
    """

    name: str
    network: str
    backbone: Mapping[str, Any]
    stage_2: Mapping[str, Any]
    methods: Mapping[str, Accuracies]
    rows: Mapping[str, Accuracies] = field(default_factory=dict)
    lams: Mapping[float, Accuracies] = field(default_factory=dict)


CIFAR_BACKBONE = {"model": "cifar_resnet34", "epochs": 200, "batch_size": 64, "lr": 0.01, "weight_decay": 5e-3}
CIFAR_STAGE_2 = {"batch_size": 64, "lr": 0.005, "epochs": 10}
CIFAR_NETWORK = (
    "ResNet-34 with a 3×3 stem (21.3 M parameters, 512-d), by the public recipe it follows; the text does not say"
)

IF100 = Published(
    "CIFAR100-LT, imbalance factor 100",
    CIFAR_NETWORK,
    CIFAR_BACKBONE,
    CIFAR_STAGE_2,
    methods={
        "baseline": _four(77.5, 46.5, 13.3, 47.4),
        "focal": {"all": 38.41},
        "cb": {"all": 39.60},
        "iwb": _four(71.9, 54.2, 35.7, 54.8),
        "ldam-drw": {"all": 42.04},
        "logit-adjust": {"all": 43.89},
        "tau-norm": {"all": 47.73},
        "iif": {"all": 48.8},
        "balanced-softmax": {"all": 49.20},
        "marc": {"all": 52.96},
        "maxnorm": {"all": 53.55},
    },
    lams={0.05: {"few": 33.5, "all": 54.4}, 0.15: _four(71.9, 54.2, 35.7, 54.8), 0.2: {"few": 36.1}},
)
IF50 = Published(
    "CIFAR100-LT, imbalance factor 50",
    CIFAR_NETWORK,
    CIFAR_BACKBONE,
    CIFAR_STAGE_2,
    methods={
        "focal": {"all": 44.32},
        "cb": {"all": 45.32},
        "iwb": {"all": 57.82},
        "ldam-drw": {"all": 46.62},
        "logit-adjust": {"all": 47.03},
        "tau-norm": {"all": 52.53},
        "maxnorm": {"all": 57.71},
    },
    rows={
        "IWB + CB": {"all": 57.82},
        "NC·HC vector": {"all": 57.82},
        "text, 1, 2, softmax = paper": {"all": 57.82},
        "code, batch, e, bce = code": {"all": 57.82},
        "IWB without CB": {"all": 56.3},
    },
)
IMAGENET = Published(
    "ImageNet-LT",
    "ResNeXt-50",
    {"model": "resnext50_32x4d", "epochs": 200, "batch_size": 128, "lr": 0.01, "weight_decay": 5e-4},
    {"batch_size": 512, "lr": 0.01, "epochs": 10},
    methods={
        "baseline": _four(65.9, 37.5, 7.7, 44.4),
        "iwb": _four(64.2, 52.2, 40.2, 55.2),
        "logit-adjust": {"all": 51.1},
        "tau-norm": {"all": 49.4},
        "crt": {"all": 49.6},
        "balanced-softmax": {"all": 41.8},
        "marc": {"all": 52.3},
        "ala": {"all": 53.3},
        "maxnorm": {"all": 53.9},
    },
)
INAT = Published(
    "iNaturalist 2018",
    "ResNet-50",
    {"model": "resnet50", "epochs": 200, "batch_size": 512, "lr": 0.02, "weight_decay": 1e-4},
    {"batch_size": 512, "lr": 2e-4, "epochs": 10},
    methods={
        "baseline": _four(72.2, 63.0, 57.2, 61.7),
        "iwb": _four(72.3, 70.6, 72.5, 71.5),
        "logit-adjust": {"all": 69.9},
        "tau-norm": {"all": 65.6},
        "crt": {"all": 65.2},
        "marc": {"all": 70.4},
        "ala": {"all": 70.7},
        "maxnorm": {"all": 70.2},
    },
)
BY_SIZE = {(100, 10_847): IF100, (100, 12_608): IF50, (1000, 115_846): IMAGENET}


def published_of(counts: Sequence[int]) -> Published | None:
    """Return the paper's entry for the data set with these training images per class; None where it has none."""
    if len(counts) == 8142:
        return INAT  # with or without the images that are held out for validation
    return BY_SIZE.get((len(counts), int(sum(counts))))


def variant_accuracies(published: Published | None, row: Mapping[str, Any]) -> Accuracies | None:
    """Return the paper's accuracies for a row of an ablation; the row itself carries those of imbalance factor 100."""
    if published is None:
        return None
    if published is IF100:
        return dict(row["paper"]) or None
    if row["method"] == "baseline":
        return published.methods.get("baseline")
    return published.rows.get(row["name"])


def deviations(config: Config, published: Published | None, network: Mapping[str, Any] | None = None) -> list[str]:
    """Return a sentence on each difference of a reproduction from the paper; network: facts of the trained one."""
    sentences = []
    if published is None:
        sentences.append("Data: the paper has no number on these images; nothing stands beside ours.")
    else:
        sentences += [f"Data: {published.name}, as in the paper.", *_stage_1(config.backbone, published, network)]
        sentences += _augmentation(config.data, published)
        settings = config.rebalance.model_dump(mode="json")
        sentences += [
            f"Stage 2: {k} {settings[k]}, paper {v}." for k, v in published.stage_2.items() if settings[k] != v
        ]
    stored = config.dump.views - 1
    sentences += [
        "Stage 1: the last epoch is taken; no epoch is chosen on any split.",
        f"Views: stage 2 sees {stored or 'no'} stored augmented view(s) and the clean one; the released code augments anew, the "
        "text is silent.",
        "Batch normalisation: the encoder stays in evaluation mode; the released code leaves it in training mode.",
        f"Formulation: `{config.rebalance.formulation}` where a row says no other; text and released code disagree.",
        "Logarithm of NC: base 2, as the text has it, where a row says no other; the printed λ probably mean base e (base 2 "
        "with λ is base e with λ/ln 2).",
        "Selection: λ and learning rates by balanced accuracy on validation images that are in no other split, the last epoch "
        "of stage 2; the released code takes the best epoch on the test split.",
        "Test: one crop; the released code averages an image with its mirror image.",
        "The printed numbers come without a standard deviation or a number of runs.",
    ]
    return sentences


def _stage_1(backbone: BackboneConfig, published: Published, network: Mapping[str, Any] | None) -> list[str]:
    """Return sentences on the network and on the settings of stage 1 that are not the paper's."""
    paper = _flat(BackboneConfig().model_dump(mode="json") | dict(published.backbone))
    settings = _flat(backbone.model_dump(mode="json", exclude={*NOT_IDENTITY, "seed", "precision"}))
    facts = (
        f"{network['network']}, {network['parameters']:,} parameters, {network['feature_width']}-d"
        if network
        else f"{backbone.model}" + (f" ×{backbone.width:g}" if backbone.width != 1 else "")
    )
    sentences = [f"Network: {facts}. The paper's: {published.network}."]
    if (
        network
        and network["parameters"]
        and published.backbone is CIFAR_BACKBONE
        and settings["model"] != paper["model"]
    ):
        times = 21_328_292 / network["parameters"]
        sentences.append(
            f"The networks differ {times:.0f}-fold in parameters, so differences to the paper say nothing of the method."
        )
    sentences += [f"Stage 1: {k} {v}, paper {paper[k]}." for k, v in settings.items() if k != "model" and v != paper[k]]
    return sentences


def _augmentation(data: DataConfig, published: Published) -> list[str]:
    """Return a sentence on augmentation beyond the paper's crop and flip, which is worth points of its own."""
    plain = DataConfig(source=data.source, path=data.path, train_list=data.train_list)
    extra = [f"{k} {getattr(data, k)}" for k in ("policy", "cutout") if getattr(data, k) != getattr(plain, k)]
    flip = "resized-crop-flip" if published in (IMAGENET, INAT) else "crop-flip"
    extra += [f"augment {data.augment}"] if data.augment != flip else []
    return [f"Augmentation: {', '.join(extra)}, paper crop and flip alone."] if extra else []


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with keys such as `weaken.strength` for sections of a section."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
