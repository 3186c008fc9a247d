"""Operations of the augmentation policies, on whole batches (B, 3, H, W) uint8, each image with its own numbers.

What becomes of an image is the same in any batch: sums are exact, and every product and sum is rounded by itself.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

NUMBERS = 6  # each image brings this many, whatever the operation: an affine map has the most


def affine(images: Tensor, maps: Tensor) -> Tensor:
    """Each image read at the pixel nearest to a·x + b·y + c, d·x + e·y + f; black where that is outside.

    maps (B, 6): a…f in pixels, for output column x and row y.
    """
    batch, channels, height, width = images.shape
    x = torch.arange(width, device=images.device, dtype=torch.float32)
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None]
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)
    column, row = (a * x + b * y + c).round(), (d * x + e * y + f).round()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = torch.where(inside, row * width + column, 0).long().view(batch, 1, -1).expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, source).view_as(images)
    return torch.where(inside[:, None], moved, 0)


def brightness(images: Tensor, numbers: Tensor) -> Tensor:
    """Each image times its factor."""
    return (images * _first(numbers)).clamp_(0, 255).to(torch.uint8)


def colour(images: Tensor, numbers: Tensor) -> Tensor:
    """Each image blended with its grey version: factor 0 is grey, 1 the image itself."""
    return _blend(images, _grey(images), _first(numbers))


def contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """Each image blended with the mean of its grey version."""
    mean = _grey(images).sum((1, 2, 3), keepdim=True, dtype=torch.float64) / images[0, 0].numel()
    return _blend(images, mean.float(), _first(numbers))


def sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """Each image blended with its blurred version, weights 5 in the middle and 1 around; the border stays."""
    if min(images.shape[-2:]) <= 2:
        return images
    pixels = images.short()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = pixels[:, :, 1:-1, 1:-1]
    blurred = (around + 4 * inner + 6).div_(13, rounding_mode="floor")
    done = images.clone()
    done[:, :, 1:-1, 1:-1] = _blend(inner, blurred, _first(numbers))
    return done


def posterize(images: Tensor, numbers: Tensor) -> Tensor:
    """The highest bits of each value; numbers: how many."""
    return images & (256 - torch.exp2(8 - _first(numbers))).to(torch.uint8)


def solarize(images: Tensor, numbers: Tensor) -> Tensor:
    """Values from a threshold on inverted."""
    return torch.where(images >= _first(numbers), 255 - images, images)


def autocontrast(images: Tensor, numbers: Tensor) -> Tensor:
    """Each channel stretched to 0…255."""
    return functional.autocontrast(images)


def equalize(images: Tensor, numbers: Tensor) -> Tensor:
    """Each channel with its histogram flattened."""
    return functional.equalize(images)


def invert(images: Tensor, numbers: Tensor) -> Tensor:
    """255 − value."""
    return 255 - images


Batched = Callable[[Tensor, Tensor], Tensor]
BATCHED: dict[str, Batched] = {
    **dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), affine),
    "Brightness": brightness,
    "Color": colour,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
}


def numbers_of(name: str, magnitudes: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """(n, 6) float32: what an operation takes for n magnitudes in its own units.

    Shears are slopes, translations pixels (cut to whole ones), rotations degrees against the clock; Brightness, Color,
    Contrast and Sharpness differences of the factor from 1; Posterize bits; Solarize a threshold in 0…255.
    """
    ones, zeros = np.ones_like(magnitudes), np.zeros_like(magnitudes)
    if name == "ShearX":  # around the upper left corner, as the policies were searched with
        columns = [ones, magnitudes, magnitudes / 2, zeros, ones, zeros]
    elif name == "ShearY":
        columns = [ones, zeros, zeros, magnitudes, ones, magnitudes / 2]
    elif name == "TranslateX":
        columns = [ones, zeros, -np.trunc(magnitudes), zeros, ones, zeros]
    elif name == "TranslateY":
        columns = [ones, zeros, zeros, zeros, ones, -np.trunc(magnitudes)]
    elif name == "Rotate":
        cos, sin = np.cos(np.radians(magnitudes)), np.sin(np.radians(magnitudes))
        x, y = (width - 1) / 2, (height - 1) / 2
        columns = [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
    else:
        factor = 1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0
        columns = [factor + magnitudes] * NUMBERS
    return np.stack(columns, 1).astype(np.float32)


def cutout(images: Tensor, centres: Tensor, *, size: int, fill: Tensor) -> Tensor:
    """Each image with a square of size × size around its centre filled, cut off at the border (DeVries and Taylor, 2017).

    centres (B, 2): row and column. fill (3,) uint8: the mean colour, which normalisation takes to 0.
    """
    height, width = images.shape[-2:]
    start = centres - size // 2
    rows = torch.arange(height, device=images.device) - start[:, :1]
    columns = torch.arange(width, device=images.device) - start[:, 1:]
    hole = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
    return torch.where(hole[:, None], fill[:, None, None], images)


def _first(numbers: Tensor) -> Tensor:
    return numbers[:, 0, None, None, None]


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()[:, None]


def _blend(images: Tensor, overlay: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + overlay * (1 - factor)).clamp_(0, 255).to(torch.uint8)
