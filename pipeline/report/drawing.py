"""A figure of a report: its picture, caption and numbers; and the styles of its lines."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.axes import BLACK, BLUE, GREEN, ORANGE, RED
from pipeline.report.study import Row, Study
from pipeline.results.files import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AFTER: Row = {"color": BLUE, "linestyle": "-", "marker": "o"}
BEFORE: Row = {"color": BLACK, "linestyle": ":"}
ALONE: Row = {"color": RED, "linestyle": "--"}
ZERO: Row = {"color": GREEN, "linestyle": "-."}
TARGET: Row = {"color": ORANGE, "linestyle": (0, (4, 1.5, 1, 1.5, 1, 1.5))}


@dataclass(frozen=True, eq=False)
class Drawing:
    """One figure of a report.

    Arguments:
        name: of its files.
        title: the heading on the page.
        caption: sentences on what it shows.
        figure: matplotlib's, written as PNG.
        table: the numbers behind it, written as CSV.
        chart: the same as a plotly figure (`pipeline.report.chart`), shown where there is JavaScript.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"
    table: list[Row]
    chart: Row | None = None

    @property
    def csv(self) -> str:
        """The table as text, a column for every key that any row has."""
        return csv_text(self.table)


def class_table(study: Study) -> list[Row]:
    """A row a class, largest first."""
    names, counts = study.first.store.class_names, study.counts
    ranked = enumerate(study.by_size.tolist(), 1)
    return [{"rank": r, "class": c, "name": names[c], "images": int(counts[c])} for r, c in ranked]


def rounded(value: float | None) -> float | None:
    """Four digits for a table; None for nan."""
    return None if value is None or np.isnan(value) else round(float(value), 4)
