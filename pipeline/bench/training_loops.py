"""The loops that `pipeline bench train` times: the trainer, the bare loop and the loader, on generated images."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.backbone.arithmetic import training_arithmetic
from pipeline.backbone.build import build_model, input_transform
from pipeline.backbone.events import Epoch, Step
from pipeline.backbone.image_classifier import ImageClassifier
from pipeline.backbone.prepare import prepare_training
from pipeline.backbone.sampling import steps_of
from pipeline.backbone.train import Trainer
from pipeline.bench.measure import Seconds
from pipeline.config import Config, make_config
from pipeline.data import Dataset, Split
from pipeline.data.transform import Loader
from pipeline.distributed import Ranks, Signals

CLASSES, BATCH = 100, 64
Batch = tuple[Tensor, Tensor]


class TrainerLoop:
    """A real training that is run epoch by epoch and timed."""

    def __init__(self, config: Config, data: Dataset, *, out: Path, ranks: Ranks, signals: Signals):
        self.device = ranks.device
        prepared = prepare_training(config, out=out, overwrite=True, images=data, ranks=ranks)
        self.trainer = Trainer(prepared, ranks=ranks, signals=signals)
        self._events = self.trainer.run()
        next(self._events)

    def steps(self) -> Seconds:
        """Run one epoch; return the time of its steps, without validation and checkpoint."""
        started = time.perf_counter()
        for event in self._events:
            if isinstance(event, Step) and event.step == event.steps:
                break
        seconds = seconds_since(started, self.device)
        self._finish()
        return seconds

    def epoch(self) -> Seconds:
        """Run one epoch; return the time of all of it."""
        started = time.perf_counter()
        self._finish()
        return seconds_since(started, self.device)

    def _finish(self) -> None:
        for event in self._events:
            if isinstance(event, Epoch):
                return
        raise RuntimeError("the training has ended")

    def close(self) -> None:
        self._events.close()  # type: ignore[attr-defined]


class BareLoop:
    """Forward, backward and step on batches that lie ready, and nothing else."""

    def __init__(self, config: Config, batches: list[Batch], *, classes: int, device: torch.device):
        settings, self.device = config.backbone, device
        model = build_model(settings, num_classes=classes).to(device)
        height, width = batches[0][0].shape[2:]
        size = (height, width)
        self.arithmetic = training_arithmetic(model, size, Ranks(0, 1, device), setting=settings.precision)
        self.arithmetic.arrange_weights(model)
        self.batches = [(self.arithmetic.arrange(pixels), labels) for pixels, labels in batches]
        self.classifier = ImageClassifier(model).train()
        self.optimiser = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def steps(self) -> Seconds:
        """Return the time of one pass over the batches."""
        started = time.perf_counter()
        for pixels, labels in self.batches:
            self.optimiser.zero_grad(set_to_none=True)
            with self.arithmetic.autocast(self.device):
                logits = self.classifier(pixels)
            F.cross_entropy(logits.float(), labels).backward()
            self.optimiser.step()
        return seconds_since(started, self.device)


def ready(config: Config, data: Dataset, *, device: torch.device) -> list[Batch]:
    """Return one epoch of batches as the network takes them, on its device."""
    rows = np.array_split(np.arange(len(data.train)), steps_of(len(data.train), config.backbone.batch_size))
    loader = Loader(data.train, input_transform(config.data, config.backbone, data.train), device=device)
    return [
        (pixels, torch.from_numpy(data.train.labels[part]).to(device))
        for part, pixels in zip(rows, loader.batches(rows, 0), strict=True)
    ]


def loading(loader: Loader, batch: int) -> Callable[[], Seconds]:
    """Return a function that times the loader alone over one epoch."""
    rows = np.array_split(np.arange(len(loader.split)), steps_of(len(loader.split), batch))

    def load() -> Seconds:
        started = time.perf_counter()
        for _ in loader.batches(rows, 0):
            pass
        return seconds_since(started, loader.device)

    return load


def images(rows: int, val_rows: int = CLASSES) -> Dataset:
    """Return random 32 × 32 images in memory, classes in turn."""
    rng, sizes = np.random.default_rng(0), (rows, val_rows)
    train, val = (
        Split(np.arange(n) % CLASSES, np.arange(n), images=rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
        for n in sizes
    )
    return Dataset("generated", tuple(map(str, range(CLASSES))), train, val)


def training(network: str, **settings: Any) -> Config:
    """Return a training that does not end before the benchmark does; settings: dotted keys, or those of the backbone."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": "npz", "path": "generated", "augment": "crop-flip"},
        "backbone": {"model": network, "batch_size": BATCH, "epochs": 100_000, "save_every_minutes": 1e6},
    }
    for key, value in settings.items():
        section, _, last = key.rpartition(".")
        sections[section or "backbone"][last] = value
    return make_config({"name": "bench", **sections}, "bench")


def seconds_since(started: float, device: torch.device) -> Seconds:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter() - started)
