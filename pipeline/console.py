"""The one place that prints while work goes on: to stderr, a bar on a terminal, plain lines elsewhere, rank 0 only."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.text import printable

LINE_EVERY = 3.0  # seconds between two plain progress lines


class Talk:
    """The messages of a command to the person who typed it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet or int(os.environ.get("RANK", 0)) > 0
        self.live = sys.stderr.isatty() and "CI" not in os.environ
        self.console = Console(
            stderr=True, highlight=False, soft_wrap=True, quiet=self.quiet, color_system="auto" if self.live else None
        )

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False)

    def notes(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.say(f"note: {text}")

    def error(self, text: str) -> None:
        rank = os.environ.get("RANK")
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"{f'[rank {rank}] ' if rank else ''}Error: {printable(text)}", markup=False
        )

    @contextmanager
    def progress(self, label: str) -> Iterator["Bar"]:
        """A bar to be moved with `.move(done, total)`."""
        if not self.live or self.quiet:
            yield Bar(self, label, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            yield Bar(self, label, bars)


class Bar:
    """Progress of one piece of work."""

    def __init__(self, talk: Talk, label: str, bars: Progress | None):
        self.talk, self.label, self.bars, self.said_at = talk, label, bars, time.monotonic()
        self.task = bars.add_task(label, total=None, note="") if bars else None
        self.first: tuple[float, float] | None = None  # when it was moved first, and how far

    def move(self, done: float, total: float, note: str = "") -> None:
        now = time.monotonic()
        self.first = self.first or (now, done)
        if self.bars is not None and self.task is not None:
            self.bars.update(self.task, completed=done, total=total, note=note)
        elif now - self.said_at >= LINE_EVERY:
            self.said_at = now
            self.talk.say(f"{self.label}: {done:g}/{total:g} {note}{self._left(now, done, total)}".rstrip())

    def _left(self, now: float, done: float, total: float) -> str:
        """Return `, 1:05 left` by the rate so far, or nothing where there is none yet."""
        began, start = self.first or (now, done)
        return f", {clock((total - done) * (now - began) / (done - start))} left" if start < done < total else ""


def describe_dataset(facts: dict[str, Any]) -> str:
    """Sizes, counts per class, imbalance, fingerprint and notes of a data set's summary, for a person."""
    counts = facts["counts"]
    counts_text = (
        " ".join(map(str, counts))
        if len(counts) <= 20
        else f"{' '.join(map(str, counts[:8]))} … {' '.join(map(str, counts[-4:]))}"
    )
    sizes = ", ".join(f"{facts[s]:,} {s}" for s in ("train", "val", "test") if s in facts)
    lines = [f"data: {facts['name']}, {facts['classes']} classes, {sizes}; imbalance {facts['imbalance_factor']:g}"]
    lines += [
        f"images per class: {counts_text}",
        f"fingerprint: {facts['fingerprint'][:16]} ({facts['fingerprint_covers']})",
    ]
    return "\n".join(lines + [f"note: {note}" for note in facts["notes"]])


def percent(value: float | None) -> str:
    """`41.3%`, or a dash where there is nothing to measure."""
    return "–" if value is None else f"{value:.1f}%"


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
