"""The picture of `pipeline bench heads`: every head of every store less the recommended one, with intervals."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.report.chart import BLACK, BLUE, GREY
from pipeline.report.picture import png, style

COLUMNS = 4
LEAD = "recommended less this, all"


def heads_figure(document: Mapping[str, Any]) -> bytes:
    """Return a PNG with a panel for each store: accuracy on test of each head less that of the recommended one, in points.

    Heads are sorted by their mean over stores, the best first; lines are the paired 95 % intervals.

    Arguments:
        document: of the benchmark `heads`, as `pipeline bench heads --out` writes it.
    """
    stores = {
        measure["name"].removesuffix(", recommended"): measure["figures"]["rows"]
        for measure in document["measures"]
        if "rows" in measure["figures"]
    }
    columns = {name: {head_name(row): row[LEAD] for row in rows} for name, rows in stores.items()}
    heads = {head for column in columns.values() for head in column}
    means = {h: np.mean([-column[h]["difference"] for column in columns.values() if h in column]) for h in heads}
    order = sorted(heads, key=lambda head: -means[head])
    across, down = min(COLUMNS, len(columns)), math.ceil(len(columns) / COLUMNS)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style():
        height = down * (0.27 * len(order) + 0.9) + 0.3
        figure = Figure(figsize=(3.1 * across + 2.2, height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes in grid.flat[len(columns) :]:
            axes.set_axis_off()
        for axes, (name, column) in zip(grid.flat, columns.items(), strict=False):
            at = [i for i, head in enumerate(order) if head in column]
            leads = [column[order[i]] for i in at]
            axes.axvline(0, color=BLACK, linewidth=1)
            ends = [-lead["high"] for lead in leads], [-lead["low"] for lead in leads]
            axes.hlines(at, *ends, color=BLUE, linewidth=1.6)
            axes.plot([-lead["difference"] for lead in leads], at, "o", color=BLUE, markersize=4.5)
            axes.set_title(name)
            axes.set_yticks(range(len(order)), order)
            axes.set_ylim(len(order) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
        figure.supxlabel("All on test, less the recommended head (0), points", fontsize=11, color=GREY)
        return png(figure)


def head_name(row: Mapping[str, Any]) -> str:
    """Return the name of a head without the hyperparameters that differ from store to store; starts share one name."""
    name = str(row["head"]).split(", λ = ")[0].replace("scikit-learn, ", "scikit-learn's ")
    return "start (stage 1, probe)" if row["setting"] == "–" else name
