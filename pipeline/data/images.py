"""Image files to RGB: whatever a person's folder holds."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})


def read_image(path: Path | str) -> Image.Image:
    """The image as 8-bit RGB, turned as its EXIF orientation says.

    Grey is repeated, CMYK and palettes converted, alpha dropped, 16-bit grey scaled to 8 bits (value / 257).
    Raises DataError naming the file if it is missing, truncated or no image.
    """
    return decode_image(path, str(path))


def decode_image(content: Path | str | BinaryIO, name: str) -> Image.Image:
    """The same from an open file as well; errors call the image by its name."""
    try:
        with Image.open(content) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
    except Exception as error:  # of damaged bytes Pillow's decoders raise almost anything
        reason = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{name}: unreadable image ({reason}); replace it or take it away") from error
    if turned.mode.startswith("I") or turned.mode == "F":
        pixels = np.asarray(turned).astype(np.float64)
        # "I" and "F" say nothing of their range
        scale = 257.0 if turned.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 1.0
        turned = Image.fromarray(np.clip(np.round(pixels / scale), 0, 255).astype(np.uint8))
    if turned.mode == "P" and "transparency" in turned.info:
        turned = turned.convert("RGBA")
    return turned.convert("RGB")
