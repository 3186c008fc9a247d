"""An ablation as a person reads it: the table of its variants, and their accuracy against λ; in a terminal and a page."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from cache import write_durably
from pipeline.errors import DataError
from pipeline.report.axes import png
from pipeline.report.curves import accuracy_curves
from pipeline.report.drawing import Drawing
from pipeline.report.study import SPLITS
from pipeline.report.table import DIFFERENCES, caption, difference, differences_caption, html_table, spread
from pipeline.results.head_id import HeadId

Row = Mapping[str, Any]
PAPER = "another, far larger network (CIFAR100-LT, imbalance factor 100), so no number compares with those to its left"


def ablation_tables(document: Mapping[str, Any]) -> Group:
    """The variants with their chosen λ and accuracies, and below them how far each is from the loss alone."""
    rows, against = document["rows"], document["against"]
    several = any(row["n"] > 1 for row in rows)
    n = max(row["n"] for row in rows)
    table = Table(
        title=f"{document['name']}: test accuracy in %{', mean ± std' if several else ''}",
        caption=_caption(document, n),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE,
    )
    papers = any(row["paper"] for row in rows)
    table.add_column("variant", no_wrap=True)
    for column in ("λ", *(c.capitalize() for c in DIFFERENCES), *(["paper"] if papers else [])):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [spread([row], column) for column in DIFFERENCES]
        table.add_row(row["name"], _lam(row), *cells, *([_paper(row["paper"])] if papers else []))
    return Group(table, *([_differences(document)] if against else []))


def _differences(document: Mapping[str, Any]) -> Table:
    bootstrap, each = document["bootstrap"], _of_each(document)
    table = Table(
        title=f"Less {'the loss alone' if each else document['against']}, in points, with 95 % intervals",
        caption=f"Paired bootstrap of {bootstrap['samples']:,} test samples within their classes, "
        f"{bootstrap['resamples']:,} resamples; it speaks of other samples, not of other trainings.",
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE,
    )
    for column in ("variant", "less") if each else ("variant",):
        table.add_column(column, no_wrap=True)
    for column in DIFFERENCES:
        table.add_column(column.capitalize(), justify="right")
    for row in document["rows"]:
        if row["less_alone"]:
            names = [row["name"], row["against"]] if each else [row["name"]]
            table.add_row(*names, *(difference(row["less_alone"][column]) for column in DIFFERENCES))
    return table


def _of_each(document: Mapping[str, Any]) -> bool:
    """Whether the variants are not all held against the same one."""
    return any(row.get("against") not in (None, document["against"]) for row in document["rows"])


def _caption(document: Mapping[str, Any], n: int) -> str:
    on = next((row["chosen_on"] for row in document["rows"] if row["chosen_on"]), None)
    facts = {"selected": {"n": n, "chosen_on": on}}
    text = caption({**document, **facts}).replace("; selected on", "; * λ of each row selected on")
    text = text.replace("'s formulation", "'s formulation where a row says no other")
    return text + (
        f"\nPaper: many/medium/few/all as published, on {PAPER}."
        if any(row["paper"] for row in document["rows"])
        else ""
    )


def _lam(row: Row) -> str:
    if row["lam"] is None:
        return "–"
    return f"{row['lam']:g}" + ("*" if row["chosen_on"] else "")


def _paper(paper: Mapping[str, float]) -> str:
    return "/".join(f"{paper[c]:g}" if c in paper else "–" for c in DIFFERENCES) if paper else ""


def write_accuracy_figure(document: Mapping[str, Any], out: Path) -> None:
    """Write accuracy-lambda.png and the numbers of it as .csv where a variant has several λ; otherwise nothing."""
    drawing = accuracy_figure(document)
    if drawing:
        write_durably(out / "accuracy-lambda.png", png(drawing.figure))
        write_durably(out / "accuracy-lambda.csv", drawing.csv)


def accuracy_figure(document: Mapping[str, Any]) -> Drawing | None:
    """Test accuracy by group over λ, a line a variant; None where none has several λ.

    A variant without λ is a level line, one of a single λ is left out.
    """
    points = {row["name"]: _points(document, row) for row in document["rows"]}
    drawn = {row["name"]: of for row in document["rows"] if len(of := points[row["name"]]) > 1 or row["lam"] is None}
    on = next((SPLITS[row["chosen_on"]] for row in document["rows"] if row["chosen_on"]), None)
    star = f" The star marks the λ of each that was chosen, on {on}." if on else ""
    caption = f"The variants of {document['name']} on the test split, which selected nothing.{star}"
    title = f"{document['name']}: accuracy against λ"
    return accuracy_curves(drawn, name="accuracy-lambda", title=title, caption=caption, headline=_headline(document))


def _points(document: Mapping[str, Any], row: Row) -> list[dict[str, Any]]:
    """A point for each setting of a variant: means over its seeds on the test split."""
    mine = [h for h in document["heads"] if h["variant"] == row["name"] and h["split"] == "test"]
    heads = dict.fromkeys(HeadId.of_row(h) for h in mine)
    points = []
    for setting in sorted(heads, key=lambda head: -1 if head.lam is None else head.lam):
        of = [h for h in mine if setting.matches(h)]
        chosen = row["chosen_on"] is not None and setting.matches(row)
        point = {"variant": row["name"], "lam": setting.lam, "chosen": chosen, "n": len(of)}
        for column in ("all", "many", "medium", "few"):
            values = [h[column] for h in of if h[column] is not None]
            point[column] = round(float(np.mean(values)), 4) if values else None
            point[f"{column}_std"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
        points.append(point)
    return points


def _headline(document: Mapping[str, Any]) -> str:
    """What the figure shows, in a line."""
    on = next((row["chosen_on"] for row in document["rows"] if row["chosen_on"]), None)
    n = max(row["n"] for row in document["rows"])
    network = document["network"]["network"]
    parts = [f"{document['name']}, {network}", f"mean ± one std of {n} batch orders" if n > 1 else "one batch order"]
    return "; ".join(parts + ([f"star: λ chosen on {SPLITS[on]}"] if on else []))


def ablation_section(document: Mapping[str, Any]) -> str:
    """The tables of ablation_tables as HTML."""
    rows, against = document["rows"], document["against"]
    papers = any(row["paper"] for row in rows)
    heads = ["λ", *(c.capitalize() for c in DIFFERENCES), *(["paper"] if papers else [])]
    lines = [
        (
            row["name"],
            [_lam(row), *(spread([row], c) for c in DIFFERENCES), *([_paper(row["paper"])] if papers else [])],
        )
        for row in rows
    ]
    told = _caption(document, max(row["n"] for row in rows))
    html = html_table("Variant", heads, lines) + f"<p class=note>Test accuracy in %. {escape(told)}</p>"
    if not against:
        return html
    each = _of_each(document)
    less = [
        (row["name"], [*([row["against"]] if each else []), *(difference(row["less_alone"][c]) for c in DIFFERENCES)])
        for row in rows
        if row["less_alone"]
    ]
    note = f"Points, with 95 % intervals. {differences_caption(document['bootstrap'])}"
    heads = [*(["less"] if each else []), *(c.capitalize() for c in DIFFERENCES)]
    table = html_table("Variant" if each else f"Less {against}", heads, less)
    return f"{html}{table}<p class=note>{note}</p>"


def read_ablations(folder: Path) -> list[Row]:
    """The documents of the ablations in a folder, in those below it, and in RUN/ablations; DataError if one is damaged."""
    places = ("ablation.json", "*/ablation.json", "ablations/*/ablation.json", "seed-*/ablations/*/ablation.json")
    found = []
    for path in dict.fromkeys(p for place in places for p in sorted(folder.glob(place))):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if missing := {"name", "rows", "heads", "against"} - document.keys():
                raise ValueError(f"no {', '.join(sorted(missing))}")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: not a readable ablation ({error}); run `pipeline rebalance --config` again"
            ) from error
        seed = next((part for part in path.relative_to(folder).parts if part.startswith("seed-")), None)
        found.append(document | ({"name": f"{seed}/{document['name']}"} if seed else {}))
    return found
