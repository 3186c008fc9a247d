"""Calibration: accuracy against confidence in the bins of ECE, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.longtail import GROUPS, group_index
from pipeline.metrics import confidence_bins, expected_calibration_error
from pipeline.report.chart import BLACK, GREY, chart, panel, panel_titles, plain, rounded, trace
from pipeline.report.confusion import head_names
from pipeline.report.drawing import AFTER, Drawing
from pipeline.report.predictions import Answers, ComparedAnswers
from pipeline.report.study import Row, Study, classes

STYLES: tuple[Row, Row] = (
    {"color": BLACK, "dash": "dot", "symbol": "square", "fill": "white"},
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
    titles = []
    for name, by_head in columns.items():
        size = int((group == GROUPS.index(name)).sum()) if name in GROUPS else 0
        titles.append(f"{f'predicted {name}: {classes(size)}' if size else 'all predictions'}\n{_summary(by_head)}")
    start_ece, selected_ece = (by_head.ece for by_head in columns["all"].values())
    title = f"Calibration error (ECE) on test: {start_ece:.1f} → {selected_ece:.1f} %"
    caption = (
        f"{title}. Accuracy (up) against confidence (across) in the bins that ECE has; test split, "
        f"{len(compared.start[0].labels):,} samples, clean view. On the grey diagonal both agree, below it a head believes "
        "too much. Larger marks stand for more predictions. Groups are those of the predicted class, which is what one knows "
        "of a new image. Below is how many predictions have which confidence. Bins hold all heads together, "
        f"ECE is the mean over {study.repeated}."
    )
    return Drawing("reliability", "Calibration", caption, _table(columns), _chart(columns, titles), title, 5.2)


def _summary(by_head: dict[str, Reliability]) -> str:
    """ECE and the number of predictions, before → after."""
    number = dict.fromkeys(f"{head.samples.sum() / head.heads:,.0f}" for head in by_head.values())
    return f"ECE {_ece(by_head)} %, n = {' → '.join(number)}"


def _ece(by_head: dict[str, Reliability]) -> str:
    return " → ".join("–" if np.isnan(head.ece) else f"{head.ece:.1f}" for head in by_head.values())


def _weights(bins: Reliability, by_head: dict[str, Reliability]) -> np.ndarray:
    """Return the sizes of the marks: the share of predictions in each bin, in % of the head with the most predictions."""
    most = max(head.samples.sum() / head.heads for head in by_head.values())
    return np.minimum(100 * bins.samples[bins.samples > 0] / bins.heads / max(most, 1), LARGEST_MARK)


def _chart(columns: dict[str, dict[str, Reliability]], titles: Sequence[str]) -> Row:
    """The curves, where hovering over a mark tells its bin, above the share of predictions in each bin."""
    traces: list[Row] = []
    axes: Row = {}
    for number, by_head in enumerate(columns.values(), 1):
        below = number + len(columns)
        even: Row = {"showlegend": False, "hoverinfo": "skip", **panel(number)}
        traces.append(trace("confidence = accuracy", [0, 100], [0, 100], {"color": GREY, "width": 1}, **even))
        for (name, bins), style in zip(by_head.items(), STYLES, strict=True):
            x, y = bins.points
            hover: Row = {
                "text": [f"{n:,} predictions" for n in bins.samples[bins.samples > 0].tolist()],
                "hovertemplate": "%{text}<br>confidence %{x:.1f} %, accuracy %{y:.1f} %<extra>%{fullData.name}</extra>",
            }
            only: Row = {"legendgroup": name, "showlegend": number == 1, "cliponaxis": False}
            line = trace(name, x, y, style, **hover, **only, **panel(number))
            size = 6 + 0.8 * _weights(bins, by_head)
            traces.append(line | {"marker": line["marker"] | {"size": plain(size), "opacity": 1}})
            places = (np.arange(len(bins.samples)) + 0.5) * 100 / len(bins.samples)
            share = trace(name, places, bins.share, style | {"symbol": None}, showlegend=False, **panel(below))
            traces.append(share | {"line": share["line"] | {"shape": "hvh"}, "legendgroup": name})
        ends: Row = {"range": [0, 104]}
        axes |= {f"xaxis{number}": ends, f"yaxis{number}": ends}
        axes |= {f"xaxis{below}": ends | {"title": "confidence [%]"}, f"yaxis{below}": {"rangemode": "tozero"}}
    axes[f"yaxis{len(columns) + 1}"]["title"] = "predictions [%]"
    first, notes = {"title": "accuracy at a confidence [%]", **axes.pop("yaxis1")}, panel_titles(titles)
    look: Row = {"height": 640, "heights": [2.6, 1], "annotations": notes}
    return chart(traces, x=axes.pop("xaxis1"), y=first, columns=len(columns), **axes, **look)


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
