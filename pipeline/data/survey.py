"""The facts of a folder of images that its settings depend on: classes, sizes, formats, and images that are unusual."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.dataset import DataSource, Split
from pipeline.data.files import Files

MOST_HEADERS = 5000  # files whose headers are read, spread over all
MOST_HASHED = 1 << 30  # bytes of files that are compared with others of the same size
LONG = 3.0  # longer over shorter side
TINY = 32  # pixels of the shorter side
EXAMPLES = 2
MANY_FRAMES = ("GIF", "TIFF", "WEBP", "PNG")  # formats whose files may hold several images


@dataclass(frozen=True)
class ImageSurvey:
    """The facts of the image files of a source.

    Arguments:
        counts: split → images per class, in the order of class_names.
        sides: (n, 2) height and width of the images whose headers were read, n at most MOST_HEADERS.
        formats: format → such images.
        oddities: a phrase on each kind of unusual images.
        notes: of the source.
    """

    class_names: tuple[str, ...]
    counts: dict[str, list[int]]
    sides: np.ndarray
    formats: dict[str, int]
    oddities: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def images(self) -> int:
        """Images in all splits."""
        return sum(map(sum, self.counts.values()))

    @property
    def shorter_side(self) -> int:
        """Median in pixels of the shorter side, 0 where no header could be read."""
        return int(np.median(self.sides.min(1))) if len(self.sides) else 0


def survey_images(source: DataSource) -> ImageSurvey:
    """Return the facts of a source of image files; of more than MOST_HEADERS files as many headers are read."""
    splits = {name: split for name in ("train", "val", "test") if (split := getattr(source, name)) is not None}
    rows = [(split, row) for split in splits for row in range(len(splits[split]))]
    step = -(-len(rows) // MOST_HEADERS)
    sides, formats, kinds = [], Counter[str](), dict[str, list[str]]()
    for split, row in rows[::step]:
        path = Path(_files(splits[split])[row])
        try:
            with Image.open(path) as image:
                width, height = image.size
                formats[image.format or "unknown"] += 1
                marks = list(_marks(image))
        except Exception:  # of damaged bytes Pillow raises almost anything
            marks = ["cannot be opened"]
        else:
            sides.append((height, width))
        for mark in marks:
            kinds.setdefault(mark, []).append(_files(splits[split]).relative(row))
    sample = f" of {len(rows[::step]):,} that were looked at" if step > 1 else ""
    oddities = [f"{len(names):,} image(s){sample} {mark}: {_examples(names)}" for mark, names in kinds.items()]
    return ImageSurvey(
        class_names=source.class_names,
        counts={n: np.bincount(s.labels, minlength=len(source.class_names)).tolist() for n, s in splits.items()},
        sides=np.array(sides, dtype=np.int64).reshape(-1, 2),
        formats=dict(formats.most_common()),
        oddities=(*oddities, *copy_notes(splits)),
        notes=source.notes,
    )


def copy_notes(splits: dict[str, Split]) -> Iterator[str]:
    """Yield phrases on files of the same bytes: in several classes, in several splits, and the rest."""
    groups: dict[int, list[tuple[str, int]]] = {}
    for name, split in splits.items():
        for row, size in enumerate(_files(split).sizes.tolist()):
            groups.setdefault(size, []).append((name, row))
    alike = [(size, places) for size, places in groups.items() if len(places) > 1 and size > 0]
    if sum(size * len(places) for size, places in alike) > MOST_HASHED:
        return
    copies: dict[bytes, list[tuple[str, int]]] = {}
    for _, places in alike:
        for name, row in places:
            try:
                content = Path(_files(splits[name])[row]).read_bytes()
            except OSError:
                continue
            copies.setdefault(hashlib.sha256(content).digest(), []).append((name, row))
    kinds: dict[str, list[str]] = {}
    for places in copies.values():
        if len(places) == 1:
            continue
        names = [_files(splits[name]).relative(row) for name, row in places]
        if len({int(splits[name].labels[row]) for name, row in places}) > 1:
            kind = "group(s) of equal files lie in several classes, so that one of their labels is wrong"
        elif len({name for name, _ in places}) > 1:
            kind = (
                "group(s) of equal files lie in training and in validation or test images, which flatters the accuracy"
            )
        else:
            kind = "group(s) of equal files lie several times in one class"
        kinds.setdefault(kind, []).append(" = ".join(names[:EXAMPLES]))
    yield from (f"{len(names):,} {kind}: {_examples(names)}" for kind, names in kinds.items())


def _marks(image: Image.Image) -> Iterator[str]:
    """Yield what is unusual about an image whose header was read."""
    shorter, longer = sorted(image.size)
    if shorter < TINY:
        yield f"have a side under {TINY} pixels"
    if longer > LONG * shorter:
        yield f"are more than {LONG:g} times as long as wide, of which the middle is taken"
    if image.format in MANY_FRAMES and getattr(image, "is_animated", False):
        yield "have several frames, of which the first is taken"
    if image.mode == "CMYK":
        yield "are CMYK, which is converted to RGB"


def _files(split: Split) -> Files:
    assert isinstance(split.stored, Files)
    return split.stored


def _examples(names: list[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")
