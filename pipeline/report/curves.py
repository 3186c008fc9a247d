"""Accuracy against λ, a line for each of several variants or runs: as a picture and as a chart."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report import axes as look
from pipeline.report.axes import BLACK, BLUE, GREEN, ORANGE, RED, SKY
from pipeline.report.chart import chart, kept_apart, plain, trace
from pipeline.report.drawing import Drawing
from pipeline.report.study import COLUMNS, Row
from pipeline.results.mean_std import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Mapping[str, Sequence[Mapping[str, Any]]]
COLORS = (BLACK, RED, BLUE, ORANGE, GREEN, SKY)
LINES, MARKERS = (":", "--", "-", "-.", "-", "--"), ("x", "^", "o", "s", "D", "v")


def style_of(number: int) -> Row:
    """Colour, line and marker of the number-th line; after six they come again, thinner."""
    i = number % len(COLORS)
    width = 1.7 - 0.7 * (number // len(COLORS) % 2)
    return {"color": COLORS[i], "linestyle": LINES[i], "marker": MARKERS[i], "linewidth": width}


def accuracy_curves(curves: Points, *, name: str, title: str, caption: str, headline: str) -> Drawing | None:
    """Test accuracy by group over λ, a line a curve; None where no two λ were tried.

    curves: by name the points of each: lam, chosen, n, and of every group its mean and NAME_std. A curve without λ is a
    level line. The star marks a λ that was chosen, never on the test split.
    """
    table = [dict(point) for points in curves.values() for point in points]
    lams = sorted({p["lam"] for p in table if p["lam"] is not None})
    if len(lams) < 2:
        return None
    columns = [c for c in COLUMNS if any(p[c] is not None for p in table)]
    with look.style():
        figure = look.figure_of(2 + 3 * len(columns), 4.6 + 0.25 * (len(curves) // 5))
        grid: Any = figure.subplots(1, len(columns), sharex=True, squeeze=False)
        for column, axes in zip(columns, grid[0], strict=True):
            for i, (label, points) in enumerate(curves.items()):
                _draw(axes, label, points, column, style_of(i))
            axes.set(title=column, xlabel="λ, scale of the target norms")
            if lams[0] > 0:
                look.lambda_axis(axes, lams)
        grid[0, 0].set_ylabel("test accuracy [%] (not selected on)")
        look.legend(figure, grid)
        figure.suptitle(headline, x=0.01, ha="left", fontsize=13)
    return Drawing(name, title, caption, figure, table, _chart(curves, columns, lams))


def _draw(axes: "Axes", label: str, points: Sequence[Mapping[str, Any]], column: str, style: Row) -> None:
    measured_points = [p for p in points if p[column] is not None]
    line: Any = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": style["linewidth"]}
    if _level(measured_points):
        axes.axhline(measured_points[0][column], alpha=0.7, label=label, **line)
        return
    x, y = [p["lam"] for p in measured_points], np.array([p[column] for p in measured_points])
    error = np.array([p[f"{column}_std"] or 0.0 for p in measured_points])
    axes.fill_between(x, y - error, y + error, color=style["color"], alpha=0.15, linewidth=0)
    if len(measured_points) == 1:  # it must be seen between the others' lines
        axes.errorbar(x, y, error, color=style["color"], linewidth=1.2, capsize=3)
    size = 8 if len(measured_points) == 1 else 4
    axes.plot(x, y, label=label, markersize=size, markerfacecolor="white", marker=style["marker"], **line)
    for p in measured_points:
        if p["chosen"]:
            axes.plot(
                p["lam"], p[column], marker="*", markersize=15, color=style["color"], markeredgecolor=BLACK, zorder=5
            )


def _level(points: Sequence[Mapping[str, Any]]) -> bool:
    """Return true for a curve without λ: it is the same at all of them."""
    return len(points) == 1 and points[0]["lam"] is None


def _chart(curves: Points, columns: Sequence[str], lams: Sequence[float]) -> Row:
    """Two panels in a row, each with all curves."""
    log = lams[0] > 0 and lams[-1] >= 10 * lams[0]
    ticks = kept_apart(np.log10(lams).tolist() if log else lams, 0.1)
    shown_lams: Row = {"tickvals": [lams[i] for i in ticks], "ticktext": [f"{lams[i]:.2g}" for i in ticks]}
    traces, layout = [], {}
    for panel, column in enumerate(columns, 1):
        number = "" if panel == 1 else str(panel)
        layout[f"xaxis{number}"] = {"title": "λ", "type": "log" if log else "linear", **shown_lams}
        layout[f"yaxis{number}"] = {"title": f"{column} [%]"}
        place: Row = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        for i, (label, points) in enumerate(curves.items()):
            present = [p for p in points if p[column] is not None]
            panel_keys: Row = place | {"legendgroup": str(i), "hovertemplate": "%{text}<extra></extra>"}
            if not present:
                continue
            level = _level(present)
            if level:
                present = [{**present[0], "lam": lam} for lam in (lams[0], lams[-1])]
                style = style_of(i) | {"marker": None}
            else:
                style = style_of(i) | {
                    "markersize": 9 if len(present) == 1 else 4.5,
                    "markerfacecolor": "white",
                }
                panel_keys["error_y"] = {
                    "type": "data",
                    "array": plain([p[f"{column}_std"] for p in present]),
                    "thickness": 1,
                }
            texts = [_told(label, p, column, level=level) for p in present]
            x, y = [p["lam"] for p in present], [p[column] for p in present]
            traces.append(trace(label, x, y, style, text=plain(texts), showlegend=panel == 1, **panel_keys))
            stars = [p for p in present if p["chosen"] and not level]
            star: Row = {"color": style["color"], "marker": "*", "markersize": 11, "markeredgecolor": BLACK}
            if stars:
                x, y = [p["lam"] for p in stars], [p[column] for p in stars]
                hidden: Row = {"hoverinfo": "skip", "showlegend": False, "legendgroup": str(i)}
                traces.append(trace(label, x, y, star | {"linestyle": "none"}, **place, **hidden))
    rows = -(-len(columns) // 2)
    grid = {"rows": rows, "columns": min(2, len(columns)), "pattern": "independent"}
    first = {"x": layout.pop("xaxis"), "y": layout.pop("yaxis")}
    return chart(traces, **first, **layout, grid=grid, height=330 * rows + 60)


def _told(label: str, point: Mapping[str, Any], column: str, *, level: bool) -> str:
    at = "" if level else f", λ = {point['lam']:g}{' (chosen)' if point['chosen'] else ''}"
    return f"{label}{at}: {column} {measured(point, column)} % (n = {point['n']})"
