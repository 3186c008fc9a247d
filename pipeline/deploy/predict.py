"""Labels for image files, from an exported model or straight from a run."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.images import EXTENSIONS
from pipeline.data.processes import decoding_processes, end_with_parent
from pipeline.data.transform import ImageFiles, Transform, collate, from_workers, wanted
from pipeline.deploy.inference_model import Model, load_model
from pipeline.errors import ConfigError, DataError
from pipeline.longtail import GROUPS
from pipeline.resources import usable_cores
from pipeline.text import Shown

ADVICE = "a smaller --batch-size takes less, in a container more --shm-size helps"
WORKERS_FROM = 512  # images; fewer are decoded sooner than worker processes start


@dataclass(frozen=True)
class Guess:
    """A class and its probability (0…1)."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, most probable first; stage1: what the head before rebalancing says."""

    path: str
    guesses: tuple[Guess, ...]
    stage1: tuple[Guess, ...] | None = None

    @property
    def changed(self) -> bool:
        """Whether rebalancing changed the first answer."""
        return self.stage1 is not None and self.stage1[0].name != self.guesses[0].name

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"path": self.path, "top": [vars(g) for g in self.guesses]}
        if self.stage1 is None:
            return row
        return row | {"stage1": [vars(g) for g in self.stage1], "changed": self.changed}


@dataclass
class Comparison:
    """How many first answers rebalancing changed, and from and to which groups of classes; grows by `add`."""

    groups: Mapping[str, str]
    images: int = 0
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, row: Prediction) -> None:
        self.images += 1
        if row.changed and row.stage1:
            self.moves[self.groups[row.stage1[0].name], self.groups[row.guesses[0].name]] += 1

    @property
    def changed(self) -> int:
        return self.moves.total()

    @property
    def sides(self) -> dict[str, dict[str, int]]:
        """`from` and `to`: how many of the changed answers were and are classes with many, medium, few images."""
        return {
            side: {group: sum(n for move, n in self.moves.items() if move[i] == group) for group in GROUPS}
            for i, side in enumerate(("from", "to"))
        }

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "changed": self.changed, **self.sides}

    def __str__(self) -> str:
        first = f"rebalancing changed the first answer of {self.changed:,} of {counted(self.images)}"
        told = [
            f"{side} classes with {', '.join(f'{group} ({n:,})' for group, n in of.items() if n)}"
            for side, of in self.sides.items()
        ]
        return f"{first}, {' '.join(told)} training images" if self.changed else first


@dataclass(frozen=True)
class Predictions(Shown):
    """What was said of all images, in order; skipped: why files and names gave none; compared: only where asked for."""

    rows: tuple[Prediction, ...]
    skipped: tuple[str, ...]
    compared: Comparison | None = None

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Prediction:
        return self.rows[i]

    def to_dict(self) -> dict[str, Any]:
        found = {"predictions": [row.to_dict() for row in self.rows], "skipped": list(self.skipped)}
        return found if self.compared is None else found | {"compared": self.compared.to_dict()}

    def __str__(self) -> str:
        from pipeline.deploy.prediction_lines import table_lines

        lines = [*table_lines(self.rows, [row.path for row in self.rows], width=120)]
        lines += [] if self.compared is None else [str(self.compared)]
        return "\n".join([*lines, *(f"left out: {reason}" for reason in self.skipped)])


def predict(
    model: Path | str | Model,
    images: Sequence[Path | str],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    compare: bool = False,
) -> Predictions:
    """What a model says of every readable image, in the order given (folders and globs sorted by name).

    model: a folder of `pipeline export`, a run, or what load_model made of one. images: files, folders (with all below)
    and globs. compare: also what the head before rebalancing says. For very many images, `label` gives rows as they come.
    Raises DataError where the model or all images cannot be read, ConfigError for top_k or batch_size below 1.
    """
    skipped: list[str] = []
    paths = find_images([images] if isinstance(images, str | Path) else images, skipped.append)
    loaded = model if isinstance(model, Model) else load_model(model, device=device)
    found = label(loaded, paths, top_k=top_k, batch_size=batch_size, compare=compare, skipped=skipped.append)
    comparison = Comparison(loaded.groups) if compare else None
    rows = []
    for row in found:
        rows.append(row)
        if comparison is not None:
            comparison.add(row)
    return Predictions(tuple(rows), tuple(skipped), comparison)


