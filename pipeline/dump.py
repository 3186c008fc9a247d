"""The frozen encoder, once over every sample, into a feature store: plan (pure) → encode → write → seal.

Which chunk is computed where changes nothing in it: batches are cut at chunk borders and augmentation is a function of
(seed, view, sample), so any number of ranks and of kills gives the same store.
"""

import functools
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import CacheError, Chunk, Writer, owned_chunks
from pipeline import distributed, probe
from pipeline.backbone.build import classifier, encode
from pipeline.backbone.checkpoint import Checkpoint
from pipeline.backbone.external_checkpoint import keep
from pipeline.config import Config
from pipeline.data import Dataset, load_dataset
from pipeline.data.transform import Loader
from pipeline.distributed import Ranks, Signals
from pipeline.dump_source import Source, find_source, source_of
from pipeline.errors import DataError, PipelineError, Terminated
from pipeline.killpoint import KillPoint
from pipeline.method_names import PROBE
from pipeline.provenance import provenance
from pipeline.seeds import derive
from pipeline.text import Shown
from pipeline.unreadable import Rows, readable_now, skipped_before, told

OWN_HEAD = "of the backbone"
WAITING = 2  # encoded chunks that may wait for the disk; with the one being encoded they bound the memory


@dataclass(frozen=True)
class DumpResult(Shown):
    """A sealed store. samples: split → N; written: chunks that this call computed, of `chunks` in all.

    skipped: split → images that could not be read; their rows are kept, NaN, and left out wherever features are used.
    head: what stage 2 starts from, the backbone's own classifier or a linear probe.
    """

    store: Path | str
    digest: str
    samples: dict[str, int]
    views: int
    width: int
    dtype: str
    chunks: int
    written: int
    seconds: float
    network: dict[str, Any]
    dataset: dict[str, Any]
    skipped: dict[str, list[str]]
    head: str = OWN_HEAD

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"store": str(self.store)}

    def __str__(self) -> str:
        sizes = ", ".join(f"{n:,} {split}" for split, n in self.samples.items())
        done = f"{self.written} of {self.chunks} chunks written" if self.written else "nothing was missing"
        return (
            f"{self.store}: {sizes}; {self.views} training view(s), {self.width} features each, {self.dtype}\n"
            f"{done}, all checksums hold; {self.seconds:.1f} s; digest {self.digest[:16]}"
            + (f"\nhead: {probe.SETTINGS}" if self.head == PROBE else "")
            + (f"\n{told(self.skipped)}" if self.skipped else "")
        )


def dump_features(
    backbone: Checkpoint | Path | str | None,
    config: Config | None = None,
    *,
    out: Path | str | None = None,
    own_images: bool = False,
    settings: Sequence[str] = (),
    model: str | None = None,
    key_map: Path | None = None,
    probe: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    report: Callable[[int, int, str], object] = lambda done, total, note: None,
    say: Callable[[str], object] = lambda line: None,
    images: Dataset | None = None,
    keep_in: Path | None = None,
) -> DumpResult:
    """The sealed store of the backbone's features of every split; finishes, verifies or repairs what is there.

    View 0 is the evaluation transform, views 1…V−1 the training augmentation; val and test have view 0 alone. Under
    torchrun the ranks share the work. A backbone without a head for these classes gets a linear probe (probe.py), fitted on
    the clean training features before the seal.

    backbone: a checkpoint's file, of `train_backbone` or of any timm network, or a loaded one, or None for the encoder that
    the configuration names (backbone.encoder). config: images and settings,
    None for those a checkpoint of `train_backbone` was made with; own_images: its images, with config's sections dump and
    rebalance. settings: KEY=VALUE laid over. out: a folder or URL, by default features.zarr in the backbone's run. model,
    key_map, probe: how a checkpoint from elsewhere is taken, as in `load_foreign`; it is then kept in backbone/ beside the
    store. Of a loaded backbone: images: the configuration's data set, if it is loaded; keep_in: a folder for the backbone
    itself, once it is settled that the store is its own. report is called on rank 0 with (images done, images to do,
    note), say with lines on what was taken.
    Raises DataError (checkpoint, images, or a store made otherwise without overwrite), ConfigError (settings, or a backbone
    that will not do), Terminated (SIGTERM or Ctrl-C: finished chunks are kept and the same call goes on).
    """
    started = time.perf_counter()
    with distributed.ranks(device) as ranks, Signals() as signals:
        if not isinstance(backbone, Checkpoint):
            source = find_source(
                None if backbone is None else Path(backbone), config, out=out, own_images=own_images, settings=settings,
                model=model, key_map=key_map, probe=probe, overwrite=overwrite, ranks=ranks, say=say,
            )  # fmt: skip
        else:
            source = source_of(backbone, config, out=out, images=images, keep_in=keep_in)
        result = _dump(source, ranks, signals, overwrite=overwrite, report=report)
    return replace(result, seconds=round(time.perf_counter() - started, 2))


