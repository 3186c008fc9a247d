"""The result of `rebalance`, and its CSV files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.metrics import Scores
from pipeline.results.files import csv_text
from pipeline.results.head_id import HeadId
from pipeline.results.mean_std import means_and_stds
from pipeline.results.recommendation import recommendation
from pipeline.text import Shown

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Row:
    """One head on one split; accuracies and ECE in %, None for an empty group.

    Arguments:
        loss, lam: None where the method has none.
        seed: of the batch order; None for a head without one.
        split: val, kfold or test.
    """

    method: str
    loss: str | None
    lam: float | None
    seed: int | None
    split: str
    all: float | None
    many: float | None
    medium: float | None
    few: float | None
    ece: float | None


@dataclass(frozen=True)
class RebalanceResult(Shown):
    """The table of stage 2 with what it was made from.

    Arguments:
        baseline, selected: measured on the test split (mean over seeds, NAME_std beside it), after the choice was written.
        candidates: the settings chosen among.
        within_one_se: those whose validation score lies within one standard error of the selected one.
        differences: the selected row less others on the same test samples, with intervals (differences.py).
        timing: seconds of loading and fitting, and the number of heads.
        chosen: where methods were tuned, the setting that stands for each.
        trials: all settings that were tried, never on test.
        selection: the data of the choice: split, samples, median_per_class, classes_without, standard_error,
            settings_tried; classes_on_folds have no validation image and are scored on training images by heads fitted
            without these.
    """

    store: str
    digest: str
    fingerprint: dict[str, Any]
    network: dict[str, Any]
    settings: dict[str, Any]
    baseline: dict[str, float | None]
    selected: dict[str, Any]
    candidates: tuple[dict[str, Any], ...]
    within_one_se: tuple[dict[str, Any], ...]
    differences: dict[str, Any]
    results: tuple[Row, ...]
    timing: dict[str, float]
    notes: tuple[str, ...]
    out: str
    chosen: tuple[dict[str, Any], ...] = ()
    trials: tuple[dict[str, Any], ...] = ()
    selection: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The document of `rebalance --json`."""
        document = asdict(self)
        return document | {"recommendation": recommendation(document)}

    def __rich__(self) -> "Group":
        from pipeline.results.tables import results_tables

        return results_tables(self.to_dict())


def over_seeds(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the mean of every measure over rows, and NAME_std."""
    return means_and_stds([asdict(row) for row in rows])


def rows_csv(rows: Sequence[Row]) -> str:
    """results.csv: one line a row, an empty field for None."""
    return csv_text([asdict(row) for row in rows])


def per_class_csv(scored: Sequence[tuple[HeadId, int | None, str, Scores]], class_names: Sequence[str]) -> str:
    """per_class.csv: one line for each setting, seed, split and class; `images` are training images."""
    return csv_text(
        [
            setting.to_dict()
            | {"seed": seed, "split": split, "class": c, "name": class_names[c], "images": int(scores.counts[c])}
            | {"correct": int(scores.correct[c]), "total": int(scores.total[c])}
            for setting, seed, split, scores in scored
            for c in range(len(scores.counts))
        ]
    )


def trials_csv(trials: Sequence[dict[str, Any]]) -> str:
    """trials.csv: one line for each setting that was tried, its parameters as JSON."""
    return csv_text([trial | {"parameters": json.dumps(trial["parameters"])} for trial in trials])
