"""The frozen encoder, once over every sample, into a feature store: prepare → encode → write → seal.

Which chunk is computed where changes nothing in it: batches are cut at chunk borders and augmentation is a function of
(seed, view, sample), so any number of ranks and of kills gives the same store.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import Chunk, Writer, owned_chunks
from pipeline import distributed
from pipeline.backbone.build import classifier
from pipeline.backbone.checkpoint import Checkpoint
from pipeline.backbone.encoder import Encoder
from pipeline.backbone.external_checkpoint import save_external
from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.data.transform import Loader
from pipeline.distributed import Ranks, Signals
from pipeline.dump_prepare import AT_CHANCE, PreparedDump, as_data_error, fingerprint, prepare_dump
from pipeline.errors import PipelineError, Terminated
from pipeline.head_order import find_order
from pipeline.killpoint import KillPoint
from pipeline.method_names import PROBE
from pipeline.probe import SETTINGS as PROBE_SETTINGS
from pipeline.probe import fit_probe
from pipeline.resources import release_freed_memory
from pipeline.seeds import derive
from pipeline.text import Shown
from pipeline.unreadable import skipped_text

OWN_HEAD = "of the backbone"
WAITING = 2  # encoded chunks that may wait for the disk; with the one being encoded they bound the memory
PART_SECONDS = 10.0  # of encoding, after which the finished rows of a chunk are kept
Report = Callable[[int, int, str], object]


def _no_report(done: int, total: int, note: str) -> None: ...


@dataclass(frozen=True)
class DumpResult(Shown):
    """A sealed store.

    Arguments:
        samples: split → N.
        written: chunks that this call computed, of `chunks` in all.
        skipped: split → images that could not be read; their rows are NaN and left out wherever features are used.
        head: the head that stage 2 starts from, the backbone's own classifier or a linear probe.
        head_choice: how it was fitted, or which order its classes have; empty where nothing was to be chosen.
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
    head_choice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"store": str(self.store)}

    def __str__(self) -> str:
        sizes = ", ".join(f"{n:,} {split}" for split, n in self.samples.items())
        done = f"{self.written} of {self.chunks} chunks written" if self.written else "nothing was missing"
        return (
            f"{self.store}: {sizes}; {self.views} training view(s), {self.width} features each, {self.dtype}\n"
            f"{done}, all checksums hold; {self.seconds:.1f} s; digest {self.digest[:16]}"
            + (f"\nhead: {self.head_choice}" if self.head_choice else "")
            + (f"\n{skipped_text(self.skipped)}" if self.skipped else "")
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
    report: Report = _no_report,
    say: Callable[[str], object] = lambda line: None,
    images: Dataset | None = None,
    keep_in: Path | None = None,
) -> DumpResult:
    """Return the sealed store of the backbone's features of every split; finish, verify or repair what is there.

    View 0 is the evaluation transform, views 1…V−1 the training augmentation; val and test have view 0 alone. Under
    torchrun the ranks share the work. A backbone without a head for these classes gets a linear probe (probe.py), fitted on
    the clean training features before the seal.

    Arguments:
        backbone: a checkpoint's file, of `train_backbone` or of any timm network; a loaded one; None for the encoder that
            the configuration names (backbone.encoder).
        config: images and settings; None for those that a checkpoint of `train_backbone` was made with.
        out: a folder or URL, by default features.zarr in the backbone's run.
        own_images: take the images of the checkpoint, and only the sections dump and rebalance of `config`.
        settings: KEY=VALUE laid over.
        model, key_map, probe: how a checkpoint from elsewhere is read, as in `load_external`; it is then copied into
            backbone/ beside the store.
        report: is called on rank 0 with (images done, images to do, note).
        say: is called with lines on what is used.
        images: of a loaded backbone, the configuration's data set if it is loaded.
        keep_in: of a loaded backbone, a folder into which it is saved once the store is known to be its own.

    Raises:
        DataError: a checkpoint or images that cannot be used, or, without overwrite, a store that was made otherwise.
        ConfigError: settings, or a backbone that cannot be used.
        Terminated: SIGTERM or Ctrl-C; finished images stay and the same call goes on.
    """
    started = time.perf_counter()
    with distributed.ranks(device) as ranks, Signals() as signals:
        prepared = prepare_dump(
            backbone, config, out=out, own_images=own_images, settings=settings, model=model, key_map=key_map,
            probe=probe, overwrite=overwrite, say=say, images=images, keep_in=keep_in, ranks=ranks,
        )  # fmt: skip
        return _dump(prepared, signals, report=report, started=started)


