"""Several trainings of stage 1 at once on one device, each a `pipeline train-backbone` of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cache import write_durably
from pipeline.backbone.training_dir import TrainingFolder
from pipeline.config import Config
from pipeline.console import LINE_EVERY, Talk
from pipeline.distributed import Signals
from pipeline.errors import PipelineError, Terminated
from pipeline.run_prepare import with_seed

REPORT_EVERY = 20 * LINE_EVERY  # seconds


def train_side_by_side(
    config: Config, seeds: Sequence[int], *, place: Path, at_once: int, device: str, talk: Talk
) -> list[int]:
    """Train the backbones of all seeds that are not finished, `at_once` of them at a time; return their seeds.

    Each writes its output to place/seed-N/train.log. With fewer than two to train nothing is done: the caller trains it.

    Raises:
        PipelineError: a training fails.
        Terminated: SIGTERM or Ctrl-C; checkpoints are saved.
    """
    left = [s for s in seeds if epoch_of(place / f"seed-{s}") < config.backbone.epochs]
    if len(left) < 2:
        return []
    talk.say(
        f"training seeds {', '.join(map(str, left))}, {min(at_once, len(left))} at once; logs: {place}/seed-*/train.log"
    )
    waiting, running, reported = list(left), dict[int, subprocess.Popen](), time.monotonic()
    with Signals() as signals, _ended(running):
        while waiting or running:
            while waiting and len(running) < at_once and not signals.received:
                seed = waiting.pop(0)
                running[seed] = _start(with_seed(config, seed), place / f"seed-{seed}", device)
            time.sleep(0.2)
            if signals.received:
                stop = Terminated(f"stopped; checkpoints are in {place}: the same command goes on")
                stop.exit_code = signals.exit_code
                raise stop
            for seed in [s for s, process in running.items() if process.poll() is not None]:
                if code := running.pop(seed).returncode:
                    log = place / f"seed-{seed}" / "train.log"
                    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                    raise PipelineError(
                        f"{log}: training ended with code {code}: {' '.join(last) or 'nothing was said'}"
                    )
            if time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                epochs = ", ".join(f"seed {s} epoch {epoch_of(place / f'seed-{s}')}" for s in running)
                talk.say(f"of {config.backbone.epochs} epochs: {epochs}")
    return left


def epoch_of(place: Path) -> int:
    """Return the epochs that the backbone under a folder has been trained for."""
    folder = TrainingFolder(place / "backbone", {})
    line = folder.last_line if folder.last.is_file() else None
    return int(line["epoch"]) if line else 0


@contextmanager
def _ended(running: dict[int, subprocess.Popen]) -> Iterator[None]:
    """End the trainings when the with block ends, however that happens; each saves its checkpoint."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(config: Config, place: Path, device: str) -> subprocess.Popen:
    place.mkdir(parents=True, exist_ok=True)
    tree = config.model_dump(mode="json")
    for key, value in tree["data"].items():  # a path in a file is relative to that file
        if isinstance(getattr(config.data, key), Path):
            tree["data"][key] = str(Path(value).absolute())
    write_durably(place / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    words = ["train-backbone", str(place / "config.yaml"), "--out", str(place / "backbone"), "--device", device]
    with open(place / "train.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
