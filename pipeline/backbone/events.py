"""The events of a running training, and its result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.text import Shown

GROUPS = ("many", "medium", "few")


def accuracies(line: dict[str, Any], split: str) -> str | None:
    """Return `41.3% (many 70.1, medium 40.2, few 12.9)` of an epoch's train or val split; None where not measured."""
    if line.get(f"{split}_accuracy") is None:
        return None
    groups = ", ".join(f"{g} {line[f'{split}_{g}']:.1f}" for g in GROUPS if line.get(f"{split}_{g}") is not None)
    return f"{line[f'{split}_accuracy']:.1f}%" + (f" ({groups})" if groups else "")


def short_accuracies(line: dict[str, Any], split: str) -> str | None:
    """Return `41.3% (70.1/40.2/12.9)` of an epoch's train or val split, a dash for an empty group; None where not measured."""
    if line.get(f"{split}_accuracy") is None:
        return None
    groups = (line.get(f"{split}_{g}") for g in GROUPS)
    return f"{line[f'{split}_accuracy']:.1f}% ({'/'.join('–' if v is None else f'{v:.1f}' for v in groups)})"


def pace(line: dict[str, Any]) -> str:
    """Return `1,234 img/s, 512 MiB` of an epoch: speed and peak memory, as far as known."""
    speed = f"{line['images_per_s']:,.0f} img/s, " if line.get("images_per_s") else ""
    return f"{speed}{line['peak_memory_mb']:,.0f} MiB" if line.get("peak_memory_mb") else speed.removesuffix(", ")


def group_fields(split: str, means: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the fields of an `Epoch` for the means over all classes and over each group; None where there is none."""
    names = {"accuracy": "all"} | {group: group for group in GROUPS}
    return {f"{split}_{field}": means.get(mean) for field, mean in names.items()}


@dataclass(frozen=True)
class Begin:
    """The first event: network, data, device, and the epoch at which training starts."""

    network: dict[str, Any]
    dataset: dict[str, Any]
    device: str
    precision: str
    ranks: int
    first_epoch: int
    epochs: int
    steps: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One optimiser step of rank 0."""

    epoch: int
    step: int
    steps: int


@dataclass(frozen=True)
class Epoch:
    """One finished epoch; accuracies are means over classes, in %.

    Arguments:
        loss, train_accuracy: over the augmented batches of the epoch.
        images_per_s, seconds: of the steps that this process did, without validation and saving.
        left_out: training images, as often as drawn, that could not be read.
        val_standard_error: of val_accuracy, from the number of validation images.
        time: of its end, in seconds since 1970.
    """

    epoch: int
    epochs: int
    lr: float
    loss: float
    train_accuracy: float | None
    train_many: float | None
    train_medium: float | None
    train_few: float | None
    val_accuracy: float | None
    val_many: float | None
    val_medium: float | None
    val_few: float | None
    images_per_s: float
    seconds: float
    peak_memory_mb: float
    left_out: int
    val_standard_error: float | None
    time: float


@dataclass(frozen=True)
class TrainResult(Shown):
    """A finished stage 1.

    Arguments:
        checkpoint: last.pt.
        trained_epochs: of `epochs` in all, those that this call trained.
        last: the line of metrics.jsonl of the last epoch.
        best_val_accuracy: mean over classes, in %; None without a validation split.
        seconds: of this call.
    """

    checkpoint: Path
    epochs: int
    trained_epochs: int
    network: dict[str, Any]
    dataset: dict[str, Any]
    last: dict[str, Any] | None
    best_val_accuracy: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"checkpoint": str(self.checkpoint)}

    def __str__(self) -> str:
        line = self.last or {}
        best = "" if self.best_val_accuracy is None else f"; best {self.best_val_accuracy:.1f}%"
        val = accuracies(line, "val")
        return (
            f"{self.checkpoint}: {self.network['network']} ({self.network['parameters']:,} parameters), {self.epochs} epochs\n"
            f"last epoch: loss {line.get('loss', float('nan')):.4f}; {pace(line)}\n"
            f"  training    {accuracies(line, 'train') or 'not measured'}\n"
            f"  validation  {val + best if val else 'no validation split'}\n"
            + (
                f"{line['left_out']} training image(s) could not be read and were left out\n"
                if line.get("left_out")
                else ""
            )
            + f"next: pipeline dump-features --checkpoint {self.checkpoint}"
        )


Event = Begin | Step | Epoch
