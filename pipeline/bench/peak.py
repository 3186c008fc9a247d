"""Peak memory of dumping, verifying and streaming, each in a process of its own: `python -m pipeline.bench.peak WHAT …`."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cache import open_cache, verify
from pipeline.bench.measure import Measure

WIDTH, BATCH = 2048, 512
ROWS = 16_384  # four chunks: from there on one is encoded while others wait and are written
MIB = 1 << 20
SAME = 32.0  # MiB by which two peaks may differ and be the same: two chunks
BESIDE = 16.0  # MiB that a stream may take beside its budget: threads, the allocator, what a first call imports


def memory(place: Path, store: Path, *, say: Callable[[str], object]) -> Iterator[Measure]:
    """Peaks of dumping and verifying ROWS and four times as many, and of a stream within a quarter of a store.

    store: a sealed store, which is streamed.
    """
    for what in "dump", "verify":
        say(f"memory: {what} {ROWS:,} and {4 * ROWS:,} rows")
        peaks = {n: _run(what, str(place / f"peak-{n}.zarr"), str(n)) for n in (ROWS, 4 * ROWS)}
        grown = (peaks[4 * ROWS]["peak"] - peaks[ROWS]["peak"]) / MIB
        figures = {f"{n} rows, peak MiB": round(peak["peak"] / MIB, 1) for n, peak in peaks.items()}
        figures["features more, MiB"] = round(3 * ROWS * WIDTH * 2 / MIB, 1)
        why = "something grows with the number of rows"
        name = f"{what}: peak of 4 × {ROWS:,} over that of {ROWS:,} rows"
        yield Measure(name, round(grown, 1), "MiB", SAME, at_most=True, figures=figures, why=why)
    cache = open_cache(store)
    budget = cache.rows("train") * cache.width * (2 if cache.dtype == "float16" else 4) // 4
    say(f"memory: stream {store.name} within {budget / MIB:.0f} MiB")
    peak = _run("stream", str(store), str(budget))
    beside = (peak["peak"] - peak["before"] - budget) / MIB
    figures = {"budget MiB": round(budget / MIB, 1), "grown MiB": round((peak["peak"] - peak["before"]) / MIB, 1)}
    figures |= {"rows/s": round(peak["rows"] / peak["seconds"])}
    name = f"stream of 4 × its budget: peak beyond {budget / MIB:.0f} MiB"
    yield Measure(name, round(beside, 1), "MiB", BESIDE, at_most=True, figures=figures, why="its buffers are larger")


def _run(what: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "pipeline.bench.peak", what, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def dump(out: str, rows: str) -> dict[str, float]:
    """Dumps that many rows of 2048 features; the images are one file, so that only what the dump keeps can grow."""
    import torch
    from torch import Tensor, nn

    from pipeline.bench.dump import CLASSES, backbone, files
    from pipeline.dump import dump_features

    class Patches(nn.Module):
        """One linear layer over all pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fc = nn.Linear(3 * 8 * 8, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward_features(self, images: Tensor) -> Tensor:
            return self.layer(images.flatten(1)).relu()

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return x if pre_logits else self.fc(x)

        def get_classifier(self) -> nn.Linear:
            return self.fc

    torch.manual_seed(0)
    place = Path(out + ".images")
    place.mkdir()
    config = files(place, rows=int(rows), size=8, stored=8, views=1, workers=0)
    dump_features(backbone(Patches(), 8), config, out=Path(out), device="cpu")
    return {}


def check(out: str, rows: str) -> dict[str, float]:
    if verify(out) or open_cache(out).rows("train") != int(rows):
        raise RuntimeError("the store is not what was written")
    return {}


def stream(store: str, budget: str) -> dict[str, float]:
    """Streams one epoch; rows and seconds of it, and the memory in use before."""
    import time

    cache = open_cache(store)
    cache.labels("train")
    before, rows, started = resident("VmRSS"), 0, time.perf_counter()
    seen = np.zeros(cache.rows("train"), bool)
    for block, _ in cache.stream("train", seed=0, epoch=0, memory_bytes=int(budget), multiple_of=BATCH):
        seen[block] = True
        rows += len(block)
    if rows != len(seen) or not seen.all():
        raise RuntimeError("the stream did not give every row once")
    return {"before": before, "rows": rows, "seconds": time.perf_counter() - started}


def resident(field: str) -> int:
    """Bytes of memory this process has (VmRSS), or had at most (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


if __name__ == "__main__":
    found = {"dump": dump, "verify": check, "stream": stream}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"peak": resident("VmHWM"), **found}))
