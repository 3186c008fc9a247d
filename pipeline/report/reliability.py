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
from pipeline.report.predictions import Answers, ComparedAnswers
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
    """Predictions of several heads, counted in equally wide bins of confidence.

    Arguments:
        heads: number of heads.
        samples: (bins,) predictions in each bin, over all heads.
        right: (bins,) correct predictions among them.
        sure: (bins,) sum of their confidences.
        ece: mean over the heads of their expected calibration error, in %.
    """

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
        filled = self.samples > 0
        return 100 * self.sure[filled] / self.samples[filled], 100 * self.right[filled] / self.samples[filled]


def reliability(
    compared: ComparedAnswers, answers: Sequence[Answers], groups: Sequence[np.ndarray] | None = None
) -> Reliability:
    """The bins of all predictions, or of those a mask (M,) for every head keeps."""
    masks = groups or [np.ones(len(head.labels), bool) for head in answers]
    bins = [confidence_bins(head.confidence[k], head.hit[k]) for head, k in zip(answers, masks, strict=True)]
    errors = [
        expected_calibration_error(head.confidence[k], head.hit[k]) if k.any() else np.nan
        for head, k in zip(answers, masks, strict=True)
    ]
    samples, right, sure = np.sum(bins, axis=0)
    return Reliability(len(answers), samples, right, sure, float(compared.mean(answers, errors)))


def reliability_diagram(study: Study, compared: ComparedAnswers | None) -> Drawing | None:
    """Accuracy against confidence, all predictions and those of classes of each group; None without answers."""
    if compared is None:
        return None
    group, heads = (
        group_index(study.counts),
        dict(zip(head_names(study), (compared.start, compared.selected), strict=True)),
    )
    columns: dict[str, dict[str, Reliability]] = {
        "all": {name: reliability(compared, answers) for name, answers in heads.items()}
    }
    for g, group_name in enumerate(GROUPS):
        if (group == g).any():
            columns[group_name] = {
                name: reliability(compared, answers, [group[a.predicted] == g for a in answers])
                for name, answers in heads.items()
            }
    figure = look.figure_of(2 + 2.9 * len(columns), 5.2)
    grid: Any = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False, height_ratios=(2.6, 1))
    for (group_name, by_head), curve, histogram in zip(columns.items(), *grid, strict=True):
        _curves(curve, by_head)
        _histogram(histogram, by_head)
        size = int((group == GROUPS.index(group_name)).sum()) if group_name in GROUPS else 0
        curve.set_title(
            f"{f'predicted {group_name}: {classes(size)}' if size else 'all predictions'}\n{_summary(by_head)}",
            fontsize=10.5,
        )
    grid[0, 0].set_ylabel("accuracy in the bin [%]")
    grid[1, 0].set_ylabel("predictions [%]")
    start_ece, selected_ece = (by_head.ece for by_head in columns["all"].values())
    title = f"Calibration error (ECE) on test: {start_ece:.1f} → {selected_ece:.1f} %"
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


def _summary(by_head: dict[str, Reliability]) -> str:
    """ECE and the number of predictions, before → after."""
    number = dict.fromkeys(f"{head.samples.sum() / head.heads:,.0f}" for head in by_head.values())
    return f"ECE {_ece(by_head)} %, n = {' → '.join(number)}"


def _ece(by_head: dict[str, Reliability]) -> str:
    return " → ".join("–" if np.isnan(head.ece) else f"{head.ece:.1f}" for head in by_head.values())


def _curves(axes: "Axes", by_head: dict[str, Reliability]) -> None:
    """Accuracy of every bin; a mark is the larger the more predictions it stands for."""
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, zorder=1)
    for (name, bins), style in zip(by_head.items(), STYLES, strict=True):
        x, y = bins.points
        axes.plot(x, y, linewidth=1.8, **style | {"marker": None})
        axes.plot([], [], linewidth=1.8, label=name, **style)  # for the legend: all marks of one size
        size = 12 + 6 * _weights(bins, by_head)
        face = style.get("markerfacecolor", style["color"])
        mark: Row = {"marker": style["marker"], "facecolor": face, "edgecolor": style["color"]}
        axes.scatter(x, y, size, zorder=3, clip_on=False, **mark)
    axes.set(xlim=(0, 100), ylim=(0, 103))


