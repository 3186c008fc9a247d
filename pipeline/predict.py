"""Labels for image files, from an exported model or straight from a run."""

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.backbone.model import build_model, classifier, encode
from pipeline.config import BackboneConfig
from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.images import EXTENSIONS
from pipeline.data.processes import decoding_processes
from pipeline.data.transform import ImageFiles, Transform, wanted
from pipeline.distributed import choose_device
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.export import STAGE1, input_facts, matching_checkpoint
from pipeline.report.source import read_study
from pipeline.shown import callable_as

if TYPE_CHECKING:
    from rich.table import Table

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

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"path": self.path, "top": [vars(g) for g in self.guesses]}
        return row if self.stage1 is None else row | {"stage1": [vars(g) for g in self.stage1]}


@dataclass(frozen=True, eq=False)
class Model:
    """An encoder with one or two linear heads: the rebalanced one and, to compare, what it was before."""

    network: nn.Module
    heads: tuple[tuple[Tensor, Tensor], ...]
    transform: Transform
    class_names: tuple[str, ...]


def predict(
    model: Path,
    images: Sequence[Path | str],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    compare: bool = False,
    skipped: Callable[[str], object] = lambda reason: None,
) -> Iterator[Prediction]:
    """Yields a Prediction for every readable image, in the order given (folders and globs sorted by name).

    model: a folder of `pipeline export` or a run. images: files, folders (with all below) and globs. compare: also what
    the stage-1 head says. skipped is called with the reason for each file that cannot be read.
    Raises DataError where the model or all images cannot be read, ConfigError for top_k or batch_size below 1.
    """
    if top_k < 1 or batch_size < 1:
        raise ConfigError("top-k and batch size must be 1 or more")
    paths = find_images(images, skipped)
    where = choose_device(device)
    loaded = load_model(model, compare=compare)
    network = loaded.network.to(where).eval()
    heads = [(weight.to(where), bias.to(where)) for weight, bias in loaded.heads]
    read, first_reason = 0, ""
    for start, pixels, reasons in _read(paths, loaded.transform, batch_size):
        good = [i for i, reason in enumerate(reasons) if reason is None]
        for reason in filter(None, reasons):
            first_reason = first_reason or reason
            skipped(reason)
        if not good:
            continue
        read += len(good)
        with torch.inference_mode():
            features = encode(network, loaded.transform.normalise(pixels[good].to(where))).float()
            each = [_top(features @ weight.T + bias, top_k, loaded.class_names) for weight, bias in heads]
        for position, i in enumerate(good):
            yield Prediction(str(paths[start + i]), *(guesses[position] for guesses in each))
    if not read:
        raise DataError(f"none of {len(paths)} image(s) could be read; the first: {first_reason}")


def find_images(images: Sequence[Path | str], skipped: Callable[[str], object] = lambda reason: None) -> list[Path]:
    """Files as they are, folders with every image below them, globs, each file once.

    skipped is called with the reason for each name that leads to no image; DataError where none does.
    """
    found: dict[Path, None] = {}
    reasons = []
    for given in images:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        elif path.is_file():
            inside = [path]
        else:
            inside = sorted(Path(p) for p in glob.glob(str(given), recursive=True) if Path(p).is_file())
        if not inside:
            kind = "no image in this folder" if path.is_dir() else "no such file, folder or pattern"
            reasons.append(f"{given}: {kind}")
        found |= dict.fromkeys(inside)
    if not found:
        first = reasons[0] if reasons else "no image was given"
        raise DataError(f"{first}; give image files ({', '.join(sorted(EXTENSIONS))}), folders or patterns")
    for reason in reasons:
        skipped(reason)
    return list(found)


def load_model(path: Path, *, compare: bool = False) -> Model:
    """The model in a folder of `pipeline export`, or of a run with its selected head; DataError for anything else."""
    if (path / "config.json").is_file():
        return _exported(path, compare)
    study = read_study(path)
    backbone = study.first
    checkpoint = matching_checkpoint(backbone)
    _, weight, bias = backbone.heads
    mine = backbone.head_number(backbone.selected)
    heads = [(weight[mine], bias[mine])] + ([backbone.store.classifier] if compare else [])
    transform = Transform.from_dict(input_facts(checkpoint))
    return Model(checkpoint.model, _tensors(heads), transform, checkpoint.class_names)


