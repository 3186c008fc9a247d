"""The frozen encoder, once over every sample, into a feature store: plan (pure) → encode → write → seal.

Which chunk is computed where changes nothing in it: batches are cut at chunk borders and augmentation is a function of
(seed, view, sample), so any number of ranks and of kills gives the same store.
"""

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import CacheError, Chunk, Writer, owned_chunks
from pipeline import distributed
from pipeline.backbone.checkpoint import Checkpoint
from pipeline.backbone.model import classifier, encode
from pipeline.config import Config
from pipeline.data import Dataset, load_dataset
from pipeline.data.transform import Loader
from pipeline.distributed import Ranks, Signals
from pipeline.errors import DataError, PipelineError, Terminated
from pipeline.provenance import provenance
from pipeline.seeds import derive

WAITING = 2  # encoded chunks that may wait for the disk; with the one being encoded they bound the memory


@dataclass(frozen=True)
class DumpResult:
    """A sealed store. samples: split → N; written: chunks that this call computed, of `chunks` in all."""

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"store": str(self.store)}

    def __str__(self) -> str:
        sizes = ", ".join(f"{n:,} {split}" for split, n in self.samples.items())
        done = f"{self.written} of {self.chunks} chunks written" if self.written else "nothing was missing"
        return (
            f"{self.store}: {sizes}; {self.views} training view(s), {self.width} features each, {self.dtype}\n"
            f"{done}, all checksums hold; {self.seconds:.1f} s; digest {self.digest[:16]}"
        )


def dump_features(
    backbone: Checkpoint,
    config: Config,
    *,
    out: Path | str,
    device: str = "auto",
    overwrite: bool = False,
    report: Callable[[int, int, str], object] = lambda done, total, note: None,
) -> DumpResult:
    """The sealed store of the backbone's features of every split; finishes, verifies or repairs what is there.

    View 0 is the evaluation transform, views 1…V−1 the training augmentation; val and test have view 0 alone. Under
    torchrun the ranks share the work. report is called on rank 0 with (images done, images to do, note).
    Raises DataError (images, or a store made otherwise without overwrite), Terminated (SIGTERM or Ctrl-C: finished
    chunks are kept and the same call goes on).
    """
    started = time.perf_counter()
    with distributed.ranks(device) as ranks, Signals() as signals:
        dataset = ranks.together(lambda: _fitting(load_dataset(config.data), backbone))
        writer = _writer(backbone, config, dataset, out=out, ranks=ranks, overwrite=overwrite)
        with writer:
            missing = missing_chunks(writer, ranks)
            mine = [missing[i] for i in owned_chunks(chunks=len(missing), rank=ranks.rank, world=ranks.world)]
            encoder = Encoder(backbone, config, dataset, device=ranks.device)
            ranks.together(lambda: write_chunks(writer, encoder, mine, ranks=ranks, stop=signals, report=report))
            ranks.together(lambda: _obey(signals, out))
            digest = ranks.together(lambda: _seal(writer) if ranks.first else "")
    return DumpResult(
        store=out,
        digest=digest,
        samples={name: len(split) for name, split in dataset.splits.items()},
        views=config.dump.views,
        width=writer.layout.width,
        dtype=writer.layout.dtype,
        chunks=len(writer.chunks),
        written=len(missing),
        seconds=round(time.perf_counter() - started, 2),
        network=backbone.network,
    )


def fingerprint(backbone: Checkpoint, config: Config, dataset: Dataset) -> dict[str, Any]:
    """What decides the features, up to rounding; two stores that differ in any of it are different stores.

    Batch size, device and precision only round differently: a dump may go on with a smaller batch or elsewhere.
    """
    return {
        "dataset": dataset.fingerprint,
        "checkpoint": backbone.weights_digest,
        "network": backbone.network["network"],
        "transform": json.dumps(backbone.transform.to_dict(), sort_keys=True),
        "views": config.dump.views,
        "seed": config.dump.seed,
        "dtype": config.dump.dtype,
    }


def batches_of(chunk: Chunk, batch_size: int) -> list[np.ndarray]:
    """The rows of a chunk in batches; none crosses its borders, so no batch depends on what else is computed."""
    return [np.arange(a, min(a + batch_size, chunk.stop)) for a in range(chunk.start, chunk.stop, batch_size)]


def augmentation_key(seed: int, view: int) -> int | None:
    """The key of a view's augmentation; None for view 0, the evaluation transform."""
    return derive(seed, "view", view) if view else None


def missing_chunks(writer: Writer, ranks: Ranks) -> list[Chunk]:
    """Every chunk that has to be computed, the same list on all ranks: each looks at its share of the store."""
    chunks = writer.chunks
    found = set(writer.missing(rank=ranks.rank, world=ranks.world))
    flags = ranks.total(np.array([chunk in found for chunk in chunks], dtype=np.float64))
    return [chunk for chunk, flag in zip(chunks, flags, strict=True) if flag]


