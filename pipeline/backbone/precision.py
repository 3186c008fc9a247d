"""The number format and memory format in which a network is trained, chosen by what the device computes natively."""

import copy
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigError

SMALL_NETWORK = (
    40_000_000  # floating-point operations per image; below it the conversions of autocast cost what they save
)
TRIAL_IMAGES = 32
TRIALS = 3
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware (GPU tensor cores, AVX-512 BF16, AMX).

    A CPU without such units emulates bfloat16, some hundred times more slowly than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in supported if ask is not None)


def choose_precision(wanted: str, device: torch.device, *, operations: int | None = None) -> torch.dtype:
    """Return the data type of the matrix products in training; weights and their updates stay float32.

    Arguments:
        wanted: `auto`, `float32`, `bfloat16` or `float16`, as `backbone.precision` takes them.
        device: where the network is trained.
        operations: floating-point operations of one image's forward pass (`forward_operations`), or None if unknown.
            On a CPU `auto` takes float32 for a network below `SMALL_NETWORK`.

    Raises:
        ConfigError: for a precision that this device only emulates.
    """
    if device.type == "cuda":
        if wanted == "auto":
            return torch.bfloat16 if computes_bfloat16(device) else torch.float16
        return getattr(torch, wanted)
    if wanted == "auto":
        small = operations is None or operations < SMALL_NETWORK
        return torch.float32 if small or not computes_bfloat16(device) else torch.bfloat16
    if wanted == "float16":
        raise ConfigError("backbone.precision=float16: only GPUs compute in it; on a CPU take auto")
    if wanted == "bfloat16" and not computes_bfloat16(device):
        raise ConfigError(
            "backbone.precision=bfloat16: this CPU has no bfloat16 units (AVX-512 BF16 or AMX) and would emulate them "
            "very slowly; take float32 or auto"
        )
    return getattr(torch, wanted)


def name_of(precision: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(precision).removeprefix("torch.")


@torch.no_grad()
def forward_operations(model: nn.Module, size: tuple[int, int], device: torch.device) -> int:
    """Return the floating-point operations of the forward pass of one image (3, *size) through the model."""
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
    copies = {name: copy.deepcopy(model).train().to(memory_format=MEMORY_FORMATS[name]) for name in MEMORY_FORMATS}
    seconds: dict[str, list[float]] = {name: [] for name in MEMORY_FORMATS}
    with torch.random.fork_rng(devices=[]):  # dropout draws from a generator that training does not see
        for trial in range(TRIALS + 1):
            for name, network in copies.items():
                started = time.perf_counter()
                with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                    logits = network(images.contiguous(memory_format=MEMORY_FORMATS[name]))
                F.cross_entropy(logits.float(), labels).backward()
                if trial:  # the first step prepares kernels
                    seconds[name].append(time.perf_counter() - started)
    return min(seconds, key=lambda name: sorted(seconds[name])[TRIALS // 2])
