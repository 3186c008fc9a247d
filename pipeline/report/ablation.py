"""An ablation as a person reads it: the table of its variants, and their accuracy against λ; in a terminal and a page."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pipeline.report.chart import rounded
from pipeline.report.curves import accuracy_curves
from pipeline.report.drawing import Drawing
from pipeline.report.study import SPLITS
from pipeline.results.documents import read_ablation
from pipeline.results.head_id import HeadId
from pipeline.results.mean_std import mean_std
from pipeline.results.tables import ablation_tables

Row = Mapping[str, Any]


def write_accuracy_figure(document: Mapping[str, Any], out: Path) -> None:
    """Write accuracy-lambda.png and the numbers of it as .csv where a variant has several λ; otherwise nothing."""
    drawing = accuracy_figure(document)
    if drawing:
        drawing.write(out)


def accuracy_figure(document: Mapping[str, Any]) -> Drawing | None:
    """Test accuracy by group over λ, a line a variant; None where none has several λ.

    A variant without λ is a level line, one of a single λ is left out.
    """
    points = {row["name"]: _points(document, row) for row in document["rows"]}
    curves = {
        row["name"]: curve for row in document["rows"] if len(curve := points[row["name"]]) > 1 or row["lam"] is None
    }
    on = next((SPLITS[row["chosen_on"]] for row in document["rows"] if row["chosen_on"]), None)
    star = f" The star marks the λ of each that was chosen, on {on}." if on else ""
    caption = f"The variants of {document['name']} on the test split, which selected nothing.{star}"
    title = f"{document['name']}: accuracy against λ"
    return accuracy_curves(curves, name="accuracy-lambda", title=title, caption=caption, headline=_headline(document))


def _points(document: Mapping[str, Any], row: Row) -> list[dict[str, Any]]:
    """A point for each setting of a variant: means over its seeds on the test split."""
    tested = [h for h in document["heads"] if h["variant"] == row["name"] and h["split"] == "test"]
    heads = dict.fromkeys(HeadId.of_row(h) for h in tested)
    points = []
    for setting in sorted(heads, key=lambda head: -1 if head.lam is None else head.lam):
        of_head = [h for h in tested if setting.matches(h)]
        is_selected = row["chosen_on"] is not None and setting.matches(row)
        point = {"variant": row["name"], "lam": setting.lam, "chosen": is_selected, "n": len(of_head)}
        for column in ("all", "many", "medium", "few"):
            value = mean_std(h[column] for h in of_head)
            point |= {column: rounded(value.mean), f"{column}_std": rounded(value.std)}
        points.append(point)
    return points


def _headline(document: Mapping[str, Any]) -> str:
    """Return the headline of the figure."""
    on = next((row["chosen_on"] for row in document["rows"] if row["chosen_on"]), None)
    n = max(row["n"] for row in document["rows"])
    network = document["network"]["network"]
    parts = [f"{document['name']}, {network}", f"mean ± one std of {n} batch orders" if n > 1 else "one batch order"]
    return "; ".join(parts + ([f"star: λ chosen on {SPLITS[on]}"] if on else []))


def ablation_section(document: Mapping[str, Any]) -> str:
    """Return the tables of an ablation for a page."""
    return "".join(
        f"<h3>{escape(table.title)}</h3>{table.html()}<p class=note>{escape(table.caption)}</p>"
        for table in ablation_tables(document)
    )


def read_ablations(folder: Path) -> list[dict[str, Any]]:
    """The documents of the ablations in a folder, in those below it, and in RUN/ablations; DataError if one is damaged."""
    places = ("ablation.json", "*/ablation.json", "ablations/*/ablation.json", "seed-*/ablations/*/ablation.json")
    documents_read = []
    for path in dict.fromkeys(p for place in places for p in sorted(folder.glob(place))):
        document = read_ablation(path)
        seed = next((part for part in path.relative_to(folder).parts if part.startswith("seed-")), None)
        documents_read.append(document | ({"name": f"{seed}/{document['name']}"} if seed else {}))
    return documents_read
