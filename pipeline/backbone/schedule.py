"""What a step is computed with: learning rate and seed; and the memory it took."""

import math
import resource
from typing import Any

import torch


def learning_rate(step: int, *, steps: int, settings: Any) -> float:
    """Linear warm-up, then cosine to 0 (Loshchilov and Hutter, 2017), per step; a pure function of the step."""
    warm, total = settings.warmup_epochs * steps, settings.epochs * steps
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    return 0.5 * settings.lr * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seed_step(seed: int, device: torch.device) -> None:
    """Seeds what dropout and the like draw from; torch.manual_seed asks all kinds of devices and takes 50 times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
