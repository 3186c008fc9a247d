"""Every operation against torchvision's on single images, over the whole range of its magnitudes."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import functional as F

from pipeline.data.operations import BATCHED, cutout, numbers_of
from pipeline.data.policies import SIGNED, magnitude

HEIGHT, WIDTH = 22, 20


@pytest.fixture(scope="module")
def images():
    """A photograph, noise, one colour, two colours: (4, 3, H, W) uint8."""
    photograph = F.resize(torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1), [HEIGHT, WIDTH])
    noise = torch.randint(0, 256, photograph.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    two = torch.where(noise > 99, noise.new_tensor(200), noise.new_tensor(30))
    return torch.stack([photograph, noise, torch.full_like(noise, 77), two])


def theirs(name, image, by):
    slope = math.degrees(math.atan(by))
    moved = {"angle": 0.0, "scale": 1.0}
    sheared = moved | {"translate": [0, 0], "center": [0, 0]}
    return {
        "ShearX": lambda: F.affine(image, shear=[slope, 0.0], **sheared),
        "ShearY": lambda: F.affine(image, shear=[0.0, slope], **sheared),
        "TranslateX": lambda: F.affine(image, translate=[int(by), 0], shear=[0.0, 0.0], **moved),
        "TranslateY": lambda: F.affine(image, translate=[0, int(by)], shear=[0.0, 0.0], **moved),
        "Rotate": lambda: F.rotate(image, by),
        "Brightness": lambda: F.adjust_brightness(image, 1 + by),
        "Color": lambda: F.adjust_saturation(image, 1 + by),
        "Contrast": lambda: F.adjust_contrast(image, 1 + by),
        "Sharpness": lambda: F.adjust_sharpness(image, 1 + by),
        "Posterize": lambda: F.posterize(image, int(by)),
        "Solarize": lambda: F.solarize(image, by),
        "AutoContrast": lambda: F.autocontrast(image),
        "Equalize": lambda: F.equalize(image),
        "Invert": lambda: F.invert(image),
    }[name]()


def halfway(numbers):
    """(n, H, W): whether the place an affine map reads lies as near to one pixel as to another, but for rounding."""
    x, y = np.arange(WIDTH), np.arange(HEIGHT)[:, None]
    a, b, c, d, e, f = numbers.astype(np.float64).T[:, :, None, None]
    return np.any([np.abs(place % 1 - 0.5) < 1e-4 for place in (a * x + b * y + c, d * x + e * y + f)], axis=0)


@pytest.mark.parametrize("name", BATCHED)
def test_an_operation_is_torchvisions(name, images):
    by = magnitude(name, np.linspace(0, 1, 13), height=HEIGHT, width=WIDTH)
    by = np.concatenate([by, -by]) if name in SIGNED else by
    numbers = np.repeat(numbers_of(name, by, height=HEIGHT, width=WIDTH), len(images), 0)
    ours = BATCHED[name](images.repeat(len(by), 1, 1, 1), torch.from_numpy(numbers))
    expected = torch.stack([theirs(name, image, float(b)) for b in by for image in images])
    assert ours.dtype == torch.uint8
    off = (ours.int() - expected.int()).abs().amax(1).numpy()
    if BATCHED[name].__name__ == "affine":
        off[halfway(numbers)] = 0
        assert off.max() == 0
        assert halfway(numbers).mean() < 0.02
    else:
        assert off.max() <= (1 if name in ("Color", "Sharpness", "Contrast") else 0)  # a product added in one rounding
    moved = BATCHED[name](images[:1], torch.from_numpy(numbers[-1:]))
    assert not torch.equal(moved, images[:1])


def test_small_images_have_no_inside_to_sharpen():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert torch.equal(BATCHED["Sharpness"](image, torch.full((1, 6), 1.9)), image)


def test_cutout_by_hand():
    images = torch.zeros(3, 3, 6, 5, dtype=torch.uint8)
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8)
    done = cutout(images, torch.tensor([[3, 2], [0, 0], [5, 4]]), size=4, fill=fill)
    for image, rows, columns in zip(
        done, (slice(1, 5), slice(0, 2), slice(3, 6)), (slice(0, 4), slice(0, 2), slice(2, 5)), strict=True
    ):
        expected = torch.zeros_like(image)
        expected[:, rows, columns] = fill[:, None, None]
        assert torch.equal(image, expected)
