"""Interactive charts: plain plotly figures, made of the numbers and styles that the pictures are drawn with."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from pipeline.report.drawing import rounded
from pipeline.report.study import Row

DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot", "none": "solid"}
PATTERNS = 500  # bars; each draws its own pattern, and in more no eye sees one
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "D": "diamond",
    "x": "x",
    "*": "star",
}


def chart(traces: Sequence[Row], *, x: str | Row, y: str | Row, **layout: Any) -> Row:
    """A plotly figure of traces; x and y: titles of the axes, or what else plotly's axes take.

    Fonts, colours of axes and grid, margins, legend and dark mode are the page's: a layout says only what is its own.
    Colours are those of `axes`; the page turns black, greys and white into its own. More panels: xaxis2=…, yaxis2=… and
    grid={"rows": 1, "columns": 2, "pattern": "independent"}, which narrow screens get below each other.
    """
    axes = {"xaxis": {"title": x} if isinstance(x, str) else x, "yaxis": {"title": y} if isinstance(y, str) else y}
    layout_of_axes = {key: dict(value) if key[1:5] == "axis" else value for key, value in (axes | layout).items()}
    for key, axis in layout_of_axes.items():
        if key[1:5] == "axis" and isinstance(axis.get("title"), str):
            axis["title"] = {"text": escape(axis["title"], quote=False)}
    return {"data": list(traces), "layout": layout_of_axes}


def trace(
    name: str,
    x: Sequence[Any] | np.ndarray,
    y: Sequence[Any] | np.ndarray,
    style: Row,
    *,
    of_classes: bool = False,
    **more: Any,
) -> Row:
    """Points and lines in a style of matplotlib (color, linestyle, marker, markersize, linewidth); more: plotly's keys.

    of_classes: point i is the i-th largest class: hovering over it tells its name, images, group and accuracies.
    """
    dash = style.get("linestyle", "-")
    marker = style.get("marker")
    mode = "+".join([*(["lines"] if dash != "none" else []), *(["markers"] if marker else [])])
    points: Row = {"type": "scatter", "name": escape(name, quote=False), "mode": mode, "x": plain(x), "y": plain(y)}
    points["line"] = {
        "color": style["color"],
        "dash": DASHES.get(dash, "longdashdot") if isinstance(dash, str) else "longdashdot",
        "width": style.get("linewidth", 2),
    }
    if marker:
        edge = {"color": style.get("markeredgecolor", style["color"]), "width": 1.5}
        fill = style.get("markerfacecolor", style["color"])
        size = style.get("markersize", 6) * (1.3 if len(points["x"]) <= 60 else 0.6)
        points["marker"] = {"symbol": SYMBOLS.get(marker, "circle"), "size": size, "color": fill, "line": edge}
    return points | ({"meta": "classes"} if of_classes else {}) | more


def bars(
    name: str,
    x: Sequence[Any] | np.ndarray,
    y: Sequence[Any] | np.ndarray,
    *,
    color: str,
    pattern: str = "",
    of_classes: bool = False,
    **more: Any,
) -> Row:
    """Bars, told apart in grey by plotly's patterns: "", "/", "\\", "x", "-", "|", "+", "."; the rest as in `trace`."""
    look: Row = {"color": color, "line": {"color": color, "width": 1}}
    if pattern and len(x) <= PATTERNS:
        look["pattern"] = {"shape": pattern, "fgcolor": color, "bgcolor": "white", "solidity": 0.35, "size": 7}
    series = {"type": "bar", "name": escape(name, quote=False), "x": plain(x), "y": plain(y), "marker": look}
    return series | ({"meta": "classes"} if of_classes else {}) | more


def class_axis(names: Sequence[str], counts: np.ndarray) -> Row:
    """The axis of classes as `axes.class_axis` has it; names: largest class first."""
    sizes = f"from the most training images ({counts.max():,}) to the fewest ({counts.min():,})"
    axis: Row = {"showgrid": False, "range": [0.3, len(names) + 0.7]}
    if len(names) > 30:
        return axis | {"title": f"rank of the class, {sizes}"}
    short = [n if len(n) <= 18 else n[:17] + "…" for n in names]
    return axis | {"title": f"class, {sizes}", "tickvals": list(range(1, len(names) + 1)), "ticktext": plain(short)}


def kept_apart(places: Sequence[float], share: float) -> list[int]:
    """Which of the sorted places get a label: the first, the last, and others a share of the axis from their neighbours."""
    apart, last, labelled = share * (places[-1] - places[0]), len(places) - 1, [0]
    for i in range(1, last):
        if places[i] - places[labelled[-1]] >= apart and places[last] - places[i] >= apart:
            labelled.append(i)
    return [*labelled, last] if last else labelled


def plain(values: Sequence[Any] | np.ndarray) -> list[Any]:
    """A list that JSON knows: nan becomes None, numbers keep four decimals, text is escaped."""
    items = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return [_plain(value) for value in items]


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value, quote=False)
    if value is None or isinstance(value, bool | int):
        return value
    return rounded(value)
