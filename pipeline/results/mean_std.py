"""Mean and standard deviation over repetitions: computed here, printed here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MEASURES = ("all", "many", "medium", "few", "ece")


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation of n repetitions; std None where n is 1, mean None where nothing was measured."""

    mean: float | None
    std: float | None = None
    n: int = 1

    def text(self, digits: int = 1) -> str:
        """Return `41.2 ± 0.3`, `41.2` without a deviation, or a dash."""
        return " ± ".join(number_texts(self, digits))

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "std": self.std}


def number_texts(value: MeanStd, digits: int = 1) -> list[str]:
    """Return the texts of mean and standard deviation, those that exist; a dash where there is no mean."""
    if value.mean is None:
        return ["–"]
    numbers = [value.mean] if value.std is None else [value.mean, value.std]
    return [minus(f"{number:.{digits}f}") for number in numbers]


def minus(text: str) -> str:
    """Write negative numbers with the sign of typography."""
    return text.replace("-", "−")


def signed(value: float) -> str:
    """Return `+1.2`, `−0.3` or `0.0`: a difference in points."""
    return minus(f"{value:+.1f}") if round(value, 1) else "0.0"


def difference(value: Mapping[str, float | None] | None) -> str:
    """Return `+0.4 [−0.1, 0.9]`, without an interval where there is none, or a dash for an empty group."""
    if value is None:
        return "–"
    point, low, high = (round(value[key] or 0.0, 1) or 0.0 for key in ("difference", "low", "high"))  # no −0.0
    return minus(f"{point:+.1f}" + ("" if value["low"] is None else f" [{low:.1f}, {high:.1f}]"))


def mean_std(values: Iterable[float | None]) -> MeanStd:
    """Return mean and sample standard deviation (n − 1) of the values that exist."""
    numbers = [value for value in values if value is not None]
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return MeanStd(float(np.mean(numbers)) if numbers else None, std, len(numbers))


def measured(row: Mapping[str, Any], measure: str) -> MeanStd:
    """Return a measure of a row that carries its standard deviation as NAME_std."""
    return MeanStd(row.get(measure), row.get(f"{measure}_std"), row.get("n", 1))


def over_rows(rows: Sequence[Mapping[str, Any]], measure: str) -> MeanStd:
    """Return mean ± std of a measure over rows; of a single row its own standard deviation."""
    return measured(rows[0], measure) if len(rows) == 1 else mean_std(row[measure] for row in rows)


def means_and_stds(rows: Sequence[Mapping[str, Any]], measures: Sequence[str] = MEASURES) -> dict[str, float | None]:
    """Return JSON keys NAME and NAME_std of every measure over rows; None where there is no value."""
    columns = {measure: mean_std(row[measure] for row in rows) for measure in measures}
    return {key: value for m, c in columns.items() for key, value in ((m, c.mean), (f"{m}_std", c.std))}
