"""Calibration: accuracy against confidence in the bins of ECE, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.longtail import GROUPS, group_index
from pipeline.metrics import confidence_bins, expected_calibration_error
from pipeline.report import axes as look
from pipeline.report.axes import BLACK, BLUE, GREY, SKY
from pipeline.report.chart import chart, plain, trace
from pipeline.report.confusion import head_names
from pipeline.report.drawing import AFTER, Drawing, rounded
from pipeline.report.predictions import Answers, Compared
from pipeline.report.study import Row, Study, classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES: tuple[Row, Row] = (
    {"color": BLACK, "linestyle": ":", "marker": "s", "markerfacecolor": "white"},
    AFTER,
)
LARGEST_MARK = 25  # % of the predictions


@dataclass(frozen=True, eq=False)
class Reliability:
    """Bins of several heads together, each (bins,); ece in %: the mean of their own."""

    heads: int
    samples: np.ndarray
    right: np.ndarray
    sure: np.ndarray
    ece: float

    @property
    def share(self) -> np.ndarray:
        """% of the predictions that lie in each bin."""
        return 100 * self.samples / max(self.samples.sum(), 1)

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean confidence, accuracy) in % of the bins that are not empty."""
        known = self.samples > 0
        return 100 * self.sure[known] / self.samples[known], 100 * self.right[known] / self.samples[known]


def reliability(compared: Compared, of: Sequence[Answers], groups: Sequence[np.ndarray] | None = None) -> Reliability:
    """The bins of all predictions, or of those a mask (M,) for every head keeps."""
    kept = groups or [np.ones(len(a.labels), bool) for a in of]
    bins = [confidence_bins(a.confidence[k], a.hit[k]) for a, k in zip(of, kept, strict=True)]
    each = [
        expected_calibration_error(a.confidence[k], a.hit[k]) if k.any() else np.nan
        for a, k in zip(of, kept, strict=True)
    ]
    samples, right, sure = np.sum(bins, axis=0)
    return Reliability(len(of), samples, right, sure, float(compared.mean(of, each)))


def reliability_diagram(study: Study, compared: Compared | None) -> Drawing | None:
    """Accuracy against confidence, all predictions and those of classes of each group; None without answers."""
    if compared is None:
        return None
    group, heads = (
        group_index(study.counts),
        dict(zip(head_names(study), (compared.start, compared.selected), strict=True)),
    )
    columns: dict[str, dict[str, Reliability]] = {
        "all": {name: reliability(compared, of) for name, of in heads.items()}
    }
    for g, called in enumerate(GROUPS):
        if (group == g).any():
            columns[called] = {
                name: reliability(compared, of, [group[a.predicted] == g for a in of]) for name, of in heads.items()
            }
    figure = look.figure_of(2 + 2.9 * len(columns), 5.2)
    grid: Any = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False, height_ratios=(2.6, 1))
    for (called, found), curve, histogram in zip(columns.items(), *grid, strict=True):
        _curves(curve, found)
        _histogram(histogram, found)
        size = int((group == GROUPS.index(called)).sum()) if called in GROUPS else 0
        curve.set_title(
            f"{f'predicted {called}: {classes(size)}' if size else 'all predictions'}\n{_told(found)}", fontsize=10.5
        )
    grid[0, 0].set_ylabel("accuracy in the bin [%]")
    grid[1, 0].set_ylabel("predictions [%]")
    before, after = (found.ece for found in columns["all"].values())
    title = f"Calibration error (ECE) on test: {before:.1f} → {after:.1f} %"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    look.legend(figure, grid[:1])
    caption = (
        f"{title}. Accuracy (up) against confidence (across) in the bins that ECE has; test split, "
        f"{len(compared.start[0].labels):,} samples, clean view. On the grey diagonal both agree, below it a head believes "
        "too much. Larger marks stand for more predictions. Groups are those of the predicted class, which is what one knows "
        "of a new image. The picture shows below how many predictions have which confidence. Bins hold all heads together, "
        f"ECE is the mean over {study.repeated}."
    )
    table = _table(columns)
    return Drawing("reliability", "Calibration", caption, figure, table, _chart(columns))


def _told(found: dict[str, Reliability]) -> str:
    """ECE and the number of predictions, before → after."""
    number = dict.fromkeys(f"{of.samples.sum() / of.heads:,.0f}" for of in found.values())
    return f"ECE {_ece(found)} %, n = {' → '.join(number)}"


