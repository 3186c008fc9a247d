"""Functions that do the same, timed in turns, and the ratio of their rates beside its target."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.provenance import provenance
from pipeline.resources import usable_cores
from pipeline.text import Shown


@dataclass(frozen=True)
class Measure:
    """One value with its unit and target.

    Arguments:
        target: None where nothing is claimed; at_most makes it an upper limit.
        figures: the numbers that the value was computed from.
        why: the reason for a missed target; printed only then.
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
    """All measures of one run of `pipeline bench`.

    Arguments:
        machine: processor, cores, load and versions.
        seconds: of the whole run.
    """

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    measures: tuple[Measure, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"measures": [measure.to_dict() for measure in self.measures]}

    def __str__(self) -> str:
        facts = self.machine
        machine = f"{facts['processor']}, {facts['cpus']} CPUs, {facts['threads']} thread(s), load {facts['load']:.1f}"
        return "\n".join([f"bench {self.name} on {machine}", *map(str, self.measures), f"{self.seconds:.0f} s in all"])


class Seconds(float):
    """The time of a function that measures itself; `interleaved` takes it instead of its own."""


def interleaved(functions: Mapping[str, Callable[[], object]], *, repeat: int) -> dict[str, list[float]]:
    """Return `repeat` times in seconds of each function, called in turns so that disturbances meet all of them alike.

    Each is called once before, uncounted: caches are then warm. Its result is freed after its time is taken.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(repeat):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            result = functions[name]()
            seconds = time.perf_counter() - started
            times[name].append(float(result) if isinstance(result, Seconds) else seconds)
            del result
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def all_seconds(times: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return the figures that hold every single time."""
    return {f"{name}, all s": [round(s, 4) for s in seconds] for name, seconds in times.items()}


def ratio(
    name: str, times: dict[str, list[float]], subject: str, over: str, *, work: float, unit: str, **claim: Any
) -> Measure:
    """Return the Measure of one function's median rate over another's.

    Arguments:
        times: of all functions, as `interleaved` returns them; those of the two are kept in the figures.
        work: the work of each call in `unit`.
        claim: target, at_most and why of the Measure.
    """
    times = {key: times[key] for key in (subject, over)}
    seconds = medians(times)
    figures: dict[str, Any] = {f"{key}, {unit}/s": round(work / median, 3) for key, median in seconds.items()}
    return Measure(name, round(seconds[over] / seconds[subject], 4), "×", figures=figures | all_seconds(times), **claim)


def busy() -> str:
    """Return the load and the number of cores at this moment, which may explain a missed target."""
    return f"load {os.getloadavg()[0]:.1f} on {usable_cores()} CPUs"


def machine(**facts: Any) -> dict[str, Any]:
    """Return processor, cores, threads, versions and present load, which every figure depends on."""
    import torch

    process = provenance()
    return {
        "processor": _processor(),
        "cpus": usable_cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": process["versions"],
        "git": process["git"],
        "platform": process["platform"],
        "created": process["created"],
        **facts,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
