"""`pipeline bench train`: stage 1 over the bare loop of forward, backward and step, and its loader over the network."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backbone.build import input_transform
from pipeline.bench.dump import files, threads
from pipeline.bench.measure import Benchmark, Measure, all_seconds, busy, interleaved, machine, medians, ratio
from pipeline.bench.ranks import ranks_over_processes
from pipeline.bench.training_loops import BATCH, CLASSES, BareLoop, TrainerLoop, images, loading, ready, training
from pipeline.config import make_config
from pipeline.data import Dataset, load_dataset
from pipeline.data.transform import Loader
from pipeline.distributed import Ranks, Signals, choose_device
from pipeline.resources import usable_cores

NETWORK = "cifar_resnet32"
ROWS, VAL_ROWS = 10_847, 1_980  # CIFAR100-LT, imbalance factor 100
EVERYTHING = {"data.policy": "autoaugment-cifar10", "data.cutout": 16, "backbone.mixup": 1.0}
SLOWDOWN = 1.03
MODES = ("none", "reduce-overhead")
MINUTES = {"cifar_resnet32": 2.0, "cifar_resnet34": 6.0}  # 200 epochs on one GPU
LARGE = {"cpu": ("resnet18", 8), "cuda": ("resnet50", 256)}  # the network that image files are for, and its batch size

Say = Callable[[str], object]


def bench_train(
    *,
    repeat: int = 5,
    small: bool = False,
    device: str = "auto",
    folder: Path | None = None,
    say: Say = lambda text: None,
) -> Benchmark:
    """Return ratios of stage 1 on generated images; on CUDA also the minutes of 200 epochs of CIFAR100-LT.

    Arguments:
        small: a few steps each, without image files and complete trainings.
        folder: of the temporary files, which are removed; by default the system's.
    """
    started, target = time.perf_counter(), choose_device(device)
    steps = 2 if small else 8
    with tempfile.TemporaryDirectory(prefix="bench-train.", dir=folder) as name, Signals() as signals:
        place = Path(name)
        measures = list(over_bare(place, steps=steps, repeat=repeat, device=target, signals=signals, say=say))
        say(f"two ranks: {NETWORK}, one thread each")
        measures.append(ranks_over_processes(NETWORK, batch=BATCH // 2, steps=steps, repeat=repeat))
        if not small:
            measures.append(image_files(place, repeat=repeat, device=target, say=say))
        if target.type == "cuda" and not small:
            measures += full_training(place, epochs=3, device=target, signals=signals, say=say)
    settings = {"repeat": repeat, "small": small, "steps": steps, "everything": EVERYTHING}
    return Benchmark(
        "train",
        machine(device=_device_name(target)),
        settings,
        tuple(measures),
        round(time.perf_counter() - started, 1),
    )


def over_bare(
    place: Path, *, steps: int, repeat: int, device: torch.device, signals: Signals, say: Say
) -> Iterator[Measure]:
    """Yield the trainer's steps over a bare loop on ready batches, with crops and flips and with everything; the loader.

    In the trainer's time: the order of the epoch, augmentation and normalisation, mixing, learning rate, seeds, counts,
    signals. Not in it: validation and the checkpoint, once an epoch.
    """
    say(f"trainer over the bare loop: {NETWORK}, batches of {BATCH}")
    data, lone = images(BATCH * steps), Ranks(0, 1, device)
    plain, everything = training(NETWORK), training(NETWORK, **EVERYTHING)
    trainers = {
        name: TrainerLoop(config, data, out=place / name, ranks=lone, signals=signals)
        for name, config in (("trainer", plain), ("everything", everything))
    }
    bare = BareLoop(plain, ready(plain, data, device=device), classes=CLASSES, device=device)
    loads = {
        name: loading(
            Loader(data.train, input_transform(config.data, config.backbone, data.train), device=device), BATCH
        )
        for name, config in (("loader", plain), ("loader with policy", everything))
    }
    functions = {"bare": bare.steps} | {name: trainer.steps for name, trainer in trainers.items()} | loads
    times = interleaved(functions, repeat=repeat)
    work: dict[str, Any] = {"work": len(data.train), "unit": "images"}
    for name, augmentation in (("trainer", "crop-flip"), ("everything", "AutoAugment, Cutout and mixup")):
        # the target is one of CPUs: a GPU hides work that it does not wait for, or is held up by all of it
        yield ratio(
            f"trainer over bare loop, {NETWORK}, {augmentation}", times, "bare", name, **work,
            target=SLOWDOWN if device.type == "cpu" else None, at_most=True, why=busy(),
        )  # fmt: skip
    for name, augmentation in (("loader", "crop-flip"), ("loader with policy", "AutoAugment and Cutout")):
        yield ratio(f"loader over {NETWORK}, memory, {augmentation}", times, name, "bare", **work, target=1.0)


def image_files(place: Path, *, repeat: int, device: torch.device, say: Say) -> Measure:
    """Return the rate at which worker processes decode, crop and send images over that of training a large network."""
    network, batch = LARGE[device.type]
    workers, rows = usable_cores(), max(8, 2 * usable_cores()) * batch
    say(f"loader over {network}: {rows} JPEG files of 400 × 400 pixels, {workers} processes")
    (place / "files").mkdir()
    file_list = files(place / "files", rows=rows, size=224, stored=400, views=1, workers=workers)
    tree = file_list.model_dump() | {"backbone": {"model": network, "batch_size": batch}}
    tree["data"] |= {"augment": "resized-crop-flip"}
    config = make_config(tree, "bench")
    data = load_dataset(config.data)
    loader = Loader(
        data.train, input_transform(config.data, config.backbone, data.train), device=device, workers=workers
    )
    rows_for_network = data.train.take(np.arange(2 * batch))
    with threads(usable_cores() if device.type == "cpu" else torch.get_num_threads()):
        few = Dataset("files", data.class_names, rows_for_network)
        network_alone = BareLoop(
            config, ready(config, few, device=device), classes=len(data.class_names), device=device
        )
        times = interleaved({"loader": loading(loader, batch), "network": network_alone.steps}, repeat=min(repeat, 3))
    seconds = medians(times)
    rates = {"loader": rows / seconds["loader"], "network": len(few.train) / seconds["network"]}
    figures: dict[str, Any] = {f"{part}, images/s": round(rate, 1) for part, rate in rates.items()} | all_seconds(times)
    why = f"{usable_cores()} CPUs decode for a network that takes more; more of them, or smaller files, help"
    return Measure(
        f"loader over {network}, image files", round(rates["loader"] / rates["network"], 4), "×", 1.0, figures=figures,
        why=why,
    )  # fmt: skip


def full_training(
    place: Path, *, epochs: int, device: torch.device, signals: Signals, say: Say, modes: tuple[str, ...] = MODES
) -> Iterator[Measure]:
    """Yield the minutes of 200 epochs of CIFAR100-LT with validation and checkpoints: the first epoch, and the median of more."""
    data = images(ROWS, VAL_ROWS)
    for network, minutes in MINUTES.items():
        for mode in modes:
            say(f"complete epochs: {network}, compile {mode}")
            if mode != "none":
                torch.compiler.reset()
            config = training(network, **{"backbone.compile": mode})
            trainer = TrainerLoop(
                config, data, out=place / f"{network}-{mode}", ranks=Ranks(0, 1, device), signals=signals
            )
            compiling, *trained = (trainer.epoch() for _ in range(1 + epochs))
            trainer.close()
            value = (compiling + 199 * statistics.median(trained)) / 60
            figures = {"first epoch, s": round(compiling, 3), "other epochs, all s": [round(t, 3) for t in trained]}
            target = minutes if mode != "none" else None
            name = f"200 epochs of CIFAR100-LT, {network}, compile {mode}"
            why = f"{figures}: the steps of a small network are bound by the time to launch them"
            yield Measure(name, round(value, 2), "min", target, at_most=True, figures=figures, why=why)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
