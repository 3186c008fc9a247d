"""`pipeline bench train`: stage 1 beside the bare loop of forward, backward and step, and its loader beside the network."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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
from pipeline.bench.dump import files, threads
from pipeline.bench.measure import Benchmark, Measure, Seconds, busy, interleaved, machine, ratio
from pipeline.bench.ranks import ranks as two_ranks
from pipeline.config import Config, make_config
from pipeline.data import Dataset, Split, load_dataset
from pipeline.data.transform import Loader
from pipeline.distributed import Ranks, Signals, choose_device
from pipeline.resources import usable_cores

NETWORK, CLASSES, BATCH = "cifar_resnet32", 100, 64
ROWS, VAL_ROWS = 10_847, 1_980  # CIFAR100-LT, imbalance factor 100
EVERYTHING = {"data.policy": "autoaugment-cifar10", "data.cutout": 16, "backbone.mixup": 1.0}
SLOWDOWN = 1.03
MODES = ("none", "reduce-overhead")
MINUTES = {"cifar_resnet32": 2.0, "cifar_resnet34": 6.0}  # 200 epochs on one GPU
LARGE = {"cpu": ("resnet18", 8), "cuda": ("resnet50", 256)}  # the network that image files are for, and its batch size

Say = Callable[[str], object]
Batch = tuple[Tensor, Tensor]


def bench_train(
    *,
    repeat: int = 5,
    small: bool = False,
    device: str = "auto",
    folder: Path | None = None,
    say: Say = lambda text: None,
) -> Benchmark:
    """Ratios of stage 1 on generated images; on CUDA also what 200 epochs of CIFAR100-LT take.

    small: a few steps each, without image files and whole trainings. folder: where temporary files go.
    """
    started, where = time.perf_counter(), choose_device(device)
    steps = 2 if small else 8
    with tempfile.TemporaryDirectory(prefix="bench-train.", dir=folder) as name, Signals() as signals:
        place = Path(name)
        measures = list(over_bare(place, steps=steps, repeat=repeat, device=where, signals=signals, say=say))
        say(f"two ranks: {NETWORK}, one thread each")
        measures.append(two_ranks(NETWORK, batch=BATCH // 2, steps=steps, repeat=repeat))
        if not small:
            measures.append(image_files(place, repeat=repeat, device=where, say=say))
        if where.type == "cuda" and not small:
            measures += whole(place, epochs=3, device=where, signals=signals, say=say)
    settings = {"repeat": repeat, "small": small, "steps": steps, "everything": EVERYTHING}
    return Benchmark(
        "train", machine(device=_device_name(where)), settings, tuple(measures), round(time.perf_counter() - started, 1)
    )


def over_bare(
    place: Path, *, steps: int, repeat: int, device: torch.device, signals: Signals, say: Say
) -> Iterator[Measure]:
    """The steps of the trainer over a bare loop on ready batches, with crops and flips and with everything; the loader.

    In the trainer's time: the order of the epoch, augmentation and normalisation, mixing, learning rate, seeds, tally,
    signals. Not in it: validation and the checkpoint, once an epoch.
    """
    say(f"trainer over the bare loop: {NETWORK}, batches of {BATCH}")
    data, lone = images(BATCH * steps), Ranks(0, 1, device)
    plain, everything = training(NETWORK), training(NETWORK, **EVERYTHING)
    drive = {
        way: Driven(config, data, out=place / way, ranks=lone, signals=signals)
        for way, config in (("trainer", plain), ("everything", everything))
    }
    bare = Bare(plain, ready(plain, data, device=device), classes=CLASSES, device=device)
    loads = {
        way: loading(
            Loader(data.train, input_transform(config.data, config.backbone, data.train), device=device), BATCH
        )
        for way, config in (("loader", plain), ("loader with policy", everything))
    }
    ways: dict[str, Callable[[], Seconds]] = {"bare": bare.steps} | {way: it.steps for way, it in drive.items()} | loads
    seconds = interleaved(ways, repeat=repeat)
    what = {"trainer": "crop-flip", "everything": "AutoAugment, Cutout and mixup"}
    for way, told in what.items():
        # the target is one of CPUs: a GPU hides work that it does not wait for, or is held up by all of it
        yield _ratio(
            f"trainer over bare loop, {NETWORK}, {told}", seconds, of="bare", over=way, images=len(data.train),
            target=SLOWDOWN if device.type == "cpu" else None, at_most=True, why=busy(),
        )  # fmt: skip
    for way, told in (("loader", "crop-flip"), ("loader with policy", "AutoAugment and Cutout")):
        yield _ratio(
            f"loader over {NETWORK}, memory, {told}", seconds, of=way, over="bare", images=len(data.train), target=1.0
        )


def image_files(place: Path, *, repeat: int, device: torch.device, say: Say) -> Measure:
    """Images a second that worker processes decode, crop and send, over those that a large network takes in training."""
    network, batch = LARGE[device.type]
    workers, rows = usable_cores(), max(8, 2 * usable_cores()) * batch
    say(f"loader over {network}: {rows} JPEG files of 400 × 400 pixels, {workers} processes")
    (place / "files").mkdir()
    made = files(place / "files", rows=rows, size=224, stored=400, views=1, workers=workers)
    tree = made.model_dump() | {"backbone": {"model": network, "batch_size": batch}}
    tree["data"] |= {"augment": "resized-crop-flip"}
    config = make_config(tree, "bench")
    data = load_dataset(config.data)
    loader = Loader(
        data.train, input_transform(config.data, config.backbone, data.train), device=device, workers=workers
    )
    some = data.train.take(np.arange(2 * batch))
    with threads(usable_cores() if device.type == "cpu" else torch.get_num_threads()):
        of = Dataset("files", data.class_names, some)
        network_alone = Bare(config, ready(config, of, device=device), classes=len(data.class_names), device=device)
        seconds = interleaved({"loader": loading(loader, batch), "network": network_alone.steps}, repeat=min(repeat, 3))
    rates = {
        "loader": rows / statistics.median(seconds["loader"]),
        "network": len(some) / statistics.median(seconds["network"]),
    }
    figures: dict[str, Any] = {f"{way}, images/s": round(rate, 1) for way, rate in rates.items()}
    figures |= {f"{way}, all s": [round(t, 4) for t in times] for way, times in seconds.items()}
    why = f"{usable_cores()} CPUs decode for a network that takes more; more of them, or smaller files, help"
    return Measure(
        f"loader over {network}, image files", round(rates["loader"] / rates["network"], 4), "×", 1.0, figures=figures,
        why=why,
    )  # fmt: skip


def whole(
    place: Path, *, epochs: int, device: torch.device, signals: Signals, say: Say, modes: tuple[str, ...] = MODES
) -> Iterator[Measure]:
    """Minutes of 200 epochs of CIFAR100-LT, validation and checkpoints included, from the first epoch and the median of more."""
    data = images(ROWS, VAL_ROWS)
    for network, minutes in MINUTES.items():
        for mode in modes:
            say(f"whole epochs: {network}, compile {mode}")
            if mode != "none":
                torch.compiler.reset()
            config = training(network, **{"backbone.compile": mode})
            drive = Driven(config, data, out=place / f"{network}-{mode}", ranks=Ranks(0, 1, device), signals=signals)
            first, *others = (drive.epoch() for _ in range(1 + epochs))
            drive.close()
            value = (first + 199 * statistics.median(others)) / 60
            figures = {"first epoch, s": round(first, 3), "other epochs, all s": [round(t, 3) for t in others]}
            target = minutes if mode != "none" else None
            name = f"200 epochs of CIFAR100-LT, {network}, compile {mode}"
            why = f"{figures}: the steps of a small network are bound by the time to launch them"
            yield Measure(name, round(value, 2), "min", target, at_most=True, figures=figures, why=why)


class Driven:
    """A real training that goes on when it is told to, and says what that took."""

    def __init__(self, config: Config, data: Dataset, *, out: Path, ranks: Ranks, signals: Signals):
        self.device = ranks.device
        prepared = prepare_training(config, out=out, overwrite=True, images=data, ranks=ranks)
        self.trainer = Trainer(prepared, ranks=ranks, signals=signals)
        self._events = self.trainer.run()
        next(self._events)

    def steps(self) -> Seconds:
        """Does one epoch; the time of its steps, without what ends it."""
        started = time.perf_counter()
        for event in self._events:
            if isinstance(event, Step) and event.step == event.steps:
                break
        taken = _since(started, self.device)
        self._finish()
        return taken

    def epoch(self) -> Seconds:
        """Does one epoch; the time of all of it."""
        started = time.perf_counter()
        self._finish()
        return _since(started, self.device)

    def _finish(self) -> None:
        for event in self._events:
            if isinstance(event, Epoch):
                return
        raise RuntimeError("the training has ended")

    def close(self) -> None:
        self._events.close()  # type: ignore[attr-defined]


class Bare:
    """The loop that nobody can do without: forward, backward, step, on batches that lie ready."""

    def __init__(self, config: Config, batches: list[Batch], *, classes: int, device: torch.device):
        settings, self.device = config.backbone, device
        model = build_model(settings, num_classes=classes).to(device)
        height, width = batches[0][0].shape[2:]
        size = (height, width)
        self.arithmetic = training_arithmetic(model, size, Ranks(0, 1, device), setting=settings.precision)
        self.arithmetic.arrange_weights(model)
        self.batches = [(self.arithmetic.arrange(pixels), labels) for pixels, labels in batches]
        self.learner = ImageClassifier(model).train()
        self.optimiser = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def steps(self) -> Seconds:
        """One pass over the batches, and what it took."""
        started = time.perf_counter()
        for pixels, labels in self.batches:
            self.optimiser.zero_grad(set_to_none=True)
            with self.arithmetic.autocast(self.device):
                logits = self.learner(pixels)
            F.cross_entropy(logits.float(), labels).backward()
            self.optimiser.step()
        return _since(started, self.device)


def ready(config: Config, data: Dataset, *, device: torch.device) -> list[Batch]:
    """One epoch of batches as the network takes them, on its device."""
    rows = np.array_split(np.arange(len(data.train)), steps_of(len(data.train), config.backbone.batch_size))
    loader = Loader(data.train, input_transform(config.data, config.backbone, data.train), device=device)
    return [
        (pixels, torch.from_numpy(data.train.labels[part]).to(device))
        for part, pixels in zip(rows, loader.batches(rows, 0), strict=True)
    ]


def loading(loader: Loader, batch: int) -> Callable[[], Seconds]:
    """Everything that the loader does for an epoch, and nothing else."""
    rows = np.array_split(np.arange(len(loader.split)), steps_of(len(loader.split), batch))

    def load() -> Seconds:
        started = time.perf_counter()
        for _ in loader.batches(rows, 0):
            pass
        return _since(started, loader.device)

    return load


def images(rows: int, val_rows: int = CLASSES) -> Dataset:
    """Random 32 × 32 images in memory, classes in turn."""
    rng, sizes = np.random.default_rng(0), (rows, val_rows)
    train, val = (
        Split(np.arange(n) % CLASSES, np.arange(n), images=rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
        for n in sizes
    )
    return Dataset("generated", tuple(map(str, range(CLASSES))), train, val)


def training(network: str, **settings: Any) -> Config:
    """A training that does not end before the benchmark does; settings: dotted keys, or those of the backbone."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": "npz", "path": "generated", "augment": "crop-flip"},
        "backbone": {"model": network, "batch_size": BATCH, "epochs": 100_000, "save_every_minutes": 1e6},
    }
    for key, value in settings.items():
        section, _, last = key.rpartition(".")
        sections[section or "backbone"][last] = value
    return make_config({"name": "bench", **sections}, "bench")


def _ratio(name: str, seconds: dict[str, list[float]], *, of: str, over: str, images: int, **claim: Any) -> Measure:
    return ratio(name, {way: seconds[way] for way in (of, over)}, of=of, over=over, work=images, unit="images", **claim)


def _since(started: float, device: torch.device) -> Seconds:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter() - started)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
