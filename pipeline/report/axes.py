"""The look of the figures: one style, and axes for λ and for classes.

Colours are Okabe and Ito's, told apart by colour-blind readers; line styles and markers tell them apart in grey.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, BLUE, RED = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
PURPLE = "#CC79A7"
GREY, LIGHT = "#5f6368", "#e3e6ea"
BINS = 120  # more classes than this are averaged in neighbours of equal size
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
    """Matplotlib's settings for what is drawn inside; a letter that its font lacks becomes a box, not a warning."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def figure_of(width: float, height: float) -> "Figure":
    """An empty figure, inches wide and high, that no pyplot state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend(figure: "Figure", grid: np.ndarray) -> None:
    """One legend below all axes, every label once; in fewer columns where labels are long."""
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    place: Any = {
        "loc": "outside lower center",
        "ncols": _columns(list(handles), figure.get_figwidth()),
        "fontsize": 10.5,
        "handlelength": 3,
    }
    figure.legend(list(handles.values()), list(handles), **place)


def _columns(labels: Sequence[str], width: float) -> int:
    """As many as fit beside each other, five at most: an inch has room for 12 letters, a line takes 10."""
    for columns in range(min(len(labels), 5), 1, -1):
        label_lengths = np.array_split(np.array([len(label) for label in labels]), columns)
        if sum(lengths.max() + 10 for lengths in label_lengths) <= 12 * width:
            return columns
    return 1


def lambda_axis(axes: "Axes", lams: Sequence[float]) -> None:
    """Logarithmic where λ spans a decade, so that small ones do not crowd; ticks at λ that were tried."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = lams[0], lams[-1]
    wide = high >= 10 * low
    if wide:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * 1.25)
    else:
        margin = 0.08 * (high - low) or 0.5 * high
        axes.set_xlim(low - margin, high + margin)
    places = np.log10(lams) if wide else np.array(lams)
    ticks, last = [lams[0]], places[0]
    for lam, place in zip(lams[1:], places[1:], strict=True):
        if place - last >= 0.17 * (places[-1] - places[0]):
            ticks, last = [*ticks, lam], place
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))


def class_axis(axes: "Axes", names: Sequence[str], counts: np.ndarray) -> None:
    """Classes from largest to smallest, named in that order: by name where names fit, else by rank."""
    classes = len(names)
    axes.set_xlim(0.5, classes + 0.5)
    axes.grid(visible=False, axis="x")
    if classes > 30:
        size = f"1 has the most training images ({counts.max():,}), {classes:,} the fewest ({counts.min():,})"
        axes.set_xlabel(f"rank of the class: {size}")
        return
    short = [n if len(n) <= 18 else n[:17] + "…" for n in names]
    turned = max(map(len, short)) * classes > 130
    turn: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(range(1, classes + 1), short, **turn)
    axes.set_xlabel(f"class, from the most training images ({counts.max():,}) to the fewest ({counts.min():,})")


def counts_backdrop(axes: "Axes", counts: np.ndarray) -> None:
    """Training images per class (C,), in the order given, as grey ground with a logarithmic axis on the right."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    backdrop = axes.twinx()
    backdrop.stairs(counts, np.arange(len(counts) + 1) + 0.5, baseline=0.8, fill=True, color=LIGHT, linewidth=0)
    backdrop.set_yscale("log")
    backdrop.set_ylim(0.8, counts.max() * 4)
    backdrop.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    backdrop.yaxis.set_minor_formatter(NullFormatter())
    backdrop.set_ylabel("training images per class", color=GREY)
    backdrop.grid(visible=False)
    backdrop.spines["right"].set_visible(True)
    axes.set_zorder(backdrop.get_zorder() + 1)
    axes.patch.set_visible(False)


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) to draw: every class, or means over neighbours where there are more than a figure can show."""
    rank = np.arange(1, len(values) + 1, dtype=float)
    if len(values) <= BINS:
        return rank, values
    groups = np.array_split(np.arange(len(values)), BINS)
    present = [values[g][~np.isnan(values[g])] for g in groups]
    return np.array([rank[g].mean() for g in groups]), np.array([k.mean() if len(k) else np.nan for k in present])
