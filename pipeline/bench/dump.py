"""The rate of a complete dump over that of its encoder: real encoder, real write path, sealed store."""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from cache import StoreSplit, Writer, chunk_rows, create_store
from pipeline.backbone.build import build_model, classifier
from pipeline.backbone.checkpoint import Checkpoint
from pipeline.backbone.encoder import Encoder, encoding_arithmetic
from pipeline.bench.measure import Measure, Seconds, all_seconds, busy, interleaved, medians
from pipeline.config import BackboneConfig, Config, make_config
from pipeline.data import load_dataset
from pipeline.data.transform import Loader, Transform
from pipeline.dump import augmentation_key, dump_features
from pipeline.resources import usable_cores

NETWORK, CLASSES, FILES = "cifar_resnet32", 10, 64
TARGET = 0.95


def dumping(
    place: Path, *, rows: int, repeat: int, device: torch.device, say: Callable[[str], object]
) -> Iterator[Measure]:
    """Yield dump over encoder for images in memory, and dump over the slower of its halves for image files."""
    model, repeat = build_model(BackboneConfig(model=NETWORK), num_classes=CLASSES), min(repeat, 3)
    say(f"dump: {NETWORK}, images in memory")
    config = arrays(place, rows=min(rows, 2048), size=32, views=3)
    yield over_halves("images in memory", config, backbone(model, 32), place, repeat, device)
    say(f"dump: {NETWORK}, image files")
    workers = max(1, usable_cores() // 2)
    with threads(max(1, usable_cores() - workers) if device.type == "cpu" else torch.get_num_threads()):
        config = files(place, rows=min(rows, 2048), size=32, stored=128, views=3, workers=workers)
        yield over_halves("image files", config, backbone(model, 32), place, repeat, device, decoded=True)


def writing(place: Path, *, rows: int, width: int, dtype: str, repeat: int) -> Measure:
    """Return the rate at which chunks of features become durable: an encoder up to it need not wait for the disk."""
    size = min(rows, 4 * chunk_rows(width=width, itemsize=2))
    features = np.random.default_rng(0).standard_normal((size, width), np.float32)

    def write() -> Seconds:
        with empty_store(place / "written.zarr", size, width, dtype) as writer:
            chunks, started = writer.missing(), time.perf_counter()
            for chunk in chunks:
                writer.write(chunk, features[chunk.start : chunk.stop])
            seconds = time.perf_counter() - started
        shutil.rmtree(place / "written.zarr")
        return Seconds(seconds)

    rate = size / statistics.median(interleaved({"write": write}, repeat=repeat)["write"])
    return Measure(f"written by one thread, {width}-d, {dtype}", round(rate), "rows/s")


def over_halves(
    name: str,
    config: Config,
    checkpoint: Checkpoint,
    place: Path,
    repeat: int,
    device: torch.device,
    *,
    decoded: bool = False,
) -> Measure:
    """Return the rate of a dump over that of its encoder on the batches of one view.

    Arguments:
        decoded: take the slower of encoder and loader, each alone, instead of the encoder.
    """
    halves: dict[str, Callable[[], object]] = {"encoder": _forward(config, checkpoint, device)}
    if decoded:
        halves["loader"] = lambda: _decode(config, checkpoint, device)
    times = interleaved({"dump": lambda: _dump(config, checkpoint, place, device)} | halves, repeat=repeat)
    images = _samples(config) * (config.dump.views - 1)
    rate = {part: images / seconds for part, seconds in medians(times).items()}
    slower = min(halves, key=lambda half: rate[half])
    figures: dict[str, Any] = {f"{part}, images/s": round(value, 1) for part, value in rate.items()}
    why = (
        "with so few cores for each, encoder and decoding processes take time from each other"
        if decoded
        else "where encoder and writer share the cores, writing takes time that the encoder alone would have had"
    )
    return Measure(
        f"dump over {slower}: {NETWORK}, {name}", round(rate["dump"] / rate[slower], 4), "×", TARGET,
        figures=figures | all_seconds(times), why=f"{busy()}: {why}",
    )  # fmt: skip


def _dump(config: Config, checkpoint: Checkpoint, place: Path, device: torch.device) -> Seconds:
    """Return the time from the first chunk, when processes and caches are warm, to the sealed store: all views but one."""
    chunk_times: list[float] = []
    out = place / "dump.zarr"
    dump_features(
        checkpoint, config, out=out, device=str(device), report=lambda *_: chunk_times.append(time.perf_counter())
    )
    seconds = time.perf_counter() - chunk_times[0]
    shutil.rmtree(out)
    return Seconds(seconds)


def _forward(config: Config, checkpoint: Checkpoint, device: torch.device) -> Callable[[], None]:
    """Return the encoder alone, run as often as in a dump, on the batches of view 1: decoded, augmented, on its device."""
    dataset = load_dataset(config.data)
    encoder = Encoder(
        checkpoint, device, encoding_arithmetic(checkpoint.model, checkpoint.transform.size, device, config.dump)
    )
    images = Loader(dataset.train, checkpoint.transform, device=device).batches(
        _batches(config), augmentation_key(config.dump.seed, 1)
    )
    batches = [encoder.arithmetic.arrange(batch) for batch in images]

    def forward() -> None:
        for _ in range(config.dump.views - 1):
            for batch in batches:
                encoder(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return forward


def _decode(config: Config, checkpoint: Checkpoint, device: torch.device) -> Seconds:
    """Return the time of the loader alone, taken as that of the dump: all views but one."""
    loader = Loader(load_dataset(config.data).train, checkpoint.transform, device=device, workers=config.data.workers)
    started = 0.0
    for view in range(config.dump.views):
        for _ in loader.batches(_batches(config), augmentation_key(config.dump.seed, view)):
            pass
        started = started or time.perf_counter()
    return Seconds(time.perf_counter() - started)


def _batches(config: Config) -> list[np.ndarray]:
    n, size = _samples(config), config.dump.batch_size
    return [np.arange(a, min(a + size, n)) for a in range(0, n, size)]


def _samples(config: Config) -> int:
    return len(load_dataset(config.data).train)


def empty_store(path: Path, rows: int, width: int, dtype: str, *, chunks: int = 1) -> Writer:
    """Return the writer of an empty store of one training view of at least `chunks` chunks."""
    usual = chunk_rows(width=width, itemsize=4 if dtype == "float32" else 2)
    labels = np.arange(rows) % CLASSES
    return create_store(
        path,
        splits={"train": StoreSplit(1, labels, np.arange(rows))},
        width=width,
        dtype=dtype,
        weight=np.zeros((CLASSES, width)),
        bias=np.zeros(CLASSES),
        class_names=[str(c) for c in range(CLASSES)],
        counts=np.bincount(labels, minlength=CLASSES),
        fingerprint={"generated": "normal"},
        provenance={},
        rows_per_chunk=max(1, min(usual, -(-rows // chunks))),
    )


def backbone(model: nn.Module, size: int) -> Checkpoint:
    """Return a network with fresh weights as a checkpoint."""
    width = classifier(model).in_features
    facts = {"network": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    return Checkpoint(
        path=Path("fresh weights"),
        model=model.eval(),
        config=make_config({"name": "bench", "data": {"source": "digits"}}, "bench"),
        transform=Transform((size, size), (0.5,) * 3, (0.25,) * 3, "crop-flip"),
        class_names=tuple(map(str, range(CLASSES))),
        counts=np.ones(CLASSES, np.int64),
        network=facts | {"feature_width": width},
        dataset={},
        epoch=0,
        complete=True,
        weights_digest="fresh",
        provenance={},
    )


def arrays(place: Path, *, rows: int, size: int, views: int) -> Config:
    """Return a configuration whose images are random, in memory."""
    images = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
    names = np.array([str(c) for c in range(CLASSES)])
    np.savez(place / "images.npz", images=images, labels=np.arange(rows) % CLASSES, class_names=names)
    return _config({"source": "npz", "path": str(place / "images.npz")}, views)


def files(place: Path, *, rows: int, size: int, stored: int, views: int, workers: int) -> Config:
    """Return a configuration whose images are `rows` lines of a list that names a few JPEG files again and again."""
    rng = np.random.default_rng(0)
    for i in range(FILES):
        coarse = rng.integers(0, 256, (12, 12, 3), np.uint8)  # smooth, as photographs are, not noise
        Image.fromarray(coarse).resize((stored, stored), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)
    lines = (f"{i % FILES}.jpg {i % CLASSES}\n" for i in range(rows))
    (place / "list.txt").write_text("".join(lines), encoding="utf-8")
    data = {"source": "list", "path": str(place), "train_list": str(place / "list.txt"), "image_size": size}
    return _config(data | {"workers": workers}, views, batch_size=32)


def _config(data: dict[str, Any], views: int, **dump: Any) -> Config:
    data |= {"val_per_class": 0, "test_per_class": 0, "augment": "crop-flip"}
    return make_config({"name": "bench", "data": data, "dump": {"views": views, **dump}}, "bench")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of torch's threads inside a with block."""
    previous = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
