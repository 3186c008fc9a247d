"""The picture of a chart: the figure that the page shows, drawn by matplotlib for a reader without a browser, and for papers.

Read are those of plotly's keys that `pipeline.report.chart` writes.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import unescape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.report.chart import BLACK, GREY, LIGHT, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 120  # more classes than this are averaged in neighbours of equal size
BARS = 0.85  # of the room between two places
WIDTH, PANEL = 11.5, 3.0  # inches: of a figure, and the least of each panel
LINES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
LINES |= {"longdash": (0, (1, 1)), "longdashdot": (0, (4, 1.5, 1, 1.5, 1, 1.5))}
MARKS = {"circle": "o", "square": "s", "triangle-up": "^", "triangle-down": "v", "diamond": "D", "x": "x", "star": "*"}
HATCHES = {"/": "////", ".": "...."}
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "text.parse_math": False,  # a class may be called $a$
}


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib's look inside a with block; a letter that its font lacks becomes a box, not a warning."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def png(figure: "Figure") -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def picture(chart: Row, *, headline: str = "", height: float = 4.6) -> "Figure":
    """Return the figure of a chart, which no pyplot state knows of.

    Arguments:
        headline: the line above all panels.
        height: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = chart["layout"]
    grid = layout.get("grid", {"rows": 1, "columns": 1})
    with style():
        figure = Figure(figsize=(max(WIDTH, 2 + PANEL * grid["columns"]), height), layout="constrained")
        FigureCanvasAgg(figure)
        panels = _panels(figure, layout, grid)
        names: dict[str, list[str]] = {name: [] for name in panels}  # of the categories of each panel
        traces = {name: [trace for trace in chart["data"] if trace.get("yaxis", "y") == name] for name in panels}
        for name, axes in panels.items():
            for trace in traces[name]:
                _draw(axes, trace, traces[name], names[name], overlay=layout.get("barmode") == "overlay")
        for name, axes in panels.items():  # once all are drawn: some share an axis
            _finish(axes, name, layout, traces[name], names[name])
        _legend(figure, list(panels.values()), shown=layout.get("showlegend"))
        if headline:
            figure.suptitle(headline, x=0.01, ha="left", fontsize=13)
    return figure


def _panels(figure: "Figure", layout: Row, grid: Row) -> dict[str, "Axes"]:
    """Return the axes by the names of their y axes; one that lies over another shares its x axis."""
    ratios = layout.get("meta", {}).get("heights")
    spec = figure.add_gridspec(grid["rows"], grid["columns"], height_ratios=ratios)
    panels: dict[str, Axes] = {}
    for number in range(grid["rows"] * grid["columns"]):
        key = str(number + 1) if number else ""
        if f"xaxis{key}" in layout:
            panels[f"y{key}"] = figure.add_subplot(spec[divmod(number, grid["columns"])])
    for key, axis in layout.items():
        if key[:5] == "yaxis" and f"y{key[5:]}" not in panels:
            panels[f"y{key[5:]}"] = panels["y"].twinx()
        if key[:5] == "yaxis" and "matches" in axis:
            panels[f"y{key[5:]}"].sharey(panels[axis["matches"]])
    return panels


def _draw(axes: "Axes", trace: Row, traces: Sequence[Row], names: list[str], *, overlay: bool) -> None:
    if trace["type"] == "heatmap":
        _heat(axes, trace)
        return
    label = None if trace.get("showlegend") is False else plain_text(trace["name"])
    x, y = _places(trace["x"], names), np.array(trace["y"], dtype=float)
    ranks = trace.get("meta") == "classes" and "lines" in trace.get("mode", "lines")
    if ranks and len(y) > BINS:
        x, y = thinned(y)
    if trace["type"] == "bar":
        bars = [other for other in traces if other["type"] == "bar"]
        _bars(
            axes, trace, x, y, label=label, number=0 if overlay else bars.index(trace), of=1 if overlay else len(bars)
        )
    else:
        _points(axes, trace, x, y, label=label)


