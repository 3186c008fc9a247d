"""Peak memory of dumping, verifying and streaming, each in a process of its own: `python -m tests.peak_memory JOB …`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from cache import open_cache, verify

WIDTH, BATCH = 2048, 512
ROWS = 16_384  # four chunks: from there on one is encoded while others wait and are written
MIB = 1 << 20


def measured(job: str, *arguments: str) -> dict[str, float]:
    """Return the peak in bytes of a job in a process of its own, with the other figures of it."""
    command = [sys.executable, "-m", "tests.peak_memory", job, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def dump(out: str, rows: str) -> dict[str, float]:
    """Dump that many rows of 2048 features; the images are one file, so that only what the dump keeps can grow."""
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

        def forward(self, images: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(images))

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
    """Stream one epoch; return its rows and seconds, and the memory in use before."""
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
    """Return the bytes of memory of this process: now (VmRSS) or at most (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


if __name__ == "__main__":
    found = {"dump": dump, "verify": check, "stream": stream}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"peak": resident("VmHWM"), **found}))