def _dump(
    source: Source, ranks: Ranks, signals: Signals, *, overwrite: bool, report: Callable[[int, int, str], object]
) -> DumpResult:
    backbone, config, out, keep_in = source.backbone, source.config, source.out, source.keep_in
    dataset = ranks.together(
        lambda: fitting(source.images or load_dataset(config.data, resize=not config.backbone.frozen), backbone)
    )
    writer = _writer(backbone, config, dataset, out=out, ranks=ranks, overwrite=overwrite)
    with writer:
        ranks.together(lambda: keep(backbone, keep_in) if keep_in and ranks.first else None)
        missing = missing_chunks(writer, ranks, skipping=config.dump.on_error == "skip")
        mine = [missing[i] for i in owned_chunks(chunks=len(missing), rank=ranks.rank, world=ranks.world)]
        encoder = Encoder(backbone, config, dataset, device=ranks.device)
        ranks.together(lambda: write_chunks(writer, encoder, mine, ranks=ranks, stop=signals, report=report))
        ranks.together(lambda: _obey(signals, out))
        ranks.together(lambda: _set_head(writer, backbone, config, dataset, ranks=ranks, stop=signals))
        digest = ranks.together(lambda: _seal(writer, backbone, config, dataset) if ranks.first else "")
    return DumpResult(
        store=out,
        digest=digest,
        samples={name: len(split) for name, split in dataset.splits.items()},
        views=config.dump.views,
        width=writer.layout.width,
        dtype=writer.layout.dtype,
        chunks=len(writer.chunks),
        written=len(missing),
        seconds=0.0,
        network=backbone.network,
        dataset=dataset.summary(),
        skipped={s: [dataset.splits[s].name_of(r) for r in rows] for s, rows in writer.skipped.items()},
        head=PROBE if backbone.probe else OWN_HEAD,
    )


def fingerprint(backbone: Checkpoint, config: Config, dataset: Dataset, *, skipped: Rows) -> dict[str, Any]:
    """What decides the features, up to rounding; two stores that differ in any of it are different stores.

    Batch size, device, precision and threads only round differently: a dump may go on with a smaller batch or
    elsewhere. skipped: rows without features; whatever becomes of their images, the rest stays the same.
    """
    return {
        "dataset": dataset.fingerprint_without(skipped),
        "checkpoint": backbone.weights_digest,
        "network": backbone.network["network"],
        "transform": json.dumps(backbone.transform.to_dict(), sort_keys=True),
        "views": config.dump.views,
        "seed": config.dump.seed,
        "dtype": config.dump.dtype,
        **({"probe": probe.SETTINGS} if backbone.probe else {}),
    }


def batches_of(chunk: Chunk, batch_size: int) -> list[np.ndarray]:
    """The rows of a chunk in batches; none crosses its borders, so no batch depends on what else is computed."""
    return [np.arange(a, min(a + batch_size, chunk.stop)) for a in range(chunk.start, chunk.stop, batch_size)]


def augmentation_key(seed: int, view: int) -> int | None:
    """The key of a view's augmentation; None for view 0, the evaluation transform."""
    return derive(seed, "view", view) if view else None


def missing_chunks(writer: Writer, ranks: Ranks, *, skipping: bool) -> list[Chunk]:
    """Every chunk that has to be computed, the same list on all ranks: each looks at its share of the store.

    skipping: whether a chunk that lacks the features of unreadable images counts as finished.
    """
    chunks = writer.chunks
    found = set(writer.missing(rank=ranks.rank, world=ranks.world, skipping=skipping))
    flags = ranks.total(np.array([chunk in found for chunk in chunks], dtype=np.float64))
    return [chunk for chunk, flag in zip(chunks, flags, strict=True) if flag]