class Encoder:
    """The backbone on its device: rows of a split → features."""

    def __init__(self, backbone: Checkpoint, config: Config, dataset: Dataset, *, device: torch.device):
        self.device, self.settings = device, config.dump
        self.precision = encoding_precision(device)
        self._memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._model = backbone.model.to(device, memory_format=self._memory_format).eval()  # type: ignore[call-overload]
        self._width = classifier(backbone.model).in_features
        self._dataset, self._transform, self._workers = dataset, backbone.transform, config.data.workers

    def chunks(self, wanted: Sequence[Chunk], stop: Signals) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Each wanted chunk with its features (rows, D) float32, in order; ends between batches once asked to stop.

        Raises DataError for an image that cannot be read, PipelineError where the device's memory does not suffice.
        """
        for split, of_split in itertools.groupby(wanted, key=lambda chunk: chunk.split):
            loader = Loader(self._dataset.splits[split], self._transform, device=self.device, workers=self._workers)
            for view, of_view in itertools.groupby(of_split, key=lambda chunk: chunk.view):
                run = [(chunk, batches_of(chunk, self.settings.batch_size)) for chunk in of_view]
                rows = [batch for _, batches in run for batch in batches]
                images = loader.batches(rows, augmentation_key(self.settings.seed, view))
                for chunk, batches in run:
                    features = self._encode(chunk, itertools.islice(images, len(batches)), stop)
                    if features is None:
                        return
                    yield chunk, features

    def _encode(self, chunk: Chunk, images: Iterator[torch.Tensor], stop: Signals) -> np.ndarray | None:
        features = torch.empty(chunk.rows, self._width, device=self.device)
        done = 0
        try:
            for batch in images:
                if stop.received:
                    return None
                with torch.inference_mode(), self._autocast():
                    got = encode(self._model, batch.contiguous(memory_format=self._memory_format))
                features[done : done + len(batch)] = got
                done += len(batch)
            return features.cpu().numpy()
        except torch.OutOfMemoryError as error:
            size = self.settings.batch_size
            raise PipelineError(
                f"{self.device}: not enough memory for batches of {size}; "
                f"go on with --set dump.batch_size={max(1, size // 2)}"
            ) from error

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
    with _as_data_error(), _in_background(_armed(writer.write)) as put:
        for chunk, features in encoder.chunks(wanted, stop):
            put(chunk, features)
            done += chunk.rows
            if ranks.first:
                report(done, total, f"images{share}, {done / (time.perf_counter() - started):,.0f}/s")


@contextmanager
def _in_background(write: Callable[[Chunk, np.ndarray], None]) -> Iterator[Callable[[Chunk, np.ndarray], None]]:
    """A `put` that writes in one other thread, in order; it waits while WAITING are pending, and raises what failed."""
    pending: deque[Future[None]] = deque()

    def put(chunk: Chunk, features: np.ndarray) -> None:
        while len(pending) >= WAITING:
            pending.popleft().result()
        pending.append(pool.submit(write, chunk, features))

    with ThreadPoolExecutor(1, "write") as pool:
        yield put
        for future in pending:
            future.result()


def _armed(write: Callable[[Chunk, np.ndarray], None]) -> Callable[[Chunk, np.ndarray], None]:
    """write, then death as by `kill -9` after PIPELINE_KILL_AFTER_CHUNK chunks: how tests prove resuming."""
    deadline = os.environ.get("PIPELINE_KILL_AFTER_CHUNK")
    if deadline is None:
        return write
    written = itertools.count(1)

    def write_and_die(chunk: Chunk, features: np.ndarray) -> None:
        write(chunk, features)
        if next(written) == int(deadline):
            os.kill(os.getpid(), 9)

    return write_and_die


def _fitting(dataset: Dataset, backbone: Checkpoint) -> Dataset:
    """The data set, if the backbone's classes and input size are its own; DataError otherwise."""
    if dataset.class_names != backbone.class_names:
        differing = [(a, b) for a, b in zip(backbone.class_names, dataset.class_names, strict=False) if a != b]
        detail = ", the first that differs: {!r} against {!r}".format(*differing[0]) if differing else ""
        raise DataError(
            f"{backbone.path}: trained on {len(backbone.class_names)} classes, the data has "
            f"{len(dataset.class_names)}{detail}; give the configuration it was trained with, or train again"
        )
    for name, split in dataset.splits.items():
        if split.images is not None and split.images.shape[1:3] != backbone.transform.size:
            wanted, got = ("×".join(map(str, size)) for size in (backbone.transform.size, split.images.shape[1:3]))
            raise DataError(f"{backbone.path}: trained on {wanted} images, {name} has {got}; set data.image_size")
    return dataset


def _writer(
    backbone: Checkpoint, config: Config, dataset: Dataset, *, out: Path | str, ranks: Ranks, overwrite: bool
) -> Writer:
    """Rank 0 makes or takes up the store, then the others join."""
    head = classifier(backbone.model)
    weight = head.weight.detach().cpu().numpy()
    bias = np.zeros(len(weight), np.float32) if head.bias is None else head.bias.detach().cpu().numpy()

    def create() -> Writer | None:
        if not ranks.first:
            return None
        with _as_data_error():
            return cache.create_store(
                out,
                splits={
                    name: cache.Split(config.dump.views if name == "train" else 1, split.labels, split.ids)
                    for name, split in dataset.splits.items()
                },
                width=head.in_features,
                dtype=config.dump.dtype,
                weight=weight,
                bias=bias,
                class_names=dataset.class_names,
                counts=dataset.counts,
                fingerprint=fingerprint(backbone, config, dataset),
                provenance=provenance(
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
                    },
                ),
                overwrite=overwrite,
            )

    def join() -> Writer:
        with _as_data_error():
            return cache.open_writer(out)

    made = ranks.together(create)
    return ranks.together(lambda: made or join())


def _seal(writer: Writer) -> str:
    with _as_data_error():
        return writer.seal()


def _obey(signals: Signals, out: Path | str) -> None:
    if signals.received:
        stop = Terminated(f"stopped; the finished chunks are in {out}: the same command goes on")
        stop.exit_code = signals.exit_code
        raise stop


@contextmanager
def _as_data_error() -> Iterator[None]:
    """What the store says, as the error that ends a command."""
    try:
        yield
    except CacheError as error:
        raise DataError(str(error)) from error