def counted(images: int) -> str:
    return f"{images:,} image{'' if images == 1 else 's'}"


def label(
    model: Model,
    paths: Sequence[Path],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    compare: bool = False,
    skipped: Callable[[str], object] = lambda reason: None,
) -> Iterator[Prediction]:
    """Yields a Prediction for every readable file as soon as its batch is done; never more than a few batches are held.

    skipped is called with the reason for each file that cannot be read; DataError at the end where none could.
    """
    if top_k < 1 or batch_size < 1:
        raise ConfigError("top-k and batch size must be 1 or more")
    read, first_reason = 0, ""
    for start, pixels, reasons in _read(paths, model.transform, batch_size):
        good = [i for i, reason in enumerate(reasons) if reason is None]
        for reason in filter(None, reasons):
            first_reason = first_reason or reason
            skipped(reason)
        if not good:
            continue
        read += len(good)
        logits, features = model.run(pixels if len(good) == len(reasons) else pixels[good])
        heads = [logits, model.stage1.logits(features)] if compare else [logits]
        each = [_top(of, top_k, model.class_names) for of in heads]
        for position, i in enumerate(good):
            yield Prediction(str(paths[start + i]), *(guesses[position] for guesses in each))
    if not read:
        raise DataError(f"none of {counted(len(paths))} could be read; the first: {first_reason}")


def find_images(images: Sequence[Path | str], skipped: Callable[[str], object] = lambda reason: None) -> list[Path]:
    """Files as they are, folders with every image below them, globs; each file once, under the first name it has here.

    skipped is called with the reason for each name that leads to no image; DataError where none does.
    """
    found: dict[str, Path] = {}
    reasons = []
    for given in images:
        path = Path(given)
        if path.is_dir():
            inside = _below(path)
        elif path.is_file():
            inside = [path]
        else:
            inside = sorted(Path(p) for p in glob.glob(str(given), recursive=True) if Path(p).is_file())
        if not inside:
            kind = "no image in this folder" if path.is_dir() else "no such file, folder or pattern"
            reasons.append(f"{given}: {kind}")
        for file in inside:
            found.setdefault(os.path.abspath(file), file)
    if not found:
        first = reasons[0] if reasons else "no image was given"
        raise DataError(f"{first}; give image files ({', '.join(sorted(EXTENSIONS))}), folders or patterns")
    for reason in reasons:
        skipped(reason)
    return list(found.values())


def _below(root: Path) -> list[Path]:
    """Every file below a folder that calls itself an image, by name; links are followed, in a circle only once."""
    found, seen = [], set()
    for folder, below, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            below.clear()
            continue
        seen.add(here)
        names = (name for name in files if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS)
        found += [path for path in (Path(folder, name) for name in names) if path.is_file()]
    return sorted(found)


def _read(
    paths: Sequence[Path], transform: Transform, batch_size: int
) -> Iterator[tuple[int, Tensor, list[str | None]]]:
    """(position of the first, pixels (B, 3, H, W) uint8, why each could not be read or None) of each batch of files."""
    rows = np.arange(len(paths))
    split = Split(labels=np.zeros_like(rows), ids=rows, stored=FileNames(map(str, paths)).below(Path()))
    starts = range(0, len(paths), batch_size)
    workers = min(8, usable_cores()) if len(paths) >= WORKERS_FROM else 0
    files: DataLoader[Any] = DataLoader(
        ImageFiles(split, transform),
        batch_sampler=(wanted(split, batch, batch, key=None) for batch in np.split(rows, starts[1:])),
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=decoding_processes() if workers else None,
        worker_init_fn=end_with_parent if workers else None,
    )
    for start, (pixels, reasons) in zip(starts, from_workers(files, ADVICE), strict=True):
        yield start, pixels, reasons


def _top(logits: Tensor, top_k: int, names: Sequence[str]) -> list[tuple[Guess, ...]]:
    values, classes = logits.softmax(1).topk(min(top_k, len(names)), dim=1)
    both = zip(values.tolist(), classes.tolist(), strict=True)
    return [tuple(Guess(names[c], p) for p, c in zip(ps, cs, strict=True)) for ps, cs in both]