def _exported(path: Path, compare: bool) -> Model:
    from safetensors.numpy import load_file as load_arrays
    from safetensors.torch import load_file

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        args = dict(config["model_args"])
        width = args.pop("width", 1.0)
        settings = BackboneConfig.model_validate({"model": config["architecture"], "width": width, "model_args": args})
        network = build_model(settings, num_classes=config["num_classes"])
        weights = path / config["weights"]
        safe = weights.suffix == ".safetensors"
        network.load_state_dict(
            load_file(weights) if safe else torch.load(weights, map_location="cpu", weights_only=True)
        )
        layer = classifier(network)
        heads = [(layer.weight.detach().numpy(), layer.bias.detach().numpy())]
        if compare:
            stage1 = load_arrays(path / STAGE1)
            heads.append((stage1["weight"], stage1["bias"]))
        return Model(network, _tensors(heads), Transform.from_dict(config["transform"]), tuple(config["class_names"]))
    except PipelineError:
        raise
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable model of `pipeline export` ({reason}); export it again") from error


def _tensors(heads: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((torch.from_numpy(weight).float(), torch.from_numpy(bias).float()) for weight, bias in heads)


def _read(
    paths: Sequence[Path], transform: Transform, batch_size: int
) -> Iterator[tuple[int, Tensor, list[str | None]]]:
    """(position of the first, pixels (B, 3, H, W) uint8, why each could not be read or None) of each batch of files."""
    rows = np.arange(len(paths))
    split = Split(labels=np.zeros_like(rows), ids=rows, stored=FileNames(map(str, paths)).below(Path()))
    starts = range(0, len(paths), batch_size)
    batches = [wanted(split, batch, batch, key=None) for batch in np.split(rows, starts[1:])]
    workers = min(8, os.cpu_count() or 1) if len(paths) >= WORKERS_FROM else 0
    files: Any = ImageFiles(split, transform)
    loader: DataLoader = DataLoader(
        files,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        multiprocessing_context=decoding_processes() if workers else None,
    )
    for start, (pixels, reasons) in zip(starts, loader, strict=True):
        yield start, pixels, reasons


def _collate(samples: list[tuple[Tensor, str | None]]) -> tuple[Tensor, list[str | None]]:
    return torch.stack([pixels for pixels, _ in samples]), [reason for _, reason in samples]


def _top(logits: Tensor, top_k: int, names: Sequence[str]) -> list[tuple[Guess, ...]]:
    values, classes = logits.softmax(1).topk(min(top_k, len(names)), dim=1)
    both = zip(values.tolist(), classes.tolist(), strict=True)
    return [tuple(Guess(names[c], p) for p, c in zip(ps, cs, strict=True)) for ps, cs in both]


def json_lines(rows: Iterable[Prediction]) -> Iterator[str]:
    """One JSON document a line, as soon as it is known."""
    return (json.dumps(row.to_dict(), ensure_ascii=False) for row in rows)


def csv_lines(rows: Iterable[Prediction]) -> Iterator[str]:
    """Lines of CSV with a header: path, class_1, probability_1, …, and stage1_class_1, … where compared."""
    for number, row in enumerate(rows):
        columns: dict[str, Any] = {"path": row.path}
        for prefix, guesses in (("", row.guesses), ("stage1_", row.stage1 or ())):
            for place, guess in enumerate(guesses, 1):
                columns |= {
                    f"{prefix}class_{place}": guess.name,
                    f"{prefix}probability_{place}": f"{guess.probability:.6f}",
                }
        if number == 0:
            yield _csv(columns)
        yield _csv(columns.values())


def table(rows: Iterable[Prediction]) -> "Table":
    """The rows as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    drawn = Table("image", "rebalanced" if rows and rows[0].stage1 else "most probable", box=None, pad_edge=False)
    if rows and rows[0].stage1:
        drawn.add_column("before rebalancing")
    for row in rows:
        cells = [row.guesses] + ([row.stage1] if row.stage1 else [])
        drawn.add_row(Text(row.path, overflow="fold"), *(Text(_listed(guesses)) for guesses in cells))
    return drawn


def _listed(guesses: Sequence[Guess]) -> str:
    return ", ".join(f"{guess.name} {100 * guess.probability:.1f}%" for guess in guesses)


def _csv(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


callable_as(__name__, predict)
