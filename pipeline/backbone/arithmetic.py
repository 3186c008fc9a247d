"""The number format and memory format in which a network is trained, chosen by what the device computes natively."""

import copy
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distributed import Ranks
from pipeline.errors import ConfigError

SMALL_NETWORK = (
    40_000_000  # floating-point operations per image; below it the conversions of autocast cost what they save
)
TRIAL_IMAGES = 32
TRIALS = 3
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Arithmetic:
    """The formats in which a network computes.

    Arguments:
        precision: of the matrix products and convolutions; weights and their updates stay float32.
        memory_format: of images and weights, a key of `MEMORY_FORMATS`.
        micro_batch: images of one forward pass when a frozen encoder computes; None for all of a batch.
    """

    precision: torch.dtype
    memory_format: str = "contiguous"
    micro_batch: int | None = None

    @property
    def precision_name(self) -> str:
        """Return `bfloat16` for torch.bfloat16."""
        return str(self.precision).removeprefix("torch.")

    def __str__(self) -> str:
        size = f", {self.micro_batch} images at a time" if self.micro_batch else ""
        return f"{self.precision_name}, {self.memory_format}{size}"

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context in which the device computes a forward pass in this precision."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.precision)

    def arrange(self, pixels: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in this memory format."""
        return pixels.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])

    def arrange_weights(self, model: nn.Module) -> nn.Module:
        """Bring the weights of a model into this memory format and return the model."""
        return model.to(memory_format=MEMORY_FORMATS[self.memory_format])

    def gradient_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Return the scaler that keeps float16 gradients from vanishing; it does nothing in other precisions."""
        return torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)


def training_arithmetic(
    model: nn.Module, size: tuple[int, int], ranks: Ranks, *, setting: str, state: dict[str, Any] | None = None
) -> Arithmetic:
    """Return the formats of a training: those of the checkpoint that it resumes, else what suits the device.

    All ranks take what rank 0 chose, so that a timed trial cannot make them differ.

    Arguments:
        model: on the device.
        size: (height, width) of the images.
        setting: `backbone.precision`.
        state: of the checkpoint that training resumes from.
    """
    device = ranks.device
    precision = training_precision(model, size, device, setting=setting, state=state)
    if state is not None:
        recorded = state.get("memory_format")
        return Arithmetic(precision, recorded or ("channels_last" if device.type == "cuda" else "contiguous"))
    if device.type != "cuda" and forward_operations(model, size, device) < SMALL_NETWORK:
        return Arithmetic(precision)
    fastest = fastest_memory_format(model, size, device, precision) if ranks.first else ""
    return Arithmetic(precision, ranks.gathered(fastest)[0])


def training_precision(
    model: nn.Module, size: tuple[int, int], device: torch.device, *, setting: str, state: dict[str, Any] | None = None
) -> torch.dtype:
    """Return the precision of a training: with `auto` that of the checkpoint's `state` it resumes, else the device's.

    Raises:
        ConfigError: for a precision that this device only emulates.
    """
    recorded = recorded_precision(state) if state is not None else None
    if recorded is not None and setting == "auto":
        return choose_precision(recorded, device)
    if device.type == "cuda":
        return choose_precision(setting, device)
    weights_device = next(model.parameters()).device
    return choose_precision(setting, device, operations=forward_operations(model, size, weights_device))


def recorded_precision(state: dict[str, Any]) -> str | None:
    """Return the precision in which a checkpoint was trained, such as `bfloat16`; None where it does not say."""
    precision = state.get("identity", {}).get("backbone.precision")
    if precision in (None, "auto"):  # before 0.2 the identity held the setting, the provenance what was chosen
        precision = state.get("provenance", {}).get("precision")
    return precision


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware (GPU tensor cores, AVX-512 BF16, AMX).

    A CPU without such units emulates bfloat16, some hundred times more slowly than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in supported if ask is not None)


def choose_precision(
    setting: str, device: torch.device, *, operations: int | None = None, key: str = "backbone.precision"
) -> torch.dtype:
    """Return the data type of the matrix products of a network.

    Arguments:
        setting: `auto`, `float32`, `bfloat16` or `float16`, as `backbone.precision` takes them.
        operations: floating-point operations of one image's forward pass (`forward_operations`), or None if unknown.
            On a CPU `auto` takes float32 for a network below `SMALL_NETWORK`.
        key: of the configuration, which says `setting`.

    Raises:
        ConfigError: for a precision that this device only emulates.
    """
    if device.type == "cuda":
        if setting == "auto":
            return torch.bfloat16 if computes_bfloat16(device) else torch.float16
        return getattr(torch, setting)
    if setting == "auto":
        small = operations is None or operations < SMALL_NETWORK
        return torch.float32 if small or not computes_bfloat16(device) else torch.bfloat16
    if setting == "float16":
        raise ConfigError(f"{key}=float16: only GPUs compute in it; on a CPU take auto")
    if setting == "bfloat16" and not computes_bfloat16(device):
        raise ConfigError(
            f"{key}=bfloat16: this CPU has no bfloat16 units (AVX-512 BF16 or AMX) and would emulate them "
            "very slowly; take float32 or auto"
        )
    return getattr(torch, setting)


@torch.no_grad()
def forward_operations(model: nn.Module, size: tuple[int, int], device: torch.device) -> int:
    """Return the floating-point operations of the forward pass of one image (3, *size) through the model."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, a third of a second

    was_training = model.training
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, 3, *size, device=device))
        return counter.get_total_flops()
    finally:
        model.train(was_training)


def fastest_memory_format(model: nn.Module, size: tuple[int, int], device: torch.device, precision: torch.dtype) -> str:
    """Return the key of `MEMORY_FORMATS` in which a training step of a copy of the model takes the least time.

    GPUs always take channels_last. A CPU is timed (median of `TRIALS` steps of `TRIAL_IMAGES` images (3, *size), the
    formats in turns), since which format wins depends on the CPU and the network.
    """
    if device.type == "cuda":
        return "channels_last"
    images = torch.zeros(TRIAL_IMAGES, 3, *size, device=device)
    labels = torch.zeros(TRIAL_IMAGES, dtype=torch.long, device=device)
    candidates = [Arithmetic(precision, name) for name in MEMORY_FORMATS]
    copies = [candidate.arrange_weights(copy.deepcopy(model).train()) for candidate in candidates]
    seconds: dict[str, list[float]] = {name: [] for name in MEMORY_FORMATS}
    with torch.random.fork_rng(devices=[]):  # dropout draws from a generator that training does not see
        for trial in range(TRIALS + 1):
            for candidate, network in zip(candidates, copies, strict=True):
                started = time.perf_counter()
                with candidate.autocast(device):
                    logits = network(candidate.arrange(images))
                F.cross_entropy(logits.float(), labels).backward()
                if trial:  # the first step prepares kernels
                    seconds[candidate.memory_format].append(time.perf_counter() - started)
    return min(seconds, key=lambda name: sorted(seconds[name])[TRIALS // 2])
