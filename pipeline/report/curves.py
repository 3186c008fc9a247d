"""Accuracy against λ, a line for each of several variants or runs, a panel for each group of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.chart import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    chart,
    errors,
    lambda_axis,
    panel,
    panel_titles,
    plain,
    trace,
)
from pipeline.report.drawing import Drawing
from pipeline.report.study import COLUMNS, Row
from pipeline.results.mean_std import measured

Points = Mapping[str, Sequence[Mapping[str, Any]]]
COLORS = (BLACK, RED, BLUE, ORANGE, GREEN, SKY)
DASHES = ("dot", "dash", "solid", "dashdot", "solid", "dash")
SYMBOLS = ("x", "triangle-up", "circle", "square", "diamond", "triangle-down")


def style_of(number: int) -> Row:
    """Colour, line and symbol of the number-th line; after six they come again, thinner."""
    i = number % len(COLORS)
    width = 1.7 - 0.7 * (number // len(COLORS) % 2)
    return {"color": COLORS[i], "dash": DASHES[i], "symbol": SYMBOLS[i], "width": width}


def accuracy_curves(curves: Points, *, name: str, title: str, caption: str, headline: str) -> Drawing | None:
    """Test accuracy by group over λ, a line a curve; None where no two λ were tried.

    curves: by name the points of each: lam, chosen, n, and of every group its mean and NAME_std. A curve without λ is a
    level line. The star marks a λ that was chosen, never on the test split.
    """
    table = [dict(point) for points in curves.values() for point in points]
    if len({p["lam"] for p in table if p["lam"] is not None}) < 2:
        return None
    columns = present_columns(table)
    drawn = accuracy_panels({"test ": curves}, dict(zip(columns, columns, strict=True)), across=2)
    return Drawing(name, title, caption, table, drawn, headline, 3.4 * -(-len(columns) // 2) + 1)


def present_columns(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the groups that any point has an accuracy of."""
    return [column for column in COLUMNS if any(point.get(column) is not None for point in points)]


def accuracy_panels(rows: Mapping[str, Points], columns: Mapping[str, str], *, across: int, star: str = "") -> Row:
    """Return the chart of curves over λ.

    Arguments:
        rows: the curves of each split, by the words on the left of its panels.
        columns: group → title of its panel.
        across: panels beside each other.
        star: what the stars mean, for the legend.
    """
    every = [point for curves in rows.values() for points in curves.values() for point in points]
    lams = sorted({point["lam"] for point in every if point["lam"] is not None})
    traces: list[Row] = []
    layout: Row = {}
    for number, (split, column) in enumerate(((s, c) for s in rows for c in columns), 1):
        traces += _panel_traces(rows[split], column, lams, panel(number), first=number == 1, star=star)
        key = "" if number == 1 else str(number)
        layout[f"xaxis{key}"] = lambda_axis(lams)
        layout[f"yaxis{key}"] = {"title": f"{split}accuracy [%]" if (number - 1) % across == 0 else ""}
        if number > len(columns):
            layout[f"yaxis{key}"]["matches"] = f"y{number - len(columns) if number - len(columns) > 1 else ''}"
    lines = -(-len(columns) * len(rows) // across)
    first = {"x": layout.pop("xaxis"), "y": layout.pop("yaxis")}
    titles = panel_titles(columns.values())
    return chart(
        traces, **first, **layout, columns=across, height=330 * lines + 60, annotations=titles, showlegend=True
    )


def _panel_traces(
    curves: Points, column: str, lams: Sequence[float], place: Row, *, first: bool, star: str
) -> list[Row]:
    traces: list[Row] = []
    stars: list[tuple[float, float, str]] = []
    for i, (label, points) in enumerate(curves.items()):
        present, style = [p for p in points if p[column] is not None], style_of(i)
        if not present:
            continue
        keys: Row = place | {"legendgroup": str(i), "hovertemplate": "%{text}<extra></extra>", "showlegend": first}
        if level := len(present) == 1 and present[0]["lam"] is None:  # the same at all λ
            ends = (lams[0], lams[-1]) if len(lams) > 1 else (0.5 * lams[0], 1.5 * lams[0])
            present, style = [{**present[0], "lam": lam} for lam in ends], style | {"symbol": None}
        else:
            style |= {"size": 9 if len(present) == 1 else 4.5, "fill": "white"}
            keys |= errors((p[f"{column}_std"] for p in present), style["color"])
            stars += [(p["lam"], p[column], style["color"]) for p in present if p["chosen"]]
        x, y = [p["lam"] for p in present], [p[column] for p in present]
        traces.append(
            trace(label, x, y, style, text=plain([_told(label, p, column, level=level) for p in present]), **keys)
        )
    for number, (lam, accuracy, color) in enumerate(stars):
        look: Row = {"color": color, "symbol": "star", "size": 11, "edge": BLACK, "dash": "none"}
        skipped: Row = {"hoverinfo": "skip", "showlegend": first and bool(star) and number == 0}
        traces.append(trace(star, [lam], [accuracy], look, **skipped, **place))
    return traces


def _told(label: str, point: Mapping[str, Any], column: str, *, level: bool) -> str:
    at = "" if level else f", λ = {point['lam']:g}{' (chosen)' if point['chosen'] else ''}"
    return f"{label}{at}: {column} {measured(point, column)} % (n = {point['n']})"