def _dump(prepared: PreparedDump, signals: Signals, *, report: Report, started: float) -> DumpResult:
    source, dataset, ranks = prepared.source, prepared.dataset, prepared.ranks
    backbone, config = source.backbone, source.config
    kill = KillPoint.from_environment(rank=ranks.rank)
    with _writer(prepared) as writer:
        ranks.together(lambda: save_external(backbone, source.keep_in) if source.keep_in and ranks.first else None)
        missing = missing_chunks(writer, ranks, skipping=config.dump.on_error == "skip")
        share = [missing[i] for i in owned_chunks(chunks=len(missing), rank=ranks.rank, world=ranks.world)]
        on_ranks = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
        progress = DumpProgress(sum(chunk.rows for chunk in share), report if ranks.first else _no_report, on_ranks)
        encoded = encoded_chunks(
            Encoder(backbone, ranks.device, prepared.arithmetic), share, dataset, backbone, config, signals,
            writer=writer, progress=progress,
        )  # fmt: skip
        ranks.together(lambda: write_chunks(writer, encoded, dataset=dataset, kill=kill))
        ranks.together(lambda: _obey(signals, source.out))
        head = ranks.together(
            lambda: (
                choose_head(writer, backbone, config, dataset, ranks.device, signals) if ranks.first else HeadChoice()
            )
        )
        digest = ranks.together(lambda: _seal(writer, prepared, kill, head) if ranks.first else "")
    return DumpResult(
        store=source.out,
        digest=digest,
        samples={name: len(split) for name, split in dataset.splits.items()},
        views=config.dump.views,
        width=writer.layout.width,
        dtype=writer.layout.dtype,
        chunks=len(writer.chunks),
        written=len(missing),
        seconds=round(time.perf_counter() - started, 2),
        network=backbone.network,
        dataset=dataset.summary(),
        skipped={s: [dataset.splits[s].name_of(r) for r in rows] for s, rows in writer.skipped.items()},
        head=PROBE if "probe" in writer.fingerprint else OWN_HEAD,
        head_choice=writer.provenance.get("head", ""),
    )


def batches_of(chunk: Chunk, batch_size: int, *, done: int = 0) -> list[np.ndarray]:
    """Return the rows of a chunk, but for the first `done`, in batches.

    None crosses the chunk's borders, and all end where they would with done = 0: no batch depends on what else is computed.
    """
    edges = range(chunk.start, chunk.stop, batch_size)
    batches = [np.arange(max(a, chunk.start + done), min(a + batch_size, chunk.stop)) for a in edges]
    return [rows for rows in batches if len(rows)]


def augmentation_key(seed: int, view: int) -> int | None:
    """Return the key of a view's augmentation; None for view 0, the evaluation transform."""
    return derive(seed, "view", view) if view else None


def missing_chunks(writer: Writer, ranks: Ranks, *, skipping: bool) -> list[Chunk]:
    """Return every chunk that has to be computed, the same list on all ranks; each looks at its share of the store.

    Arguments:
        skipping: whether a chunk that lacks the features of unreadable images counts as finished.
    """
    missing = set(writer.missing(rank=ranks.rank, world=ranks.world, skipping=skipping))
    flags = ranks.total(np.array([chunk in missing for chunk in writer.chunks], dtype=np.float64))
    return [chunk for chunk, flag in zip(writer.chunks, flags, strict=True) if flag]


Encoded = tuple[Chunk, np.ndarray, list[int]]  # features (rows, D) float32, and the unreadable rows in the chunk


@dataclass
class DumpProgress:
    """The images of this rank's share that are done, reported as they are encoded.

    Arguments:
        total: images of the share.
        done: of them, those that an earlier command encoded included.
    """

    total: int
    report: Report
    suffix: str = ""
    done: int = 0
    encoded: int = 0
    started: float | None = None

    def add(self, images: int, *, encoded: bool = True) -> None:
        """Count images that are done; those that were not encoded now count for no rate."""
        self.done += images
        if not encoded:
            return
        if self.started is None:  # the rate leaves out the time that processes which read images take to start
            self.started, rate = time.perf_counter(), ""
        else:
            self.encoded += images
            rate = f", {self.encoded / max(time.perf_counter() - self.started, 1e-9):,.0f}/s"
        self.report(self.done, self.total, f"images{self.suffix}{rate}")


