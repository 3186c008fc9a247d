"""What a training tells while it runs, and what it returns."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VAL_GROUPS = {"all": "val_accuracy", "many": "val_many", "medium": "val_medium", "few": "val_few"}


@dataclass(frozen=True)
class Begin:
    """Said once: what is trained, on what, and where it starts."""

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
    """One finished epoch; loss and train_accuracy over its augmented batches, accuracies in %, balanced over classes.

    images_per_s, seconds: of the steps that this process did, validation and saving excepted. left_out: training images,
    as often as drawn, that could not be read. val_standard_error: of val_accuracy, from the validation images being few.
    time: when the epoch ended, in seconds since 1970.
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
class TrainResult:
    """A finished stage 1."""

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
        val = ", ".join(f"{g} {line[k]:.1f}%" for g, k in VAL_GROUPS.items() if line.get(k) is not None)
        return (
            f"{self.checkpoint}: {self.network['network']} ({self.network['parameters']:,} parameters), {self.epochs} epochs\n"
            f"balanced validation accuracy of the last epoch: {val or 'no validation split'}\n"
            + (
                f"{line['left_out']} training image(s) could not be read and were left out\n"
                if line.get("left_out")
                else ""
            )
            + f"next: pipeline dump-features --checkpoint {self.checkpoint}"
        )


Event = Begin | Step | Epoch
