"""Two ranks over two independent processes on the same cores: `python -m pipeline.bench.ranks …` is one of them."""

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


def ranks_over_processes(network: str, *, batch: int, steps: int, repeat: int) -> Measure:
    """Return the rate of two ranks with one thread each over that of two lone processes, after the start.

    The same two processes do both in turns: train as one job with batches of 2 × batch, and each alone with its batch.

    Arguments:
        batch: images per step and process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    command = [sys.executable, "-m", "pipeline.bench.ranks", network, str(batch), str(steps), str(repeat)]
    processes = []
    try:
        for rank in range(WORLD):
            environment = {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank of the benchmark: {error.strip().splitlines()[-1:]}")
    return compare_rates(
        [json.loads(out.splitlines()[-1]) for out, _ in outputs], images=batch * steps, network=network
    )


def compare_rates(seconds: list[dict[str, list[float]]], *, images: int, network: str) -> Measure:
    """Return the Measure of the seconds each process took for its `images` in every turn, together and alone.

    A job is done when its last rank is; the rates of lone processes add up.
    """
    together = [len(seconds) * images / max(turn) for turn in zip(*(s["together"] for s in seconds), strict=True)]
    alone = [sum(images / s for s in turn) for turn in zip(*(s["alone"] for s in seconds), strict=True)]
    rates = {"two ranks": together, "two processes": alone}
    figures: dict = {f"{name}, images/s": round(statistics.median(rate), 1) for name, rate in rates.items()}
    figures |= {f"{name}, all images/s": [round(r, 1) for r in rate] for name, rate in rates.items()}
    value = round(statistics.median(together) / statistics.median(alone), 4)
    why = f"{busy()}: ranks wait for each other at every step, lone processes never"
    return Measure(
        f"two ranks over two processes, {network}, 1 thread each", value, "×", TARGET, figures=figures, why=why
    )


def one_rank(network: str, batch: int, steps: int, repeat: int) -> dict[str, list[float]]:
    """Return the seconds of this rank for `steps` steps, together with the other rank and alone."""
    import torch

    from pipeline import distributed
    from pipeline.bench.training_loops import TrainerLoop, images, training
    from pipeline.distributed import Ranks, Signals

    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="bench-train.") as place,
        distributed.ranks("cpu") as job,
        Signals() as signals,
    ):
        loops: dict[str, TrainerLoop] = {}
        for name, ranks in ("together", job), ("alone", Ranks(0, 1, job.device)):
            config = training(network, batch_size=batch * ranks.world)
            data = images(batch * ranks.world * steps)
            loops[name] = TrainerLoop(config, data, out=Path(place) / name, ranks=ranks, signals=signals)

        def turn(name: str) -> Callable[[], object]:
            def run() -> object:
                job.barrier()
                return loops[name].steps()

            return run

        return interleaved({name: turn(name) for name in loops}, repeat=repeat)


if __name__ == "__main__":
    print(json.dumps(one_rank(sys.argv[1], *map(int, sys.argv[2:]))))