def _weights(bins: Reliability, by_head: dict[str, Reliability]) -> np.ndarray:
    """Return the sizes of the marks: the share of predictions in each bin, in % of the head with the most predictions."""
    most = max(head.samples.sum() / head.heads for head in by_head.values())
    return np.minimum(100 * bins.samples[bins.samples > 0] / bins.heads / max(most, 1), LARGEST_MARK)


def _histogram(axes: "Axes", by_head: dict[str, Reliability]) -> None:
    """Share of the predictions in each bin, after as ground and before as outline."""
    start_bins, selected_bins = by_head.values()
    edges = np.linspace(0, 100, len(start_bins.samples) + 1)
    axes.stairs(selected_bins.share, edges, fill=True, color=SKY, edgecolor=BLUE, linewidth=1)
    axes.stairs(start_bins.share, edges, color=BLACK, linewidth=1.6, linestyle=":")
    axes.set_xlabel("confidence [%]")


def _chart(columns: dict[str, dict[str, Reliability]]) -> Row:
    """The curves; hovering over a mark tells its bin."""
    traces: list[Row] = []
    axes: Row = {}
    for panel, (group_name, by_head) in enumerate(columns.items(), 1):
        at: Row = {"xaxis": f"x{panel}", "yaxis": f"y{panel}"} if panel > 1 else {}
        even: Row = {"showlegend": False, "hoverinfo": "skip", **at}
        traces.append(trace("confidence = accuracy", [0, 100], [0, 100], {"color": GREY, "linewidth": 1}, **even))
        for (name, bins), style in zip(by_head.items(), STYLES, strict=True):
            x, y = bins.points
            hover: Row = {
                "text": [f"{n:,} predictions" for n in bins.samples[bins.samples > 0].tolist()],
                "hovertemplate": "%{text}<br>confidence %{x:.1f} %, accuracy %{y:.1f} %<extra>%{fullData.name}</extra>",
            }
            only: Row = {"legendgroup": name, "showlegend": panel == 1, "cliponaxis": False}
            line = trace(name, x, y, style, **hover, **only, **at)
            size = 6 + 0.8 * _weights(bins, by_head)
            traces.append(line | {"marker": line["marker"] | {"size": plain(size), "opacity": 1}})
        predictions = "all predictions" if group_name == "all" else f"predicted {group_name}"
        ends: Row = {"range": [0, 104]}
        title = f"{predictions}<br>ECE {_ece(by_head)} %"
        axes |= {f"xaxis{panel}": ends | {"title": {"text": title}}, f"yaxis{panel}": ends}
    first = {"title": "accuracy at a confidence [%]", **axes.pop("yaxis1")}
    grid = {"rows": 1, "columns": len(columns), "pattern": "independent"}
    return chart(traces, x=axes.pop("xaxis1"), y=first, grid=grid, **axes)


def _table(columns: dict[str, dict[str, Reliability]]) -> list[Row]:
    """A row a bin, and for every panel and head one with its ECE."""
    table: list[Row] = []
    for group_name, by_head in columns.items():
        for name, bins in by_head.items():
            line: Row = {"predicted": group_name, "head": name}
            table.append(
                line | {"from": None, "to": None, "samples": int(bins.samples.sum()), "ece": rounded(bins.ece)}
            )
            edges = np.linspace(0, 100, len(bins.samples) + 1)
            for i, samples in enumerate(bins.samples):
                mean = [rounded(100 * total[i] / samples) if samples else None for total in (bins.sure, bins.right)]
                table.append(
                    line
                    | {"from": rounded(edges[i]), "to": rounded(edges[i + 1]), "samples": int(samples)}
                    | {"confidence": mean[0], "accuracy": mean[1]}
                )
    return table
