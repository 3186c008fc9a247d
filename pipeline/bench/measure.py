"""Two ways of doing the same, timed in turns, and whether what comes out is what is claimed."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.provenance import provenance
from pipeline.resources import usable_cores
from pipeline.text import Shown


@dataclass(frozen=True)
class Measure:
    """One claim: a value with its unit, and the target it has to reach, None where nothing is claimed.

    at_most: the target is an upper limit. figures: what the value was computed from. why: what keeps it from a target
    that it misses; it is told only then.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self) | {"met": self.met}
        facts["why"] = self.why if self.met is False else None
        return facts

    def __str__(self) -> str:
        line = f"{self.name:<58} {self.value:8.2f} {self.unit:<4}"
        if self.target is None:
            return line
        line += f" target {'≤' if self.at_most else '≥'} {self.target:g}  {'met' if self.met else 'MISSED'}"
        return line + (f": {self.why}" if self.why and not self.met else "")


@dataclass(frozen=True)
class Benchmark(Shown):
    """All measures of one run, the machine they hold for and the settings they were made with."""

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    measures: tuple[Measure, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"measures": [measure.to_dict() for measure in self.measures]}

    def __str__(self) -> str:
        facts = self.machine
        where = f"{facts['processor']}, {facts['cpus']} CPUs, {facts['threads']} thread(s), load {facts['load']:.1f}"
        return "\n".join([f"bench {self.name} on {where}", *map(str, self.measures), f"{self.seconds:.0f} s in all"])


class Seconds(float):
    """What a way of doing something returns when it has taken its own time."""


def interleaved(ways: Mapping[str, Callable[[], object]], *, repeat: int) -> dict[str, list[float]]:
    """Seconds that each way took, `repeat` times, in turns so that what disturbs the machine meets all of them alike.

    Each is called once before, uncounted: caches are then warm. What a way
    returns is dropped after its time is taken; one that returns Seconds is believed.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for turn in range(repeat):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            result = ways[name]()
            seconds = time.perf_counter() - started
            taken[name].append(float(result) if isinstance(result, Seconds) else seconds)
            del result
    return taken


def ratio(
    name: str, seconds: dict[str, list[float]], *, of: str, over: str, work: float, unit: str, **claim: Any
) -> Measure:
    """The Measure of one way's median rate over another's; work: how much, in `unit`, each call does."""
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    figures: dict[str, Any] = {f"{way}, {unit}/s": round(work / median, 3) for way, median in medians.items()}
    figures |= {f"{way}, all s": [round(t, 4) for t in times] for way, times in seconds.items()}
    return Measure(name, round(medians[over] / medians[of], 4), "×", figures=figures, **claim)


def busy() -> str:
    """How many want a CPU and how many CPUs there are, at this moment: what a missed target may come from."""
    return f"load {os.getloadavg()[0]:.1f} on {usable_cores()} CPUs"


def machine(**facts: Any) -> dict[str, Any]:
    """What a figure of this process holds for: processor, CPUs, threads, versions, how busy the machine is already."""
    import torch

    made = provenance()
    return {
        "processor": _processor(),
        "cpus": usable_cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": made["versions"],
        "git": made["git"],
        "platform": made["platform"],
        "created": made["created"],
        **facts,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