class Encoder:
    """The backbone on its device: rows of a split → features."""

    def __init__(self, backbone: Checkpoint, config: Config, dataset: Dataset, *, device: torch.device):
        self.device, self.settings = device, config.dump
        self.precision = encoding_precision(device)
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._model = backbone.model.to(device, memory_format=self.memory_format).eval()  # type: ignore[call-overload]
        self._width = classifier(backbone.model).in_features
        self._dataset, self._transform, self._workers = dataset, backbone.transform, config.data.workers

    def name_of(self, split: str) -> Callable[[int], str] | None:
        """Row → file of an image; None where images lie in memory."""
        images = self._dataset.splits[split]
        return None if images.stored is None else images.name_of

    def chunks(self, wanted: Sequence[Chunk], stop: Signals) -> Iterator[tuple[Chunk, np.ndarray, list[int]]]:
        """Each wanted chunk, its features (rows, D) float32 and its unreadable rows; ends between batches when asked to.

        Raises PipelineError where the device's memory does not suffice, and, where none may be skipped, DataError for
        an image that cannot be read.
        """
        unreadable: list[int] = []
        note = unreadable.append if self.settings.on_error == "skip" else None
        for split, of_split in itertools.groupby(wanted, key=lambda chunk: chunk.split):
            loader = Loader(self._dataset.splits[split], self._transform, device=self.device, workers=self._workers)
            for view, of_view in itertools.groupby(of_split, key=lambda chunk: chunk.view):
                run = [(chunk, batches_of(chunk, self.settings.batch_size)) for chunk in of_view]
                rows = [batch for _, batches in run for batch in batches]
                images = loader.batches(rows, augmentation_key(self.settings.seed, view), unreadable=note)
                for chunk, batches in run:
                    features = self._encode(chunk, itertools.islice(images, len(batches)), stop)
                    if features is None:
                        return
                    yield chunk, features, [row - chunk.start for row in unreadable]
                    unreadable.clear()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of normalised images (B, 3, H, W) on the device, in the precision of the device."""
        with torch.inference_mode(), self._autocast():
            return encode(self._model, batch.contiguous(memory_format=self.memory_format))

    def _encode(self, chunk: Chunk, images: Iterator[torch.Tensor], stop: Signals) -> np.ndarray | None:
        features = torch.empty(chunk.rows, self._width, device=self.device)
        done = 0
        try:
            for batch in images:
                if stop.received:
                    return None
                features[done : done + len(batch)] = self.forward(batch)
                done += len(batch)
            return features.cpu().numpy()
        except torch.OutOfMemoryError as error:
            size = self.settings.batch_size
            raise PipelineError(
                f"{self.device}: not enough memory for batches of {size}; "
                f"go on with --set dump.batch_size={max(1, size // 2)}"
            ) from error
        except (PipelineError, OSError, RuntimeError):
            if stop.received:  # Ctrl-C at a terminal also ends the processes that load images
                return None
            raise

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)


def encoding_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where a GPU computes in it, else float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def write_chunks(
    writer: Writer,
    encoder: Encoder,
    wanted: Sequence[Chunk],
    *,
    ranks: Ranks,
    stop: Signals,
    report: Callable[[int, int, str], object],
) -> None:
    """Encodes and writes the wanted chunks, a background thread writing while the next is encoded.

    Once asked to stop it drops the chunk being encoded and finishes those being written.
    """
    total, done, started = sum(chunk.rows for chunk in wanted), 0, time.perf_counter()
    share = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
    point = KillPoint(os.environ.get("PIPELINE_KILL_AT"), rank=ranks.rank)

    def write(number: int, chunk: Chunk, features: np.ndarray, absent: list[int]) -> None:
        with point.around(str(number), size=writer.layout.features(chunk.split).chunk_bytes):
            writer.write(chunk, features, absent=absent, name=encoder.name_of(chunk.split))

    with as_data_error(), _in_background(write) as put:
        for number, (chunk, features, absent) in enumerate(encoder.chunks(wanted, stop), start=1):
            put(number, chunk, features, absent)
            done += chunk.rows
            if ranks.first:
                report(done, total, f"images{share}, {done / (time.perf_counter() - started):,.0f}/s")


@contextmanager
def _in_background(write: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """A `put` that calls write in one other thread, in order; it waits while WAITING are pending, and raises what failed."""
    pending: deque[Future[None]] = deque()

    def put(*arguments: Any) -> None:
        while len(pending) >= WAITING:
            pending.popleft().result()
        pending.append(pool.submit(write, *arguments))

    with ThreadPoolExecutor(1, "write") as pool:
        yield put
        for future in pending:
            future.result()


def fitting(dataset: Dataset, backbone: Checkpoint) -> Dataset:
    """The data set, if the backbone's classes and input size are its own; DataError otherwise."""
    if dataset.class_names != backbone.class_names:
        differing = [(a, b) for a, b in zip(backbone.class_names, dataset.class_names, strict=False) if a != b]
        detail = ", the first that differs: {!r} against {!r}".format(*differing[0]) if differing else ""
        raise DataError(
            f"{backbone.path}: trained on {len(backbone.class_names)} classes, the data has "
            f"{len(dataset.class_names)}{detail}; give the configuration it was trained with, train again, or take its encoder "
            "alone: --checkpoint FILE --probe"
        )
    for name, split in dataset.splits.items():
        if backbone.config.backbone.frozen:
            continue  # its images are resized batch by batch
        if split.images is not None and split.images.shape[1:3] != backbone.transform.size:
            wanted, got = ("×".join(map(str, size)) for size in (backbone.transform.size, split.images.shape[1:3]))
            raise DataError(f"{backbone.path}: trained on {wanted} images, {name} has {got}; set data.image_size")
    return dataset


