"""Which group the test samples of each group are taken for, before and after: where a head sends its mistakes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.longtail import BOUNDS, GROUPS, group_index
from pipeline.report import axes as look
from pipeline.report.axes import BLACK, BLUE, GREY, ORANGE
from pipeline.report.chart import bars, chart, plain, trace
from pipeline.report.drawing import Drawing, rounded
from pipeline.report.predictions import Answers, ComparedAnswers
from pipeline.report.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALE = [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]]
WORST = 3  # confusions of each class that the CSV lists


def head_names(study: Study) -> tuple[str, str]:
    """Return the printed names of the head before stage 2 and of the selected one."""
    selected_name = (
        str(study.first.selected) if len(set(study.selected)) == 1 else study.first.selected.without_lam.name()
    )
    return study.start.removeprefix("the "), selected_name


def group_confusion(predicted: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(3, 3) in %: row the true group, column the predicted one, mean over the classes of the true group.

    Classes without a sample are left out; nan in rows where no class is left.
    """
    group, number = group_index(counts), len(GROUPS)
    hits = np.bincount(labels * number + group[predicted], minlength=len(counts) * number).reshape(-1, number)
    total = hits.sum(1)
    share = 100 * hits / np.maximum(total, 1)[:, None]
    rows = [share[(group == g) & (total > 0)] for g in range(number)]
    return np.stack([row.mean(0) if len(row) else np.full(number, np.nan) for row in rows])


