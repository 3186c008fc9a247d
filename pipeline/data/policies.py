"""Learned augmentation policies: which operation meets which image, drawn per sample, run once for all images it meets."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.data.copies import on_device
from pipeline.data.operations import BATCHED, NUMBERS, Batched, numbers_of
from pipeline.seeds import uniform

IDENTITY = "Identity"
NAMES = (IDENTITY, *BATCHED)
SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}
RANDAUGMENT = tuple(name for name in NAMES if name != "Invert")
LEVELS = 10  # magnitudes of AutoAugment
RAND_LEVELS = 31  # magnitudes of RandAugment

# Cubuk et al., CVPR 2019, appendix: two operations a line, each with its probability and its level, 0 where it has none.
_AUTOAUGMENT = {
    "autoaugment-cifar10": """
        Invert .1 0 Contrast .2 6
        Rotate .7 2 TranslateX .3 9
        Sharpness .8 1 Sharpness .9 3
        ShearY .5 8 TranslateY .7 9
        AutoContrast .5 0 Equalize .9 0
        ShearY .2 7 Posterize .3 7
        Color .4 3 Brightness .6 7
        Sharpness .3 9 Brightness .7 9
        Equalize .6 0 Equalize .5 0
        Contrast .6 7 Sharpness .6 5
        Color .7 7 TranslateX .5 8
        Equalize .3 0 AutoContrast .4 0
        TranslateY .4 3 Sharpness .2 6
        Brightness .9 6 Color .2 8
        Solarize .5 2 Invert 0 0
        Equalize .2 0 AutoContrast .6 0
        Equalize .2 0 Equalize .6 0
        Color .9 9 Equalize .6 0
        AutoContrast .8 0 Solarize .2 8
        Brightness .1 3 Color .7 0
        Solarize .4 5 AutoContrast .9 0
        TranslateY .9 9 TranslateY .7 9
        AutoContrast .9 0 Solarize .8 3
        Equalize .8 0 Invert .1 0
        TranslateY .7 9 AutoContrast .9 0
    """,
    "autoaugment-imagenet": """
        Posterize .4 8 Rotate .6 9
        Solarize .6 5 AutoContrast .6 0
        Equalize .8 0 Equalize .6 0
        Posterize .6 7 Posterize .6 6
        Equalize .4 0 Solarize .2 4
        Equalize .4 0 Rotate .8 8
        Solarize .6 3 Equalize .6 0
        Posterize .8 5 Equalize 1 0
        Rotate .2 3 Solarize .6 8
        Equalize .6 0 Posterize .4 6
        Rotate .8 8 Color .4 0
        Rotate .4 9 Equalize .6 0
        Equalize 0 0 Equalize .8 0
        Invert .6 0 Equalize 1 0
        Color .6 4 Contrast 1 8
        Rotate .8 8 Color 1 2
        Color .8 8 Solarize .8 7
        Sharpness .4 7 Invert .6 0
        ShearX .6 5 Equalize 1 0
        Color .4 0 Equalize .6 0
        Equalize .4 0 Solarize .2 4
        Solarize .6 5 AutoContrast .6 0
        Invert .6 0 Equalize 1 0
        Color .6 4 Contrast 1 8
        Equalize .8 0 Equalize .6 0
    """,
}


@dataclass(frozen=True)
class Plan:
    """The operations on a batch, step by step: names (S, B) of operations, magnitudes (S, B) in their own units."""

    names: np.ndarray
    magnitudes: np.ndarray


def drawn(policy: str, ids: np.ndarray, key: int, *, height: int, width: int, rand_n: int = 2, rand_m: int = 9) -> Plan:
    """The operations of each sample, a function of (key, id) alone.

    policy: autoaugment-cifar10 or -imagenet (Cubuk et al., 2019): one of 25 pairs; randaugment (Cubuk et al., 2020):
    rand_n of 14 operations at level rand_m of 30. Half of the magnitudes that have a sign are turned around.
    """
    if policy == "randaugment":
        draws = uniform(key, ids, 2 * rand_n).T
        names = np.array(RANDAUGMENT)[(draws[:rand_n] * len(RANDAUGMENT)).astype(np.int64)]
        levels = np.full(names.shape, rand_m / (RAND_LEVELS - 1))
        signs = draws[rand_n:]
    else:
        table_names, probabilities, table_levels = autoaugment(policy)
        draws = uniform(key, ids, 5).T
        pair = (draws[0] * len(table_names)).astype(np.int64)
        names = np.where(draws[1:3] < probabilities[pair].T, table_names[pair].T, IDENTITY)
        levels, signs = table_levels[pair].T / (LEVELS - 1), draws[3:]
    magnitudes = np.zeros(names.shape)
    for name in np.unique(names):
        matches = names == name
        magnitudes[matches] = magnitude(str(name), levels[matches], height=height, width=width)
        if name in SIGNED:
            magnitudes[matches] *= np.where(signs[matches] < 0.5, -1, 1)
    return Plan(names, magnitudes)


def magnitude(name: str, level: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Return magnitudes in the operation's own units at levels 0…1 (Cubuk et al., 2019, table 6)."""
    tops = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0}
    tops |= {"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height}
    tops |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)
    if name == "Posterize":
        return 8 - np.round(4 * level)
    if name == "Solarize":
        return 255 * (1 - level)
    return tops.get(name, 0.0) * level


def autoaugment(policy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(names, probabilities, levels 0…9), each (25, 2), of one of the published policies."""
    words = np.array([line.split() for line in _AUTOAUGMENT[policy].strip().splitlines()])
    return words[:, [0, 3]], words[:, [1, 4]].astype(np.float64), words[:, [2, 5]].astype(np.int64)


def apply(plan: Plan, images: Tensor) -> Tensor:
    """Return the images (B, 3, H, W) uint8 after the operations of a plan; the tensor given is overwritten.

    Each operation runs once a step, on the images that it meets; all that move pixels run as one.
    """
    height, width = images.shape[-2:]
    for names, magnitudes in zip(plan.names, plan.magnitudes, strict=True):
        matches: dict[Batched, list[np.ndarray]] = {}
        numbers = np.zeros((len(names), NUMBERS), np.float32)
        for name in map(str, np.unique(names[names != IDENTITY])):
            rows = np.flatnonzero(names == name)
            numbers[rows] = numbers_of(name, magnitudes[rows], height=height, width=width)
            matches.setdefault(BATCHED[name], []).append(rows)
        groups = [np.concatenate(rows) for rows in matches.values()]
        if not groups:
            continue
        order = np.concatenate(groups)
        sizes = [len(rows) for rows in groups]
        places = on_device(order, images.device).split(sizes)
        values = on_device(numbers[order], images.device).split(sizes)
        for operation, rows, arguments in zip(matches, places, values, strict=True):
            images[rows] = operation(images[rows], arguments)
    return images