def _writer(
    backbone: Checkpoint, config: Config, dataset: Dataset, *, out: Path | str, ranks: Ranks, overwrite: bool
) -> Writer:
    """Rank 0 makes or takes up the store, then the others join."""

    def create() -> Writer | None:
        if not ranks.first:
            return None
        with as_data_error():
            return cache.create_store(
                out,
                overwrite=overwrite,
                **store_of(backbone, config, dataset, out=out, ranks=ranks, overwrite=overwrite),
            )

    def join() -> Writer:
        with as_data_error():
            return cache.open_writer(out)

    made = ranks.together(create)
    return ranks.together(lambda: made or join())


def store_of(
    backbone: Checkpoint, config: Config, dataset: Dataset, *, out: Path | str, ranks: Ranks, overwrite: bool
) -> dict[str, Any]:
    """What `cache.create_store` is given; DataError where images that were skipped may not be skipped again."""
    head = classifier(backbone.model)
    weight, bias = (None, None) if backbone.probe else _arrays(head)
    skipped = {} if overwrite else skipped_before(out, dataset)
    return {
        "splits": {
            name: cache.Split(config.dump.views if name == "train" else 1, split.labels, split.ids)
            for name, split in dataset.splits.items()
        },
        "width": head.in_features,
        "dtype": config.dump.dtype,
        "weight": weight,
        "bias": bias,
        "class_names": dataset.class_names,
        "counts": dataset.counts,
        "fingerprint": fingerprint(backbone, config, dataset, skipped=skipped),
        "provenance": provenance(
            command="dump-features",
            config=config.model_dump(mode="json"),
            device=str(ranks.device),
            precision=str(encoding_precision(ranks.device)).removeprefix("torch."),
            ranks=ranks.world,
            threads=torch.get_num_threads(),
            seed=config.dump.seed,
            dataset=dataset.summary(),
            network=backbone.network,
            made_from={
                "checkpoint": str(backbone.path),
                "weights": backbone.weights_digest,
                "epoch": backbone.epoch,
                **(backbone.brought or {}),
            },
        ),
        "retry": readable_now(skipped, dataset, store=out, may_skip=config.dump.on_error == "skip"),
    }


def _arrays(head: torch.nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    weight = head.weight.detach().cpu().numpy()
    return weight, np.zeros(len(weight), np.float32) if head.bias is None else head.bias.detach().cpu().numpy()


def _set_head(
    writer: Writer, backbone: Checkpoint, config: Config, dataset: Dataset, *, ranks: Ranks, stop: Signals
) -> None:
    """Fits the head of a backbone that has none for these classes, from the features in the store; on rank 0 alone.

    They are read again for every evaluation where stage 2 could not hold them in memory either.
    """
    if not (backbone.probe and ranks.first) or writer.has_classifier:
        return
    layout, labels = writer.layout, torch.from_numpy(dataset.train.labels)
    chunks = list(layout.chunks_of("train", 0))
    fits = (
        layout.rows("train") * layout.width * (2 if layout.dtype == "float16" else 4) <= config.rebalance.memory_bytes
    )
    read = functools.cache(writer.read) if fits else writer.read

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chunk in chunks:
            features, truth = torch.from_numpy(read(chunk)), labels[chunk.start : chunk.stop]
            there = ~features[:, 0].isnan()
            if there.any():
                yield features[there].to(ranks.device).float(), truth[there].to(ranks.device)

    with as_data_error():
        found = probe.fit_probe(
            blocks, classes=layout.classes, width=layout.width, stop=lambda: _obey(stop, writer.place.where)
        )
        writer.set_classifier(*found)


def _seal(writer: Writer, backbone: Checkpoint, config: Config, dataset: Dataset) -> str:
    point = KillPoint(os.environ.get("PIPELINE_KILL_AT"), rank=0)
    with as_data_error(), point.around("seal", size=1024):  # its one file is larger
        return writer.seal(lambda skipped: fingerprint(backbone, config, dataset, skipped=skipped))


def _obey(signals: Signals, out: Path | str) -> None:
    if signals.received:
        stop = Terminated(f"stopped; the finished chunks are in {out}: the same command goes on")
        stop.exit_code = signals.exit_code
        raise stop


@contextmanager
def as_data_error() -> Iterator[None]:
    """What the store says, as the error that ends a command."""
    try:
        yield
    except CacheError as error:
        ending = DataError(str(error))
        ending.exit_code = error.exit_code
        raise ending from error