def frequent_confusions(heads: Sequence[Answers], classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true class, predicted class, % of the true class's samples) of every wrong pair that occurs, the most frequent
    first; over all heads together.
    """
    labels = np.concatenate([answers.labels for answers in heads])
    pairs, times = np.unique(
        labels * classes + np.concatenate([answers.predicted for answers in heads]), return_counts=True
    )
    true, predicted = np.divmod(pairs, classes)
    percent = 100 * times / np.bincount(labels, minlength=classes)[true]
    order = np.lexsort((predicted, true, -percent))
    order = order[true[order] != predicted[order]]
    return true[order], predicted[order], percent[order]


def confusion_between_groups(study: Study, compared: ComparedAnswers | None) -> Drawing | None:
    """Which group the samples of each group are taken for, and how many predictions each gets; None without answers."""
    if compared is None:
        return None
    counts, names = study.counts, head_names(study)
    heads = dict(zip(names, (compared.start, compared.selected), strict=True))
    matrices = {
        name: compared.mean(answers, [group_confusion(a.predicted, a.labels, counts) for a in answers])
        for name, answers in heads.items()
    }
    present = [g for g in range(len(GROUPS)) if (group_index(counts) == g).any()]
    tested = np.unique(np.concatenate([a.labels for a in compared.start]))
    due = 100 * np.bincount(group_index(counts)[tested], minlength=len(GROUPS)) / len(tested)
    shares = {name: np.nansum(due[:, None] * matrix / 100, axis=0) for name, matrix in matrices.items()}

    figure = look.figure_of(11.5, 3.9)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=False):
        _matrix(axes, matrix[np.ix_(present, present)], [GROUPS[g] for g in present], name)
    panels[0].set_ylabel("true group")
    _shares(
        panels[2], {name: share[present] for name, share in shares.items()}, due[present], [GROUPS[g] for g in present]
    )
    title = _title(matrices, present, names)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    look.legend(figure, panels)
    sizes = ", ".join(f"{GROUPS[g]} {BOUNDS[GROUPS[g]]} images ({study.classes_of(GROUPS[g])})" for g in present)
    caption = (
        f"{title}. Test split, {len(compared.start[0].labels):,} samples, clean view; % of the samples of a true group "
        "(row), mean over its classes, that a head takes for a class of each group (column); the diagonal holds wrong classes "
        "of the same group too. Right: the share of predictions that each group gets, every class counting the same, and the "
        f"share that is due to it. {sizes}. Mean over {study.repeated}. The CSV lists the {WORST} most frequent confusions of "
        "every class."
    )
    table = _table(study, heads, matrices, shares, due, present)
    interactive = _chart(matrices, shares, due, present, table)
    return Drawing("confusion", "Confusion between groups", caption, figure, table, interactive)


def _matrix(axes: "Axes", matrix: np.ndarray, groups: Sequence[str], name: str) -> None:
    """Shaded cells with their numbers; dark ones have white letters."""
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        text = "–" if np.isnan(value) else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if value > 55 else BLACK, fontsize=13)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_yticks(range(len(groups)), groups)
    axes.grid(visible=False)
    axes.set(title=name, xlabel="predicted group")


def _shares(axes: "Axes", shares: dict[str, np.ndarray], due: np.ndarray, groups: Sequence[str]) -> None:
    """Bars of what each group gets, before and after, and a mark at what is due to it."""
    place, width = np.arange(len(groups)), 0.38
    room = 0.02 * max(due.max(), *(share.max() for share in shares.values()))
    looks: list[Row] = [{"color": "white", "edgecolor": BLACK, "hatch": "////"}, {"color": BLUE, "edgecolor": BLUE}]
    for offset, (name, share), bar in zip((-width / 2, width / 2), shares.items(), looks, strict=True):
        axes.bar(place + offset, share, width, label=name, linewidth=0.8, **bar)
        for x, height, mark in zip(place + offset, share, due, strict=True):
            above = max(height, mark) if -room < mark - height < 5 * room else height  # the mark would cross the number
            axes.text(x, above + room, f"{height:.0f}", ha="center", va="bottom", fontsize=10, color=GREY)
    axes.hlines(due, place - width - 0.06, place + width + 0.06, color=ORANGE, linewidth=3.5, label="due to the group")
    axes.set_xticks(place, groups)
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.set(title="Share of all predictions", ylabel="%", xlabel="predicted group")


def _chart(
    matrices: dict[str, np.ndarray],
    shares: dict[str, np.ndarray],
    due: np.ndarray,
    present: list[int],
    table: list[Row],
) -> Row:
    """Both matrices and the shares; hovering over a cell tells the classes that are mistaken most often."""
    groups, traces = [GROUPS[g] for g in present], []
    for panel, (name, matrix) in enumerate(matrices.items(), 1):
        cells = matrix[np.ix_(present, present)]
        hover_texts = [[_pairs_of(table, name, true, predicted) for predicted in groups] for true in groups]
        on: Row = {"xaxis": f"x{panel}", "yaxis": f"y{panel}"} if panel > 1 else {}
        heat: Row = {
            "z": [plain(line) for line in cells],
            "x": groups,
            "y": groups,
            "text": hover_texts,
            "showscale": False,
        }
        heat |= {"zmin": 0, "zmax": 100, "colorscale": SCALE, "texttemplate": "%{z:.1f}"}
        hover = "%{z:.1f} % of %{y} taken for %{x}%{text}<extra>" + plain([name])[0] + "</extra>"
        traces.append({"type": "heatmap", "name": plain([name])[0], "hovertemplate": hover, **heat, **on})
    third: Row = {"xaxis": "x3", "yaxis": "y3", "hovertemplate": "%{y:.1f} % of all predictions"}
    for (name, share), (color, pattern) in zip(shares.items(), ((BLACK, "/"), (BLUE, "")), strict=True):
        traces.append(bars(name, groups, share[present], color=color, pattern=pattern, **third))
    mark: Row = {"color": ORANGE, "linestyle": "none", "marker": "D", "markersize": 9}
    traces.append(trace("due to the group", groups, due[present], mark, **third))
    upside_down: Row = {"autorange": "reversed", "showgrid": False}
    return chart(
        traces,
        x=f"predicted group: {next(iter(matrices))}",
        y=upside_down | {"title": {"text": "true group", "standoff": 10}},
        xaxis2={"title": f"predicted group: {list(matrices)[1]}"},
        yaxis2=upside_down | {"showticklabels": False},
        xaxis3={"title": "predicted group"},
        yaxis3={"title": "share of all predictions [%]", "rangemode": "tozero"},
        grid={"rows": 1, "columns": 3, "pattern": "independent"},
    )


def _pairs_of(table: list[Row], head: str, true: str, predicted: str) -> str:
    """The most frequent confusions of classes between two groups, a line each."""
    keys = {"row": "class", "head": head, "true_group": true, "predicted_group": predicted}
    rows = [row for row in table if keys.items() <= row.items()]
    rows = sorted(rows, key=lambda row: -row["percent"])[:WORST]
    lines = plain([f"{row['percent']:.0f} % of {row['true']} as {row['predicted']}" for row in rows])
    return "".join(f"<br>{line}" for line in lines)


def _title(matrices: dict[str, np.ndarray], present: Sequence[int], names: tuple[str, str]) -> str:
    """Return the title: how often few-shot samples are predicted as many-shot classes."""
    smallest, largest = present[-1], present[0]
    start_percent, selected_percent = (matrices[name][smallest, largest] for name in names)
    if smallest == largest or np.isnan(start_percent):
        return "All classes are of one group"
    kind = GROUPS[smallest].capitalize()
    return f"{kind}-shot test samples taken for {GROUPS[largest]}-shot classes: {start_percent:.0f} % → {selected_percent:.0f} %"


def _table(
    study: Study,
    heads: dict[str, Sequence[Answers]],
    matrices: dict[str, np.ndarray],
    shares: dict[str, np.ndarray],
    due: np.ndarray,
    present: Sequence[int],
) -> list[Row]:
    """Groups, shares and the most frequent confusions of every class, told apart by `row`."""
    table: list[Row] = []
    for name, matrix in matrices.items():
        for true in present:
            for predicted in present:
                cell: Row = {"row": "group", "head": name, "true": GROUPS[true], "predicted": GROUPS[predicted]}
                table.append(cell | {"percent": rounded(matrix[true, predicted])})
    for name, share in shares.items():
        share_row = {"row": "share", "head": name, "true": None}
        table += [
            {**share_row, "predicted": GROUPS[g], "percent": rounded(share[g]), "due": rounded(due[g])} for g in present
        ]
    counts, names, group = study.counts, study.first.store.class_names, group_index(study.counts)
    for name, answers in heads.items():
        listed_pairs = np.zeros(len(counts), int)
        for true, predicted, percent in zip(*frequent_confusions(answers, len(counts)), strict=True):
            listed_pairs[true] += 1
            if listed_pairs[true] <= WORST:
                row: Row = {"row": "class", "head": name, "true": names[true], "predicted": names[predicted]}
                row |= {"percent": rounded(percent), "true_group": GROUPS[group[true]]}
                row |= {"predicted_group": GROUPS[group[predicted]], "true_images": int(counts[true])}
                table.append(row | {"predicted_images": int(counts[predicted])})
    return table
