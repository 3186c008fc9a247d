"""Two ranks against two processes that know nothing of each other, on the same cores: `python -m pipeline.bench.ranks …`."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.bench.measure import Measure, busy, interleaved

WORLD = 2
TARGET = 0.95


def ranks(network: str, *, batch: int, steps: int, repeat: int) -> Measure:
    """Images a second of two ranks with one thread each over those of two lone processes, after the start.

    batch: images a step and process. The same two processes do both in turns: train as one job with batches of 2 × batch,
    and each for itself with batches of its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    command = [sys.executable, "-m", "pipeline.bench.ranks", network, str(batch), str(steps), str(repeat)]
    processes = []
    try:
        for rank in range(WORLD):
            own = {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        said = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank of the benchmark: {error.strip().splitlines()[-1:]}")
    return compared([json.loads(out.splitlines()[-1]) for out, _ in said], images=batch * steps, network=network)


def compared(seconds: list[dict[str, list[float]]], *, images: int, network: str) -> Measure:
    """The Measure of what each process took for its `images` in every turn, together and alone.

    A job is done when its last rank is; lone processes add up.
    """
    together = [len(seconds) * images / max(turn) for turn in zip(*(s["together"] for s in seconds), strict=True)]
    alone = [sum(images / taken for taken in turn) for turn in zip(*(s["alone"] for s in seconds), strict=True)]
    rates = {"two ranks": together, "two processes": alone}
    figures: dict = {f"{way}, images/s": round(statistics.median(found), 1) for way, found in rates.items()}
    figures |= {f"{way}, all images/s": [round(rate, 1) for rate in found] for way, found in rates.items()}
    value = round(statistics.median(together) / statistics.median(alone), 4)
    why = f"{busy()}: ranks wait for each other at every step, lone processes never"
    return Measure(
        f"two ranks over two processes, {network}, 1 thread each", value, "×", TARGET, figures=figures, why=why
    )


def one(network: str, batch: int, steps: int, repeat: int) -> dict[str, list[float]]:
    """Seconds that this rank took for `steps` steps, with the others and alone."""
    import torch

    from pipeline import distributed
    from pipeline.bench.train import Driven, images, training
    from pipeline.distributed import Ranks, Signals

    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="bench-train.") as place,
        distributed.ranks("cpu") as us,
        Signals() as signals,
    ):
        lone = Ranks(0, 1, us.device)
        drive: dict[str, Driven] = {}
        for way, who in ("together", us), ("alone", lone):
            config = training(network, batch_size=batch * who.world)
            data = images(batch * who.world * steps)
            drive[way] = Driven(config, data, out=Path(place) / way, ranks=who, signals=signals)

        def turn(way: str) -> Callable[[], object]:
            def go() -> object:
                us.barrier()
                return drive[way].steps()

            return go

        return interleaved({way: turn(way) for way in drive}, repeat=repeat)


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], *map(int, sys.argv[2:]))))
