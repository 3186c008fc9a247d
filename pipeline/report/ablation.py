"""An ablation as a person reads it: the table of its variants, and their accuracy against λ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from pipeline.report import axes as look
from pipeline.report.axes import BLACK, BLUE, GREEN, ORANGE, RED, SKY
from pipeline.report.source import SPLITS
from pipeline.report.table import DIFFERENCES, caption, difference, spread

Row = Mapping[str, Any]
PAPER = "another, far larger network (CIFAR100-LT, imbalance factor 100), so no number compares with those to its left"
STYLES = [
    (BLACK, ":", "x"),
    (RED, "--", "^"),
    (BLUE, "-", "o"),
    (ORANGE, "-.", "s"),
    (GREEN, "-", "D"),
    (SKY, "--", "v"),
]


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
    bootstrap = document["bootstrap"]
    table = Table(
        title=f"Less {document['against']}, in points, with 95 % intervals",
        caption=f"Paired bootstrap of {bootstrap['samples']:,} test samples within their classes, "
        f"{bootstrap['resamples']:,} resamples; it speaks of other samples, not of other trainings.",
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("variant", no_wrap=True)
    for column in DIFFERENCES:
        table.add_column(column.capitalize(), justify="right")
    for row in document["rows"]:
        if row["less_alone"]:
            table.add_row(row["name"], *(difference(row["less_alone"][column]) for column in DIFFERENCES))
    return table


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


def plain_row(row: Row) -> dict[str, Any]:
    """A variant as one line of table.csv."""
    flat = {key: row[key] for key in ("name", "method", "loss", "lam", "chosen_on", "n")}
    flat |= {key: row[key] for column in (*DIFFERENCES, "ece") for key in (column, f"{column}_std")}
    for column in DIFFERENCES:
        less = (row["less_alone"] or {}).get(column) or {}
        flat |= {f"less_alone_{column}_{key}": less.get(key) for key in ("difference", "low", "high")}
        flat[f"paper_{column}"] = row["paper"].get(column)
    return flat


def accuracy_figure(document: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bytes] | None:
    """(the numbers drawn, a PNG) of test accuracy by group over λ, a line a variant; None where none has several λ.

    A variant without λ is a level line, one of a single λ is left out. The star marks the λ that was chosen, never on the
    test split.
    """
    points = {row["name"]: _points(document, row) for row in document["rows"]}
    drawn = [row for row in document["rows"] if len(points[row["name"]]) > 1 or row["lam"] is None]
    numbers = [point for row in drawn for point in points[row["name"]]]
    lams = sorted({p["lam"] for p in numbers if p["lam"] is not None})
    if len(lams) < 2:
        return None
    columns = [c for c in ("all", "many", "medium", "few") if numbers[0][c] is not None]
    with look.style():
        figure = look.figure_of(2 + 3 * len(columns), 4.6 + 0.25 * (len(drawn) // 5))
        grid: Any = figure.subplots(1, len(columns), sharex=True, squeeze=False)
        for column, axes in zip(columns, grid[0], strict=True):
            for i, row in enumerate(drawn):
                style, width = STYLES[i % len(STYLES)], 1.7 - 0.7 * (i // len(STYLES) % 2)
                _draw(axes, row, points[row["name"]], column, style, width=width)
            axes.set(title=column, xlabel="λ, scale of the target norms")
            if lams[0] > 0:
                look.lambda_axis(axes, lams)
        grid[0, 0].set_ylabel("test accuracy [%] (not selected on)")
        look.legend(figure, grid)
        figure.suptitle(_headline(document), x=0.01, ha="left", fontsize=13)
    return numbers, look.png(figure)


def _points(document: Mapping[str, Any], row: Row) -> list[dict[str, Any]]:
    """A point for each setting of a variant: means over its seeds on the test split."""
    mine = [h for h in document["heads"] if h["variant"] == row["name"] and h["split"] == "test"]
    settings = dict.fromkeys((h["method"], h["loss"], h["lam"]) for h in mine)
    points = []
    for setting in sorted(settings, key=lambda s: -1 if s[2] is None else s[2]):
        of = [h for h in mine if (h["method"], h["loss"], h["lam"]) == setting]
        chosen = row["chosen_on"] is not None and setting == (row["method"], row["loss"], row["lam"])
        point = {"variant": row["name"], "lam": setting[2], "chosen": chosen, "n": len(of)}
        for column in ("all", "many", "medium", "few"):
            values = [h[column] for h in of if h[column] is not None]
            point[column] = round(float(np.mean(values)), 4) if values else None
            point[f"{column}_std"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
        points.append(point)
    return points


def _draw(
    axes: Any, row: Row, points: Sequence[Row], column: str, style: tuple[str, str, str], *, width: float
) -> None:
    color, line, marker = style
    look_of: Any = {"color": color, "linestyle": line, "linewidth": width, "label": row["name"]}
    known = [p for p in points if p[column] is not None]
    if len(known) == 1:
        axes.axhline(known[0][column], alpha=0.7, **look_of)
        return
    x, y = [p["lam"] for p in known], np.array([p[column] for p in known])
    error = np.array([p[f"{column}_std"] or 0.0 for p in known])
    axes.fill_between(x, y - error, y + error, color=color, alpha=0.15, linewidth=0)
    axes.plot(x, y, marker=marker, markersize=4, markerfacecolor="white", **look_of)
    for p in known:
        if p["chosen"]:
            axes.plot(p["lam"], p[column], marker="*", markersize=15, color=color, markeredgecolor=BLACK, zorder=5)


def _headline(document: Mapping[str, Any]) -> str:
    """What the figure shows, in a line."""
    on = next((row["chosen_on"] for row in document["rows"] if row["chosen_on"]), None)
    n = max(row["n"] for row in document["rows"])
    network = document["network"]["network"]
    parts = [f"{document['name']}, {network}", f"mean ± one std of {n} batch orders" if n > 1 else "one batch order"]
    return "; ".join(parts + ([f"star: λ chosen on {SPLITS[on]}"] if on else []))