def encoded_chunks(
    encoder: Encoder,
    chunks: Sequence[Chunk],
    dataset: Dataset,
    backbone: Checkpoint,
    config: Config,
    signals: Signals,
    *,
    writer: Writer,
    progress: DumpProgress,
) -> Iterator[Encoded]:
    """Yield the features of each chunk; keep what is finished of one and end once there is a signal.

    The finished rows of a chunk are also kept every PART_SECONDS, and a chunk is begun behind those that were.

    Raises:
        PipelineError: the device's memory does not suffice.
        DataError: an image cannot be read, and none may be skipped.
    """
    settings = config.dump
    unreadable: set[int] = set()
    note = unreadable.add if settings.on_error == "skip" else None
    for split, split_chunks in itertools.groupby(chunks, key=lambda chunk: chunk.split):
        loader = Loader(dataset.splits[split], backbone.transform, device=encoder.device, workers=config.data.workers)
        for view, view_chunks in itertools.groupby(split_chunks, key=lambda chunk: chunk.view):
            unreadable.clear()
            parts = [(chunk, _read_part(writer, chunk, skipping=note is not None)) for chunk in view_chunks]
            rows = [b for chunk, (kept, _) in parts for b in batches_of(chunk, settings.batch_size, done=len(kept))]
            images = loader.batches(rows, augmentation_key(settings.seed, view), unreadable=note)
            with closing(_until_signal(encoder.stream(images), encoder, settings.batch_size, signals)) as stream:
                for chunk, (kept, absent) in parts:
                    features = torch.empty(chunk.rows, encoder.width, device=encoder.device)
                    features[: len(kept)] = torch.from_numpy(kept)
                    done = kept_rows = len(kept)
                    progress.add(done, encoded=False)
                    kept_at = time.monotonic()
                    while done < chunk.rows:
                        encoded = next(stream, None)
                        if encoded is not None:
                            features[done : done + len(encoded)] = encoded
                            done += len(encoded)
                        no_features = [
                            *absent,
                            *(r - chunk.start for r in unreadable if chunk.start <= r < chunk.start + done),
                        ]
                        due = encoded is None or time.monotonic() - kept_at >= PART_SECONDS
                        if due and kept_rows < done < chunk.rows:
                            with as_data_error():
                                writer.write_part(chunk, features[:done].cpu().numpy(), absent=no_features)
                            kept_rows, kept_at = done, time.monotonic()
                        if encoded is None:
                            return
                        progress.add(len(encoded))
                    yield chunk, features.cpu().numpy(), sorted(no_features)


def _read_part(writer: Writer, chunk: Chunk, *, skipping: bool) -> tuple[np.ndarray, list[int]]:
    """Return the rows of a chunk that an earlier command kept and those without features; none where these may not be skipped."""
    with as_data_error():
        part = writer.read_part(chunk)
    if part is None or (part[1] and not skipping):
        return np.empty((0, writer.layout.width), np.float32), []
    return part


def _until_signal(
    features: Generator[torch.Tensor, None, None], encoder: Encoder, batch_size: int, signals: Signals
) -> Generator[torch.Tensor, None, None]:
    """Yield the encoder's features until there is a signal; turn a lack of memory into advice."""
    try:
        with closing(features):
            for encoded in features:
                yield encoded
                if signals.received:
                    return
    except torch.OutOfMemoryError as error:
        raise PipelineError(
            f"{encoder.device}: not enough memory for batches of {batch_size}; "
            f"go on with --set dump.batch_size={max(1, batch_size // 2)}"
        ) from error
    except (PipelineError, OSError, RuntimeError):
        if not signals.received:  # Ctrl-C at a terminal also ends the processes that load images
            raise


def write_chunks(writer: Writer, encoded: Iterator[Encoded], *, dataset: Dataset, kill: KillPoint) -> None:
    """Write this rank's share of the chunks, a background thread writing one while the next is encoded."""

    def write(number: int, chunk: Chunk, features: np.ndarray, unreadable: list[int]) -> None:
        images = dataset.splits[chunk.split]
        name = None if images.stored is None else images.name_of  # images in memory have no files
        with kill.around(str(number), size=writer.layout.features(chunk.split).chunk_bytes):
            writer.write(chunk, features, absent=unreadable, name=name)
        release_freed_memory()  # the holes that buffers of chunks leave would add up

    with as_data_error(), _in_background(write) as enqueue:
        for number, (chunk, features, unreadable) in enumerate(encoded, start=1):
            enqueue(number, chunk, features, unreadable)


