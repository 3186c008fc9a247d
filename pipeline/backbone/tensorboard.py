"""A training as TensorBoard shows it: event files that follow from metrics.jsonl alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

TAGS = {
    "loss": "loss",
    "lr": "learning rate",
    **{f"{split}_{of}": f"{split}/{of}" for split in ("train", "val") for of in ("accuracy", "many", "medium", "few")},
    "images_per_s": "speed/images per second",
    "seconds": "speed/seconds an epoch",
    "peak_memory_mb": "memory/peak MiB",
}


class EventFiles:
    """The event files of a folder: a scalar for each measure of each epoch."""

    def __init__(self, folder: Path, epochs: Iterable[dict[str, Any]]):
        """Replaces what is there by the epochs that are kept: a training that goes on shows none twice and misses none.

        Raises ConfigError where the package tensorboard is missing.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "backbone.tensorboard=true: the package tensorboard is missing; pip install 'iwb-pipeline[tensorboard]'"
            ) from error
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self._writer = SummaryWriter(str(folder))
        for line in epochs:
            self._write(line)
        self._writer.flush()

    def add(self, line: dict[str, Any]) -> None:
        """One epoch more, as metrics.jsonl has it; on the disk when this returns."""
        self._write(line)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, line: dict[str, Any]) -> None:
        for key, tag in TAGS.items():
            if line.get(key) is not None:
                self._writer.add_scalar(tag, line[key], global_step=line["epoch"], walltime=line.get("time"))
