"""Image files to RGB: whatever a person's folder holds."""

import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import DataError
from pipeline.text import printable

EXTENSIONS = frozenset(  # .avif is read by Pillow 11.3 or newer, and named as unreadable by an older one
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
)


ORIENTATION = 0x0112  # of EXIF; nothing else in it matters here
TURNS = {  # orientation → what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image_name(name: str) -> bool:
    """Return True for the name of a file, not a hidden one, that ends as images do."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def read_image(path: Path | str) -> Image.Image:
    """The image as 8-bit RGB, turned as its EXIF orientation says.

    Grey is repeated, CMYK and palettes converted, alpha dropped, 16-bit grey scaled to 8 bits (value / 257), floating-point
    pixels in 0…1 to 0…255.
    Raises DataError naming the file if it is missing, truncated, no image, or its pixels have no known range.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for who writes to it
            raise DataError(f"{path}: unreadable image (not a file); replace it or take it away")
    except OSError as error:
        raise DataError(f"{path}: unreadable image ({error.strerror}); replace it or take it away") from error
    return decode_image(path, str(path))


def decode_image(content: Path | str | BinaryIO, name: str) -> Image.Image:
    """Return the image of a path or an open file; errors and decoders' warnings name the image."""
    try:
        with warnings.catch_warnings(record=True) as remarks, Image.open(content) as image:
            warnings.simplefilter("always")
            image.load()
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
            turned = image.copy() if turn is None else image.transpose(turn)
    except Exception as error:  # of damaged bytes Pillow's decoders raise almost anything
        reason = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{name}: unreadable image ({reason}); replace it or take it away") from error
    for remark in remarks:
        warnings.warn(printable(f"{name}: {remark.message}"), remark.category, stacklevel=2)
    if turned.mode == "F":
        turned = _grey_of_floats(np.asarray(turned), name)
    elif turned.mode.startswith("I"):
        pixels = np.asarray(turned).astype(np.float64)
        # "I" says nothing of its range
        scale = 257.0 if turned.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 1.0
        turned = Image.fromarray(np.clip(np.round(pixels / scale), 0, 255).astype(np.uint8))
    if turned.mode == "P" and "transparency" in turned.info:
        turned = turned.convert("RGBA")
    return turned.convert("RGB")


def _grey_of_floats(pixels: np.ndarray, name: str) -> Image.Image:
    """The image of floating-point pixels (H, W) in 0…1; DataError for others, whose black and white nobody knows."""
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 1:  # false for nan too
        kind = "pixels that are no number" if np.isnan(low) else f"floating-point pixels from {low:g} to {high:g}"
        raise DataError(f"{name}: unreadable image ({kind}); save it with pixels in 0…1 or with 8 or 16 bits")
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))