def _ece(found: dict[str, Reliability]) -> str:
    return " → ".join("–" if np.isnan(of.ece) else f"{of.ece:.1f}" for of in found.values())


def _curves(axes: "Axes", found: dict[str, Reliability]) -> None:
    """Accuracy of every bin; a mark is the larger the more predictions it stands for."""
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, zorder=1)
    for (name, of), style in zip(found.items(), STYLES, strict=True):
        x, y = of.points
        axes.plot(x, y, linewidth=1.8, **style | {"marker": None})
        axes.plot([], [], linewidth=1.8, label=name, **style)  # for the legend: all marks of one size
        size = 12 + 6 * _weights(of, found)
        face = style.get("markerfacecolor", style["color"])
        mark: Row = {"marker": style["marker"], "facecolor": face, "edgecolor": style["color"]}
        axes.scatter(x, y, size, zorder=3, clip_on=False, **mark)
    axes.set(xlim=(0, 100), ylim=(0, 103))


def _weights(of: Reliability, found: dict[str, Reliability]) -> np.ndarray:
    """How large the marks are, by predictions in the bin: in % of those of the head that has most of them in this panel."""
    most = max(head.samples.sum() / head.heads for head in found.values())
    return np.minimum(100 * of.samples[of.samples > 0] / of.heads / max(most, 1), LARGEST_MARK)


def _histogram(axes: "Axes", found: dict[str, Reliability]) -> None:
    """Share of the predictions in each bin, after as ground and before as outline."""
    before, after = found.values()
    edges = np.linspace(0, 100, len(before.samples) + 1)
    axes.stairs(after.share, edges, fill=True, color=SKY, edgecolor=BLUE, linewidth=1)
    axes.stairs(before.share, edges, color=BLACK, linewidth=1.6, linestyle=":")
    axes.set_xlabel("confidence [%]")


def _chart(columns: dict[str, dict[str, Reliability]]) -> Row:
    """The curves; hovering over a mark tells its bin."""
    traces: list[Row] = []
    axes: Row = {}
    for panel, (called, found) in enumerate(columns.items(), 1):
        at: Row = {"xaxis": f"x{panel}", "yaxis": f"y{panel}"} if panel > 1 else {}
        even: Row = {"showlegend": False, "hoverinfo": "skip", **at}
        traces.append(trace("confidence = accuracy", [0, 100], [0, 100], {"color": GREY, "linewidth": 1}, **even))
        for (name, of), style in zip(found.items(), STYLES, strict=True):
            x, y = of.points
            told: Row = {
                "text": [f"{n:,} predictions" for n in of.samples[of.samples > 0].tolist()],
                "hovertemplate": "%{text}<br>confidence %{x:.1f} %, accuracy %{y:.1f} %<extra>%{fullData.name}</extra>",
            }
            only: Row = {"legendgroup": name, "showlegend": panel == 1, "cliponaxis": False}
            line = trace(name, x, y, style, **told, **only, **at)
            size = 6 + 0.8 * _weights(of, found)
            traces.append(line | {"marker": line["marker"] | {"size": plain(size), "opacity": 1}})
        which = "all predictions" if called == "all" else f"predicted {called}"
        ends: Row = {"range": [0, 104]}
        title = f"{which}<br>ECE {_ece(found)} %"
        axes |= {f"xaxis{panel}": ends | {"title": {"text": title}}, f"yaxis{panel}": ends}
    first = {"title": "accuracy at a confidence [%]", **axes.pop("yaxis1")}
    grid = {"rows": 1, "columns": len(columns), "pattern": "independent"}
    return chart(traces, x=axes.pop("xaxis1"), y=first, grid=grid, **axes)


def _table(columns: dict[str, dict[str, Reliability]]) -> list[Row]:
    """A row a bin, and for every panel and head one with its ECE."""
    table: list[Row] = []
    for called, found in columns.items():
        for name, of in found.items():
            line: Row = {"predicted": called, "head": name}
            table.append(line | {"from": None, "to": None, "samples": int(of.samples.sum()), "ece": rounded(of.ece)})
            edges = np.linspace(0, 100, len(of.samples) + 1)
            for i, samples in enumerate(of.samples):
                mean = [rounded(100 * total[i] / samples) if samples else None for total in (of.sure, of.right)]
                table.append(
                    line
                    | {"from": rounded(edges[i]), "to": rounded(edges[i + 1]), "samples": int(samples)}
                    | {"confidence": mean[0], "accuracy": mean[1]}
                )
    return table
