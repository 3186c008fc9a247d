"""How much memory a process may still take."""

from pathlib import Path


def free_memory() -> int | None:
    """Bytes that the system would give a process without swapping, or its control group if that is less; None where
    neither is told."""
    return min((n for n in (_of_system(), _of_group()) if n is not None), default=None)


def _of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


def _of_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take (cgroup version 2)."""
    try:
        limit, used = (int((root / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such group, or `max`: no limit
        return None
    return max(0, limit - used)
