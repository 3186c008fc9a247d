"""Image files by the hundred thousand: names in one buffer, sizes asked of the disk once."""

import contextlib
import os
import stat
import time
from array import array
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.images import read_image

AT_ONCE = 512  # files whose sizes one thread asks for at a time, after as many that show how fast answers come
SLOW = 100e-6  # seconds for one answer from which threads ask: network file systems; local ones take 1 to 5 µs
THREADS = 32  # questions to a slow file system at a time


class FileNames:
    """A list of names that grows, held as their UTF-8 bytes and where each ends."""

    def __init__(self, names: Iterable[str] = ()):
        self._text, self._stops = bytearray(), array("q")
        for name in names:
            self.append(name)

    def __len__(self) -> int:
        return len(self._stops)

    def append(self, name: str) -> None:
        self._text += os.fsencode(name)
        self._stops.append(len(self._text))

    def below(self, root: Path) -> "Files":
        """The named files below a folder."""
        stops = np.array(self._stops, dtype=np.int64)
        return Files(root, bytes(self._text), np.concatenate([[0], stops[:-1]]).astype(np.int64), stops)


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below `root`, in order: the name of file i is text[starts[i]:stops[i]]."""

    root: Path
    text: bytes
    starts: np.ndarray
    stops: np.ndarray
    known_sizes: np.ndarray | None = None

    reader = staticmethod(read_image)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> str:
        """Where file i lies; what `reader` takes."""
        return str(self.root / self.relative(i))

    def relative(self, i: int) -> str:
        """The name of file i as the source has it."""
        return os.fsdecode(self.text[self.starts[i] : self.stops[i]])

    def name_of(self, i: int) -> str:
        """Return the name of file i for people."""
        return self[i]

    def take(self, rows: np.ndarray) -> "Files":
        """The files at the given positions, in that order; all selections share the text."""
        sizes = None if self.known_sizes is None else self.known_sizes[rows]
        return replace(self, starts=self.starts[rows], stops=self.stops[rows], known_sizes=sizes)

    def sized(self) -> "Files":
        """The same, its sizes known from now on, in whatever is taken from it too."""
        return replace(self, known_sizes=self.sizes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n,) int64 bytes, −1 where there is no such file: one question to the disk each, and no second."""
        return self._ask() if self.known_sizes is None else self.known_sizes

    @property
    def missing(self) -> np.ndarray:
        """Positions of names that lead to no file."""
        return np.flatnonzero(self.sizes < 0)

    def feed(self, sha: Any, without: Collection[int], limit: int) -> str:
        """Adds names, sizes and, where they are at most `limit` bytes in all, contents to a hash; says which.

        without: positions whose files may hold anything: they count, as do files that cannot be opened, as empty.
        """
        sizes = np.maximum(self.sizes, 0)
        sizes[list(without)] = 0
        if contents := int(sizes.sum()) <= limit:
            every = range(len(self))
            for name, path, size in zip(self._names(every), self._paths(every), sizes.tolist(), strict=True):
                sha.update(b"%b\0%d\0" % (name, size))
                if size:
                    with contextlib.suppress(OSError), open(path, "rb") as file:
                        sha.update(file.read())  # who reads the image says what is wrong
        else:
            for rows in _pieces(len(self)):
                facts = zip(self._names(rows), sizes[rows.start : rows.stop].tolist(), strict=True)
                sha.update(b"".join(b"%b\0%d\0" % fact for fact in facts))
        return "file contents" if contents else "file names and sizes"

    def _names(self, rows: range) -> Iterator[bytes]:
        starts, stops = (ends[rows.start : rows.stop].tolist() for ends in (self.starts, self.stops))
        return (self.text[a:b] for a, b in zip(starts, stops, strict=True))

    def _paths(self, rows: range) -> Iterator[bytes]:
        root = os.path.join(os.fsencode(self.root), b"")
        return (name if name.startswith(b"/") else root + name for name in self._names(rows))

    def _ask(self) -> np.ndarray:
        first, *rest = [*_pieces(len(self))] or [range(0)]
        started = time.perf_counter()
        sizes = [self._sizes(first)]
        if time.perf_counter() - started < SLOW * max(len(first), 1):
            sizes += map(self._sizes, rest)
        else:
            with ThreadPoolExecutor(THREADS, "stat") as pool:
                sizes += pool.map(self._sizes, rest)
        return np.fromiter(chain.from_iterable(sizes), np.int64, len(self))

    def _sizes(self, rows: range) -> list[int]:
        return [_size(path) for path in self._paths(rows)]


def _pieces(count: int) -> Iterator[range]:
    return (range(a, min(a + AT_ONCE, count)) for a in range(0, count, AT_ONCE))


def _size(path: bytes) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
