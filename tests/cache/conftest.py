"""A small store with every awkward size: several chunks a view, a last one partly filled, an empty split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache import StoreSplit, Writer, create_store


@dataclass
class Small:
    """What goes into a store: `create` it, `fill` it, or have it `sealed`."""

    path: Path
    dtype: str = "float16"

    def features(self, split: str, view: int) -> np.ndarray:
        rows = {"train": 23, "val": 7, "test": 0}[split]
        return np.random.default_rng([view, rows]).normal(size=(rows, 5)).astype(np.float32)

    @property
    def labels(self) -> np.ndarray:
        return np.arange(23) % 3

    def create(self, **other) -> Writer:
        given = {
            "splits": {
                "train": StoreSplit(3, self.labels, np.arange(100, 123)),
                "val": StoreSplit(1, np.zeros(7, int), np.arange(7)),
                "test": StoreSplit(1, [], []),
            },
            "width": 5,
            "dtype": self.dtype,
            "weight": np.arange(15.0).reshape(3, 5),
            "bias": np.ones(3),
            "class_names": ["ant", "bee", "çat"],
            "counts": np.bincount(self.labels),
            "fingerprint": {"dataset": "abc", "seed": 0, "views": 3},
            "provenance": {"argv": ["pipeline"], "nested": {"x": [1, 2.5, None]}},
            "rows_per_chunk": 4,
        }
        return create_store(self.path, **{**given, **other})

    def fill(self, writer: Writer, chunks=None) -> None:
        for chunk in writer.missing() if chunks is None else chunks:
            writer.write(chunk, self.features(chunk.split, chunk.view)[chunk.start : chunk.stop])

    def sealed(self) -> Path:
        with self.create() as writer:
            self.fill(writer)
            writer.seal()
        return self.path

    def files(self) -> dict[str, bytes]:
        """Name → bytes of every file of the store."""
        return {str(p.relative_to(self.path)): p.read_bytes() for p in self.path.rglob("*") if p.is_file()}


@pytest.fixture
def small(tmp_path) -> Small:
    return Small(tmp_path / "f.zarr")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Most tests need no fsync, which takes most of their time; the durability test asks for it."""
    monkeypatch.setattr("os.fsync", lambda _: None)
