"""The event files that TensorBoard reads, made from metrics.jsonl alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TAGS = {
    "loss": "loss",
    "lr": "learning rate",
    **{
        f"{split}_{mean}": f"{split}/{mean}"
        for split in ("train", "val")
        for mean in ("accuracy", "many", "medium", "few")
    },
    "images_per_s": "speed/images per second",
    "seconds": "speed/seconds an epoch",
    "peak_memory_mb": "memory/peak MiB",
}


def summary_writer() -> type["SummaryWriter"]:
    """Return the class that writes event files.

    Raises: ConfigError: the package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "backbone.tensorboard=true: the package tensorboard is missing; pip install 'iwb-pipeline[tensorboard]'"
        ) from error
    return SummaryWriter


class EventFiles:
    """The event files of a folder: a scalar for each measure of each epoch."""

    def __init__(self, folder: Path, epochs: Iterable[dict[str, Any]]):
        """Replace the files that are there by the given epochs: a training that goes on shows none twice and misses none.

        Raises as `summary_writer` does.
        """
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self._writer = summary_writer()(str(folder))
        for line in epochs:
            self._write(line)
        self._writer.flush()

    def add(self, line: dict[str, Any]) -> None:
        """Add one line of metrics.jsonl; it is on the disk when this returns."""
        self._write(line)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, line: dict[str, Any]) -> None:
        for key, tag in TAGS.items():
            if line.get(key) is not None:
                self._writer.add_scalar(tag, line[key], global_step=line["epoch"], walltime=line.get("time"))
