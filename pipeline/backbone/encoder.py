"""The frozen encoder on its device: images in, features out, in the formats in which that takes the least time."""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbone.arithmetic import (
    MEMORY_FORMATS,
    SMALL_NETWORK,
    Arithmetic,
    choose_precision,
    computes_bfloat16,
    forward_operations,
)
from pipeline.backbone.build import classifier, encode
from pipeline.backbone.checkpoint import Checkpoint
from pipeline.config import DumpConfig
from pipeline.resources import keep_freed_memory, usable_cores

MICRO_BATCHES = (16, 64)  # the first is within some 5 % of the best size wherever it was measured
TRIAL_IMAGES = 4  # of the trial of formats
TRIAL_SECONDS = 2.0  # a trial of larger micro-batches that would take longer gains less than it costs
MICRO_SECONDS = 10.0  # most that a micro-batch takes: a dump that is stopped loses the one that is computed
SLOWER = (2.0, 1.2)  # after each pass, a candidate that took this many times the best one's time is out


class Encoder:
    """The encoder of a backbone on its device.

    On a CPU, micro-batches are computed side by side, each by one thread (`lanes` of them). Threads that share one operation
    wait for each other behind each of some hundred layers: beside other work a core is lent to somebody else at any moment, and
    all wait for its part.
    """

    def __init__(self, backbone: Checkpoint, device: torch.device, arithmetic: Arithmetic):
        self.device, self.arithmetic = device, arithmetic
        self.lanes = 1
        if device.type == "cpu":
            keep_freed_memory()
            self.lanes = min(torch.get_num_threads(), usable_cores())
        self.width = classifier(backbone.model).in_features
        self._model = arithmetic.arrange_weights(backbone.model.to(device)).eval()

    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, D) of normalised images (B, 3, H, W) on the device."""
        return torch.cat(list(self.stream([images])))

    def stream(self, batches: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Yield the features of batches of normalised images in order, a micro-batch at a time.

        While the caller or the source of the batches is at work, the next ones are computed. Closing the generator ends that.
        """
        size = self.arithmetic.micro_batch
        if self.device.type != "cpu" or size is None:
            for images in batches:
                yield encode_in_parts(self._model, images, self.arithmetic)
            return
        pending: deque[Future[Tensor]] = deque()
        with one_thread(), ThreadPoolExecutor(self.lanes, "encode") as pool:
            try:
                for images in batches:
                    parts = images.split(size) if len(images) else [images]
                    for part in parts:
                        pending.append(pool.submit(encode_in_parts, self._model, part, self.arithmetic))
                        while len(pending) > len(parts) + self.lanes or (pending and pending[0].done()):
                            yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute each operation inside by one thread, in threads that are started inside too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def encode_in_parts(model: nn.Module, images: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Return features (B, D) of images (B, 3, H, W), computed `arithmetic.micro_batch` images at a time."""
    with arithmetic.autocast(images.device):
        parts = images.split(arithmetic.micro_batch or len(images)) if len(images) else [images]
        return torch.cat([encode(model, arithmetic.arrange(part)) for part in parts])


def encoding_arithmetic(
    model: nn.Module,
    size: tuple[int, int],
    device: torch.device,
    settings: DumpConfig,
    *,
    recorded: Mapping[str, Any] | None = None,
) -> Arithmetic:
    """Return the formats in which a frozen encoder computes.

    On a GPU with bfloat16 units they are bfloat16 and channels_last. On a CPU a timed trial decides among what it
    computes natively, but for networks so small that the choice would cost more than it gains.

    Arguments:
        model: in evaluation mode; it may come back in another memory format.
        size: (height, width) of the images.
        settings: `precision`, `memory_format` and `micro_batch` that are set are taken as they are.
        recorded: provenance of the store that is to be finished; what it was begun with is kept where it can be.

    Raises:
        ConfigError: for a precision that this device only emulates.
    """
    if device.type == "cuda":
        native = "bfloat16" if computes_bfloat16(device) else "float32"
        precision = native if settings.precision == "auto" else settings.precision
        memory_format = "channels_last" if settings.memory_format == "auto" else settings.memory_format
        return Arithmetic(getattr(torch, precision), memory_format, settings.micro_batch)
    if settings.precision != "auto":
        choose_precision(settings.precision, device, key="dump.precision")
    resumed = _recorded_arithmetic(recorded or {}, device)
    if resumed is not None:
        precisions, formats, sizes = [resumed.precision], [resumed.memory_format], [resumed.micro_batch]
    elif forward_operations(model, size, device) < SMALL_NETWORK:
        precisions, formats, sizes = [torch.float32], ["contiguous"], [None]
    else:
        precisions = [torch.float32, *([torch.bfloat16] if computes_bfloat16(device) else [])]
        formats, sizes = list(MEMORY_FORMATS), list[int | None](MICRO_BATCHES)
    if settings.precision != "auto":
        precisions = [getattr(torch, settings.precision)]
    if settings.memory_format != "auto":
        formats = [settings.memory_format]
    if settings.micro_batch is not None:
        sizes = [settings.micro_batch]
    candidates = [Arithmetic(p, f, sizes[0]) for p in precisions for f in formats]
    first, seconds = fastest(model, size, candidates, images=TRIAL_IMAGES)
    if settings.micro_batch is None and resumed is None and sizes[0] and sizes[0] * seconds > MICRO_SECONDS:
        sizes = [max(1, int(MICRO_SECONDS / seconds))]
    passes = 1 + len(SLOWER)
    sizes = [n for n in sizes if n == sizes[0] or passes * seconds * (n or 1) < TRIAL_SECONDS]
    return fastest(model, size, [Arithmetic(first.precision, first.memory_format, n) for n in sizes])[0]


def fastest(
    model: nn.Module, size: tuple[int, int], candidates: Sequence[Arithmetic], *, images: int | None = None
) -> tuple[Arithmetic, float]:
    """Return the candidate in which the model takes the least CPU time for images (3, *size), and its seconds an image.

    One thread computes and its own clock counts, so that other work on the machine decides nothing.

    Arguments:
        images: encoded in each pass, by default the candidate's micro-batch.
    """
    if len(candidates) == 1:
        return candidates[0], 0.0
    keep_freed_memory()
    sizes = [images or candidate.micro_batch or 1 for candidate in candidates]
    pixels = torch.randn(max(sizes), 3, *size, generator=torch.Generator().manual_seed(0))
    seconds: dict[Arithmetic, float] = {}
    remaining = list(zip(candidates, sizes, strict=True))
    with one_thread():
        for slower in (*SLOWER, 1.0):
            for candidate, count in remaining:
                candidate.arrange_weights(model)
                started = time.thread_time()
                encode_in_parts(model, pixels[:count], candidate)
                seconds[candidate] = min(seconds.get(candidate, float("inf")), (time.thread_time() - started) / count)
            limit = slower * min(seconds.values())
            remaining = [(candidate, count) for candidate, count in remaining if seconds[candidate] <= limit]
    best = remaining[0][0]
    return best, seconds[best]


def _recorded_arithmetic(provenance: Mapping[str, Any], device: torch.device) -> Arithmetic | None:
    """Return the formats that a store was begun with, None where it does not say or the device only emulates them."""
    precision = provenance.get("precision")
    if precision not in ("float32", "bfloat16") or not str(provenance.get("device", "")).startswith(device.type):
        return None
    if precision == "bfloat16" and not computes_bfloat16(device):
        return None
    return Arithmetic(
        getattr(torch, precision), provenance.get("memory_format", "contiguous"), provenance.get("micro_batch")
    )
