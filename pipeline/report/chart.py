"""Charts: plain plotly figures, which the page shows and `pipeline.report.picture` draws.

Colours are Okabe and Ito's, told apart by colour-blind readers; dashes and symbols tell lines apart in grey.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from pipeline.report.study import Row

BLACK, ORANGE, SKY, GREEN, BLUE, RED = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
PURPLE = "#CC79A7"
GREY, LIGHT = "#5f6368", "#e3e6ea"
PATTERNS = 500  # bars; each draws its own pattern, and in more no eye sees one


def chart(traces: Sequence[Row], *, x: str | Row, y: str | Row, columns: int = 1, **layout: Any) -> Row:
    """Return a plotly figure of traces.

    Fonts, colours of axes and grid, margins, legend and dark mode are the page's: a layout says only what is its own. The
    page turns black, greys and white into its own. Panels beyond the first have the axes xaxis2 and yaxis2, … and stand in
    lines of `columns`, on narrow screens below each other.

    Arguments:
        x, y: titles of the axes of the first panel, or what else plotly's axes take.
        layout: further keys of plotly's layout; `heights` are those of the lines of panels in a picture.
    """
    axes = {"xaxis": {"title": x} if isinstance(x, str) else x, "yaxis": {"title": y} if isinstance(y, str) else y}
    layout_of_axes = {key: dict(value) if key[1:5] == "axis" else value for key, value in (axes | layout).items()}
    for key, axis in layout_of_axes.items():
        if key[1:5] == "axis" and isinstance(axis.get("title"), str):
            axis["title"] = {"text": _html(axis["title"])}
    panels = max(int(key[5:] or 1) for key in layout_of_axes if key[:5] == "xaxis")
    if panels > 1:
        layout_of_axes["grid"] = {"rows": -(-panels // columns), "columns": columns, "pattern": "independent"}
    if heights := layout_of_axes.pop("heights", None):
        layout_of_axes["meta"] = {"heights": heights}
    return {"data": list(traces), "layout": layout_of_axes}


def panel(number: int) -> Row:
    """Return the keys by which a trace is drawn in the number-th panel."""
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"} if number > 1 else {}


def panel_titles(titles: Iterable[str]) -> list[Row]:
    """Return the annotations that are titles of the first panels."""
    return [note(text, 0, 1, panel_number=i, anchor="bottom", inside=False) for i, text in enumerate(titles, 1)]


def note(text: str, x: float, y: float, *, panel_number: int = 1, anchor: str = "middle", inside: bool = True) -> Row:
    """Return the annotation that writes a text at a place of a panel.

    Arguments:
        anchor: middle or bottom: which part of the text lies at y.
        inside: x and y are values of the axes, else shares of the panel.
    """
    number, share = "" if panel_number == 1 else panel_number, "" if inside else " domain"
    place: Row = {"x": x, "y": y, "xref": f"x{number}{share}", "yref": f"y{number}{share}", "showarrow": False}
    place |= {"xanchor": "left"} if (x, y, inside) == (0, 1, False) else {}
    return place | {"text": _html(text), "yanchor": anchor, "font": {"size": 11, "color": GREY}}


def errors(values: Iterable[float | None], color: str) -> Row:
    """Return the key of a trace that draws deviations."""
    return {"error_y": {"type": "data", "array": plain(list(values)), "thickness": 1, "width": 3, "color": color}}


def trace(
    name: str,
    x: Sequence[Any] | np.ndarray,
    y: Sequence[Any] | np.ndarray,
    style: Row,
    *,
    of_classes: bool = False,
    **more: Any,
) -> Row:
    """Return points and lines.

    Arguments:
        style: color, and where there are: dash (none for points alone), symbol, fill (colour inside the symbols), size,
            edge (colour around them), width.
        of_classes: point i is the i-th largest class: hovering over it tells its name, images, group and accuracies.
        more: plotly's keys.
    """
    dash, symbol = style.get("dash", "solid"), style.get("symbol")
    mode = "+".join([*["lines"] * (dash != "none"), *["markers"] * bool(symbol)])
    points: Row = {"type": "scatter", "name": escape(name, quote=False), "mode": mode, "x": plain(x), "y": plain(y)}
    solid = "solid" if dash == "none" else dash
    points["line"] = {"color": style["color"], "dash": solid, "width": style.get("width", 2)}
    if symbol:
        edge = {"color": style.get("edge", style["color"]), "width": 1.5}
        size = style.get("size", 6) * (1.3 if len(points["x"]) <= 60 else 0.6)
        fill = style.get("fill", style["color"])
        points["marker"] = {"symbol": symbol, "size": size, "color": fill, "line": edge}
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
    """Return bars, told apart in grey by plotly's patterns: "", "/", "\\", "x", "-", "|", "+", "."; the rest as in `trace`."""
    look: Row = {"color": color, "line": {"color": color, "width": 1}}
    if pattern and len(x) <= PATTERNS:
        look["pattern"] = {"shape": pattern, "fgcolor": color, "bgcolor": "white", "solidity": 0.35, "size": 7}
    series = {"type": "bar", "name": escape(name, quote=False), "x": plain(x), "y": plain(y), "marker": look}
    return series | ({"meta": "classes"} if of_classes else {}) | more


def class_axis(names: Sequence[str], counts: np.ndarray) -> Row:
    """Return the axis of classes from largest to smallest, named in that order: by name where names fit, else by rank."""
    sizes = f"from the most training images ({counts.max():,}) to the fewest ({counts.min():,})"
    axis: Row = {"showgrid": False, "range": [0.3, len(names) + 0.7]}
    if len(names) > 30:
        return axis | {"title": f"rank of the class, {sizes}"}
    short = [n if len(n) <= 18 else n[:17] + "…" for n in names]
    return axis | {"title": f"class, {sizes}", "tickvals": list(range(1, len(names) + 1)), "ticktext": plain(short)}


def lambda_axis(lams: Sequence[float]) -> Row:
    """Return an axis with ticks at λ that were tried, logarithmic where they span a decade, so that small ones do not crowd."""
    log = lams[0] > 0 and lams[-1] >= 10 * lams[0]
    ticks = kept_apart(np.log10(lams).tolist() if log else lams, 0.17)
    axis: Row = {"title": "λ, scale of the target norms", "type": "log" if log else "linear"}
    return axis | {"tickvals": [lams[i] for i in ticks], "ticktext": [f"{lams[i]:.2g}" for i in ticks]}


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


def _html(text: str) -> str:
    return escape(text, quote=False).replace("\n", "<br>")


def rounded(value: float | None) -> float | None:
    """Return four digits for a table; None for nan."""
    return None if value is None or np.isnan(value) else round(float(value), 4)
