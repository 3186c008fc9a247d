"""Labels for image files, from an exported model or straight from a run."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from cache import refuse_unwritable
from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.images import EXTENSIONS, is_image_name
from pipeline.data.names import holds_no_images
from pipeline.data.processes import decoding_processes, end_with_parent
from pipeline.data.transform import ImageFiles, Transform, collate, from_workers, wanted
from pipeline.deploy.inference_model import InferenceModel, load_model
from pipeline.deploy.prediction import ChangedAnswers, Guess, Prediction, Predictions, count_images
from pipeline.distributed import choose_device
from pipeline.errors import ConfigError, DataError
from pipeline.prepared import Prepared, Write, replaced_or_new
from pipeline.resources import usable_cores

ADVICE = "a smaller --batch-size takes less, in a container more --shm-size helps"
WORKERS_FROM = 512  # images; fewer are decoded sooner than worker processes start


@dataclass(frozen=True, eq=False)
class PreparedPrediction:
    """A model and the images to label; `rows` labels them.

    Arguments:
        skipped: a reason for each name that leads to no image.
        changes: counts of changed answers, where the head before rebalancing is compared.
    """

    name: str
    model: InferenceModel
    paths: list[Path]
    skipped: list[str]
    top_k: int
    batch_size: int
    changes: ChangedAnswers | None
    device: str
    out: Path | None

    @property
    def description(self) -> Prepared:
        heads = "the rebalanced head" + (" and that of stage 1" if self.changes else "")
        batches = -(-len(self.paths) // self.batch_size)
        numbers = {"images": len(self.paths), "batches": batches, "classes": len(self.model.class_names)}
        number = f"{count_images(len(self.paths))} in {batches:,} batch{'' if batches == 1 else 'es'}"
        return Prepared(
            "predict",
            {},
            {
                "model": f"{self.name}: {len(self.model.class_names):,} classes; {heads}",
                "images": f"{number}, by {self.device}",
            },
            numbers | {"device": self.device, "compare": self.changes is not None},
            () if self.out is None else (Write(self.out, None, replaced_or_new(self.out)),),
            tuple(self.skipped),
        )

    def rows(self, skipped: Callable[[str], object]) -> Iterator[Prediction]:
        """Yield the predictions as `label` does, counting changed answers."""
        compare = self.changes is not None
        for row in label(
            self.model, self.paths, top_k=self.top_k, batch_size=self.batch_size, compare=compare, skipped=skipped
        ):
            if self.changes is not None:
                self.changes.add(row)
            yield row


def prepare_predict(
    model: Path | str | InferenceModel,
    images: Sequence[Path | str],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    compare: bool = False,
    out: Path | None = None,
) -> PreparedPrediction:
    """Return the labelling that `predict` would execute, checked; no image is read.

    Arguments: those of `predict`; out: the file that the command writes to.
    Raises: what `predict` raises.
    """
    if top_k < 1 or batch_size < 1:
        raise ConfigError("top-k and batch size must be 1 or more")
    skipped: list[str] = []
    paths = find_images([images] if isinstance(images, str | Path) else images, skipped.append)
    loaded = model if isinstance(model, InferenceModel) else load_model(model, device=device)
    if out:
        refuse_unwritable(out.parent)
    changes = ChangedAnswers(loaded.groups) if compare else None
    name = "the model" if isinstance(model, InferenceModel) else str(model)
    return PreparedPrediction(
        name, loaded, paths, skipped, top_k, batch_size, changes, str(choose_device(device)), out
    )  # fmt: skip


def predict(
    model: Path | str | InferenceModel,
    images: Sequence[Path | str],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    compare: bool = False,
) -> Predictions:
    """Return the most probable classes of every readable image, in the order given (folders and globs sorted by name).

    For very many images, `label` gives rows as they come.

    Arguments:
        model: a folder of `pipeline export`, a run, or the result of `load_model`.
        images: files, folders (with all below) and globs.
        compare: add the classes by the head before rebalancing.
    Raises:
        DataError: the model or all images cannot be read.
        ConfigError: top_k or batch_size below 1.
    """
    prepared = prepare_predict(model, images, top_k=top_k, batch_size=batch_size, device=device, compare=compare)
    skipped = list(prepared.skipped)
    rows = tuple(prepared.rows(skipped.append))
    return Predictions(rows, tuple(skipped), prepared.changes)


def label(
    model: InferenceModel,
    paths: Sequence[Path],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    compare: bool = False,
    skipped: Callable[[str], object] = lambda reason: None,
) -> Iterator[Prediction]:
    """Yield a Prediction for every readable file as soon as its batch is done; never more than a few batches are held.

    Arguments:
        skipped: is called with the reason for each file that cannot be read.
    Raises: DataError: no file could be read.
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
        answers = [_top(of_head, top_k, model.class_names) for of_head in heads]
        for position, i in enumerate(good):
            yield Prediction(str(paths[start + i]), *(guesses[position] for guesses in answers))
    if not read:
        raise DataError(f"none of {count_images(len(paths))} could be read; the first: {first_reason}")


def find_images(images: Sequence[Path | str], skipped: Callable[[str], object] = lambda reason: None) -> list[Path]:
    """Return files as they are, every image below folders, and those of globs; each once, under the first of its names.

    Arguments:
        skipped: is called with the reason for each name that leads to no image.
    Raises: DataError: no name leads to an image.
    """
    files: dict[str, Path] = {}
    reasons = []
    for name in images:
        path = Path(name)
        if path.is_dir():
            inside = _below(path)
        elif path.is_file():
            inside = [path]
        else:
            inside = sorted(Path(p) for p in glob.glob(str(name), recursive=True) if Path(p).is_file())
        if not inside:
            kind = "no such file, folder or pattern"
            if path.is_dir() or path.exists():
                kind = "no image in this folder" if path.is_dir() else "neither a file nor a folder"
            reasons.append(f"{name}: {kind}")
        for file in inside:
            files.setdefault(os.path.abspath(file), file)
    if not files:
        first = reasons[0] if reasons else "no image was given"
        raise DataError(f"{first}; give image files ({', '.join(sorted(EXTENSIONS))}), folders or patterns")
    for reason in reasons:
        skipped(reason)
    return list(files.values())


def _below(root: Path) -> list[Path]:
    """Return every file below a folder that is named as an image, sorted; links are followed, in a circle only once."""
    images, visited = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = (name for name in subfolders if not holds_no_images(name))
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        names = filter(is_image_name, files)
        images += [path for path in (Path(folder, name) for name in names) if path.is_file()]
    return sorted(images)


def _read(
    paths: Sequence[Path], transform: Transform, batch_size: int
) -> Iterator[tuple[int, Tensor, list[str | None]]]:
    """Yield (position of the first, pixels (B, 3, H, W) uint8, why each could not be read or None) of each batch of files."""
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
    rows = zip(values.tolist(), classes.tolist(), strict=True)
    return [tuple(Guess(names[c], p) for p, c in zip(ps, cs, strict=True)) for ps, cs in rows]