@contextmanager
def _in_background(write: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """Yield a `put` that calls write in another thread, in order, waits while WAITING are pending and raises what failed."""
    pending: deque[Future[None]] = deque()

    def enqueue(*arguments: Any) -> None:
        while len(pending) >= WAITING:
            pending.popleft().result()
        pending.append(pool.submit(write, *arguments))

    with ThreadPoolExecutor(1, "write") as pool:
        yield enqueue
        for future in pending:
            future.result()


def _writer(prepared: PreparedDump) -> Writer:
    """Return the writer of the store, which rank 0 makes or opens before the other ranks open it."""
    ranks, out = prepared.ranks, prepared.source.out

    def create() -> Writer | None:
        if not ranks.first:
            return None
        with as_data_error():
            return cache.create_store(out, overwrite=prepared.overwrite, **prepared.store)

    def join() -> Writer:
        with as_data_error():
            return cache.open_writer(out)

    first = ranks.together(create)
    return ranks.together(lambda: first or join())


@dataclass(frozen=True)
class HeadChoice:
    """The head that stage 2 starts from, as it was chosen on the features.

    Arguments:
        facts: for the provenance of the store; empty where the head was final before.
        probe: for its fingerprint, how the head was fitted; None for the backbone's own.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    probe: str | None = None


def choose_head(
    writer: Writer, backbone: Checkpoint, config: Config, dataset: Dataset, device: torch.device, signals: Signals
) -> HeadChoice:
    """Write the classifier of a backbone whose own is none of these classes, or names none, and return the choice.

    A head that does not name its classes is put into the order that fits the training features. Where none does, and where
    there is no head, a linear probe is fitted. Features are read again for every evaluation where stage 2 could not hold them
    in memory either.
    """
    if backbone.head_is_final or writer.has_classifier:
        return HeadChoice(probe=writer.fingerprint.get("probe"))
    layout = writer.layout
    size = layout.rows("train") * layout.width * (2 if layout.dtype == "float16" else 4)
    resident = size <= config.rebalance.memory_bytes
    read = functools.cache(writer.read) if resident else writer.read

    def blocks(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = torch.from_numpy(dataset.splits[split].labels)
        for chunk in layout.chunks_of(split, 0):
            features, truth = torch.from_numpy(read(chunk)), labels[chunk.start : chunk.stop]
            readable = ~features[:, 0].isnan()
            if readable.any():
                yield features[readable].to(device).float(), truth[readable].to(device)

    facts, suffix = {}, ""
    with as_data_error():
        if not backbone.probe:
            layer = classifier(backbone.model)
            weight, bias = layer.weight.detach(), layer.bias if layer.bias is not None else torch.zeros(layout.classes)
            order = find_order(blocks("train"), weight, bias.detach(), backbone.class_names)
            if order.rows is not None:
                writer.set_classifier(weight.cpu().numpy()[order.rows], bias.detach().cpu().numpy()[order.rows])
                return HeadChoice({"head": str(order)})
            facts, suffix = {"order": str(order)}, AT_CHANCE
        validation = functools.partial(blocks, "val") if "val" in dataset.splits else None
        probe = fit_probe(
            functools.partial(blocks, "train"), classes=layout.classes, width=layout.width, validation=validation,
            resident=resident, stop=lambda: _obey(signals, writer.place.location),
        )  # fmt: skip
        writer.set_classifier(probe.weight, probe.bias)
    text = "; ".join([*facts.values(), str(probe)])
    return HeadChoice({"head": text, "probe": probe.to_dict()}, PROBE_SETTINGS + suffix)


def _seal(writer: Writer, prepared: PreparedDump, kill: KillPoint, head: HeadChoice) -> str:
    source = prepared.source
    with as_data_error(), kill.around("seal", size=1024):  # its one file is larger
        return writer.seal(
            lambda skipped: fingerprint(
                source.backbone, source.config, prepared.dataset, skipped=skipped, probe=head.probe
            ),
            facts=head.facts,
        )


def _obey(signals: Signals, out: Path | str) -> None:
    if signals.received:
        stop = Terminated(f"stopped; the finished images are in {out}: the same command goes on")
        stop.exit_code = signals.exit_code
        raise stop
