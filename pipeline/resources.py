"""Memory and cores that this process may use: the machine's, or those of its container where they are fewer."""

import ctypes
import functools
import math
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path("/")  # of the file system whose proc and sys/fs/cgroup are read; tests set another
ASSUMED_MEMORY = 4 << 30  # bytes, on systems that do not say

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # numbers of glibc's malloc.h
LARGEST_INT, TOP_PAD = 2**31 - 1, 256 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Make this process keep freed memory mapped for its next allocation; return False where that cannot be set.

    glibc gives large blocks back to the system one by one. A network on a CPU frees and takes its activations in every
    layer, and spent some 70 % of its time on mapping them again. Who sets malloc's own variables knows better.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    # a thread's arena of its own grows in pieces of 64 MB, too small for activations: one arena for all
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST_INT, M_TOP_PAD: TOP_PAD, M_ARENA_MAX: 1}
    mallopt = ctypes.CDLL(None).mallopt
    return sum(mallopt(option, value) for option, value in settings.items()) == len(settings)


def release_freed_memory() -> None:
    """Give the memory back to the system that glibc keeps after `keep_freed_memory`: the next allocations map it again."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(device: "torch.device | None" = None) -> int:
    """Return the free bytes of a GPU, or of the machine for a CPU and None; ASSUMED_MEMORY where the system does not say."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    measured = measured_free_memory()
    return ASSUMED_MEMORY if measured is None else measured


def measured_free_memory() -> int | None:
    """Return the bytes that can be allocated without swapping and within the limit of every control group of this process.

    None where the system does not say.
    """
    limits = [limit for group in _control_groups() if (limit := _group_memory(group)) is not None]
    try:
        lines = (ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    except (OSError, StopIteration, ValueError):  # not Linux
        pass
    return min(limits, default=None)


def usable_cores() -> int:
    """Return the cores that this process may use: CPU affinity, and the CPU quota of its control groups rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups():
        try:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
            cores = min(cores, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):  # the group at the top has no such file; `max` is no limit
            pass
    return max(1, cores)


def peak_memory_mb(device: "torch.device") -> float:
    """Return the peak memory in MiB: allocated on a GPU, else resident of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _control_groups() -> Iterator[Path]:
    """Yield the directories of this process's control group (version 2) and of those around it; a limit of any counts."""
    mount = ROOT / "sys/fs/cgroup"
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
    except (OSError, StopIteration):
        name = ""
    group = mount / name  # a container that sees the host's name but only its own files has the limits at the mount
    yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _group_memory(group: Path) -> int | None:
    """Return the bytes that a control group may still take: its limit less what it uses, file cache that can go left out."""
    try:
        limit, current = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
    except (OSError, ValueError):  # no such group, or `max`: no limit
        return None
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        cache = int(stat["inactive_file"])  # as the kubelet's working set
    except (OSError, ValueError, KeyError):
        cache = 0
    return max(0, limit - current + cache)
