"""A figure of a report: its chart, picture, caption and numbers; and the styles of its lines."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cache import write_durably
from pipeline.report.chart import BLACK, BLUE, GREEN, ORANGE, RED
from pipeline.report.picture import picture, png
from pipeline.report.study import Row, Study
from pipeline.results.files import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AFTER: Row = {"color": BLUE, "symbol": "circle"}
BEFORE: Row = {"color": BLACK, "dash": "dot"}
ALONE: Row = {"color": RED, "dash": "dash"}
TARGET: Row = {"color": ORANGE, "dash": "longdashdot"}
BY_GROUP: dict[str, Row] = {
    "all": {"color": BLACK, "symbol": "circle"},
    "many": {"color": ORANGE, "dash": "dash", "symbol": "square"},
    "medium": {"color": GREEN, "dash": "dashdot", "symbol": "diamond"},
    "few": {"color": RED, "dash": "dot", "symbol": "triangle-down"},
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """One figure of a report.

    Arguments:
        name: of its files.
        title: the heading on the page.
        caption: sentences on what it shows.
        table: the numbers behind it, written as CSV.
        chart: a plotly figure (`pipeline.report.chart`), shown where there is JavaScript.
        headline: the result in a line, above the picture.
        height: of the picture, in inches.
        still: the chart that the picture shows, where the page's one moves.
    """

    name: str
    title: str
    caption: str
    table: list[Row]
    chart: Row
    headline: str = ""
    height: float = 4.6
    still: Row | None = None

    @cached_property
    def figure(self) -> "Figure":
        """The picture, matplotlib's."""
        return picture(self.still or self.chart, headline=self.headline, height=self.height)

    @property
    def csv(self) -> str:
        """The table as text, a column for every key that any row has."""
        return csv_text(self.table)

    def write(self, folder: Path) -> tuple[bytes, Path]:
        """Write folder/NAME.png and the numbers beside it as .csv; return the picture and its path."""
        image = png(self.figure)
        path = write_durably(folder / f"{self.name}.png", image)
        write_durably(path.with_suffix(".csv"), self.csv)
        return image, path


def class_table(study: Study) -> list[Row]:
    """A row a class, largest first."""
    names, counts = study.first.store.class_names, study.counts
    ranked = enumerate(study.by_size.tolist(), 1)
    return [{"rank": r, "class": c, "name": names[c], "images": int(counts[c])} for r, c in ranked]