def _points(axes: "Axes", trace: Row, x: np.ndarray, y: np.ndarray, *, label: str | None) -> None:
    """Draw a line, marks or both; deviations are a band around a line, bars elsewhere."""
    if "fill" in trace:
        axes.fill_between(x, y, step="mid", color=trace["fillcolor"], linewidth=0)
        return
    line, mark, joined = trace["line"], trace.get("marker", {}), "lines" in trace["mode"]
    look: Row = {"color": line["color"], "linewidth": line["width"], "alpha": trace.get("opacity")}
    look |= {"linestyle": LINES[line["dash"]] if joined else "none"}
    look |= {"drawstyle": "steps-mid"} if line.get("shape") == "hvh" else {}
    marks: Row = {}
    if mark:
        face = "none" if mark["color"].startswith("rgba") else mark["color"]
        marks = {"marker": MARKS[mark["symbol"]], "markerfacecolor": face, "markeredgecolor": mark["line"]["color"]}
        marks |= {"markersize": 5} if isinstance(mark["size"], list) else {"markersize": mark["size"] / 1.3}
        marks["markevery"] = max(1, len(x) // 8) if joined and len(x) > 14 else None
    spread = np.nan_to_num(np.array(trace.get("error_y", {}).get("array", []), dtype=float))
    if spread.any() and joined and len(x) > 1:
        axes.fill_between(x, y - spread, y + spread, color=line["color"], alpha=0.15, linewidth=0)
    elif spread.any():
        axes.errorbar(x, y, spread, color=line["color"], linewidth=1.2, capsize=3)
    if isinstance(mark.get("size"), list):
        axes.plot([], [], label=label, **look, **marks)  # for the legend: all marks of one size
        axes.plot(x, y, **look)
        face = {"facecolor": marks["markerfacecolor"], "edgecolor": marks["markeredgecolor"]}
        axes.scatter(
            x, y, np.square(np.array(mark["size"]) / 2), marker=marks["marker"], zorder=3, clip_on=False, **face
        )
    else:
        over: Row = {"zorder": 5} if mark.get("symbol") == "star" else {}
        axes.plot(x, y, label=label, **look, **marks, **over)


def _bars(axes: "Axes", trace: Row, x: np.ndarray, y: np.ndarray, *, label: str | None, number: int, of: int) -> None:
    room = BARS * (x[1] - x[0] if len(x) > 1 else 1.0)
    place, width = x + ((number + 0.5) / of - 0.5) * room, room / of
    color, hatch = trace["marker"]["color"], HATCHES.get(trace["marker"].get("pattern", {}).get("shape", ""))
    look: Row = {"color": "white" if hatch else color, "edgecolor": color, "hatch": hatch, "linewidth": 0.8}
    spread = np.nan_to_num(np.array(trace.get("error_y", {}).get("array", []), dtype=float))
    axes.bar(place, y, width, yerr=spread if spread.any() else None, capsize=3, label=label, **look)
    if trace.get("textposition") == "outside":
        for at, height, text in zip(place, y, trace["text"], strict=True):
            if np.isfinite(height):
                axes.text(at, height, text, ha="center", va="bottom", fontsize=9, color=GREY)


def _heat(axes: "Axes", trace: Row) -> None:
    """Draw shaded cells with their numbers; dark ones have white letters."""
    cells = np.array(trace["z"], dtype=float)
    axes.imshow(cells, cmap="Blues", vmin=trace["zmin"], vmax=trace["zmax"], aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        text = "–" if np.isnan(value) else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if value > 55 else BLACK, fontsize=13)
    axes.set_xticks(range(len(trace["x"])), trace["x"])
    axes.set_yticks(range(len(trace["y"])), trace["y"])


def _finish(axes: "Axes", name: str, layout: Row, traces: Sequence[Row], names: Sequence[str]) -> None:
    """Give a panel its axes, titles, lines and texts."""
    number = name[1:]
    x_axis, y_axis = layout.get(f"xaxis{number}"), layout[f"yaxis{number}"]
    if x_axis is not None:
        _axis(axes, "x", x_axis)
        places = [x for trace in traces for x in trace["x"]]
        whole = bool(places) and all(isinstance(x, int) for x in places)
        if whole and x_axis.get("type") != "log" and "tickvals" not in x_axis:
            axes.locator_params(axis="x", integer=True)
    if names:
        axes.set_xticks(range(len(names)), names)
    _axis(axes, "y", y_axis)
    if y_axis.get("side") == "right":
        axes.spines["right"].set_visible(True)
    elif "overlaying" in y_axis:
        axes.set_zorder(1)
        axes.patch.set_visible(False)
    if "zerolinewidth" in y_axis:
        axes.axhline(0, color=BLACK, linewidth=1)
    for shape in (s for s in layout.get("shapes", ()) if s["xref"] == f"x{number}"):
        axes.axvline(shape["x0"], color=shape["line"]["color"], linewidth=1, linestyle=LINES[shape["line"]["dash"]])
    for note in layout.get("annotations", ()):
        if note["xref"].split()[0] == f"x{number}":
            _annotate(axes, note)


def _axis(axes: "Axes", letter: Literal["x", "y"], axis: Row) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    side: Any = getattr(axes, f"{letter}axis")
    side.set_label_text(plain_text(axis.get("title", {}).get("text", "")))
    if axis.get("showgrid") is False:
        axes.grid(visible=False, axis=letter)
    if axis.get("type") == "log":
        getattr(axes, f"set_{letter}scale")("log")
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        side.set_minor_formatter(NullFormatter())
    if axis.get("showticklabels") is False:
        side.set_ticks([])
    elif "tickvals" in axis:
        labels = [plain_text(text) for text in axis["ticktext"]]
        turned = max(map(len, labels)) * len(labels) > 130
        turn: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
        side.set_ticks(axis["tickvals"], labels, **turn)
        side.set_ticks([], minor=True)
    if "range" in axis:
        getattr(axes, f"set_{letter}lim")(axis["range"])
    elif axis.get("rangemode") == "tozero":
        axes.set_ylim(bottom=0)


def _annotate(axes: "Axes", note: Row) -> None:
    """Write a text where its axes say, or as the title of its panel."""
    from matplotlib.patheffects import withStroke

    text, inside = plain_text(note["text"]), "domain" not in note["xref"]
    if not inside and (note["x"], note["y"]) == (0, 1):
        axes.set_title(text)
        return
    places: Any = tuple("axes fraction" if "domain" in note[key] else "data" for key in ("xref", "yref"))
    look: Row = {
        "ha": "center",
        "va": {"middle": "center"}.get(note["yanchor"], note["yanchor"]),
        "fontsize": note["font"]["size"],
    }
    shift = (0, note.get("yshift", 0))
    written = axes.annotate(
        text, (note["x"], note["y"]), shift, places, textcoords="offset points", color=note["font"]["color"], **look
    )
    if inside and "domain" not in note["yref"]:
        written.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _legend(figure: "Figure", panels: Sequence["Axes"], *, shown: bool | None) -> None:
    """Draw one legend below all panels, every label once; in fewer columns where labels are long."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1 or (handles and shown):
        columns = _columns(list(handles), figure.get_figwidth())
        place: Any = {"loc": "outside lower center", "ncols": columns, "fontsize": 10.5, "handlelength": 3}
        figure.legend(list(handles.values()), list(handles), **place)


def _columns(labels: Sequence[str], width: float) -> int:
    """Return how many fit beside each other, five at most: an inch has room for 12 letters, a line takes 10."""
    for columns in range(min(len(labels), 5), 1, -1):
        lengths = np.array_split(np.array([len(label) for label in labels]), columns)
        if sum(part.max() + 10 for part in lengths) <= 12 * width:
            return columns
    return 1


def _places(values: Sequence[Any], names: list[str]) -> np.ndarray:
    """Return numbers as they are, and for texts their number among the categories of the panel."""
    if not any(isinstance(value, str) for value in values):
        return np.array(values, dtype=float)
    names += [text for text in dict.fromkeys(map(plain_text, values)) if text not in names]
    return np.array([names.index(plain_text(value)) for value in values], dtype=float)


def plain_text(text: str) -> str:
    """Return the text of a page without its marks."""
    return unescape(text.replace("<br>", "\n"))


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (rank, value) of every class, or means over neighbours where there are more than a figure can show."""
    rank = np.arange(1, len(values) + 1, dtype=float)
    if len(values) <= BINS:
        return rank, values
    groups = np.array_split(np.arange(len(values)), BINS)
    present = [values[g][~np.isnan(values[g])] for g in groups]
    return np.array([rank[g].mean() for g in groups]), np.array([k.mean() if len(k) else np.nan for k in present])
