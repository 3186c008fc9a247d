"""Which group the test samples of each group are taken for, before and after: where a head sends its mistakes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.longtail import BOUNDS, GROUPS, group_index
from pipeline.report import axes as look
from pipeline.report.axes import BLACK, BLUE, GREY, ORANGE
from pipeline.report.chart import bars, chart, plain, trace
from pipeline.report.drawing import Drawing, rounded
from pipeline.report.predictions import Answers, Compared
from pipeline.report.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALE = [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]]
WORST = 3  # confusions of each class that the CSV lists


def head_names(study: Study) -> tuple[str, str]:
    """What before and after are called."""
    after = str(study.first.selected) if len(set(study.selected)) == 1 else study.first.selected.without_lam.name()
    return study.start.removeprefix("the "), after


def group_confusion(predicted: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(3, 3) in %: row the true group, column the predicted one, mean over the classes of the true group.

    Classes without a sample are left out; nan in rows where no class is left.
    """
    group, number = group_index(counts), len(GROUPS)
    seen = np.bincount(labels * number + group[predicted], minlength=len(counts) * number).reshape(-1, number)
    total = seen.sum(1)
    share = 100 * seen / np.maximum(total, 1)[:, None]
    rows = [share[(group == g) & (total > 0)] for g in range(number)]
    return np.stack([row.mean(0) if len(row) else np.full(number, np.nan) for row in rows])


def frequent_confusions(of: Sequence[Answers], classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true class, predicted class, % of the true class's samples) of every wrong pair that occurs, the most frequent
    first; over all heads together.
    """
    labels = np.concatenate([answers.labels for answers in of])
    pairs, times = np.unique(
        labels * classes + np.concatenate([answers.predicted for answers in of]), return_counts=True
    )
    true, taken = np.divmod(pairs, classes)
    percent = 100 * times / np.bincount(labels, minlength=classes)[true]
    order = np.lexsort((taken, true, -percent))
    order = order[true[order] != taken[order]]
    return true[order], taken[order], percent[order]


def confusion_between_groups(study: Study, compared: Compared | None) -> Drawing | None:
    """Which group the samples of each group are taken for, and how many predictions each gets; None without answers."""
    if compared is None:
        return None
    counts, names = study.counts, head_names(study)
    heads = dict(zip(names, (compared.start, compared.selected), strict=True))
    matrices = {
        name: compared.mean(of, [group_confusion(a.predicted, a.labels, counts) for a in of])
        for name, of in heads.items()
    }
    known = [g for g in range(len(GROUPS)) if (group_index(counts) == g).any()]
    tested = np.unique(np.concatenate([a.labels for a in compared.start]))
    due = 100 * np.bincount(group_index(counts)[tested], minlength=len(GROUPS)) / len(tested)
    shares = {name: np.nansum(due[:, None] * matrix / 100, axis=0) for name, matrix in matrices.items()}

    figure = look.figure_of(11.5, 3.9)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=False):
        _matrix(axes, matrix[np.ix_(known, known)], [GROUPS[g] for g in known], name)
    panels[0].set_ylabel("true group")
    _shares(panels[2], {name: share[known] for name, share in shares.items()}, due[known], [GROUPS[g] for g in known])
    title = _title(matrices, known, names)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    look.legend(figure, panels)
    sizes = ", ".join(f"{GROUPS[g]} {BOUNDS[GROUPS[g]]} images ({study.classes_of(GROUPS[g])})" for g in known)
    caption = (
        f"{title}. Test split, {len(compared.start[0].labels):,} samples, clean view; % of the samples of a true group "
        "(row), mean over its classes, that a head takes for a class of each group (column); the diagonal holds wrong classes "
        "of the same group too. Right: the share of predictions that each group gets, every class counting the same, and the "
        f"share that is due to it. {sizes}. Mean over {study.repeated}. The CSV lists the {WORST} most frequent confusions of "
        "every class."
    )
    table = _table(study, heads, matrices, shares, due, known)
    shown = _chart(matrices, shares, due, known, table)
    return Drawing("confusion", "Confusion between groups", caption, figure, table, shown)


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
    matrices: dict[str, np.ndarray], shares: dict[str, np.ndarray], due: np.ndarray, known: list[int], table: list[Row]
) -> Row:
    """Both matrices and the shares; hovering over a cell tells the classes that are mistaken most often."""
    groups, traces = [GROUPS[g] for g in known], []
    for panel, (name, matrix) in enumerate(matrices.items(), 1):
        cells = matrix[np.ix_(known, known)]
        told = [[_pairs_of(table, name, true, taken) for taken in groups] for true in groups]
        on: Row = {"xaxis": f"x{panel}", "yaxis": f"y{panel}"} if panel > 1 else {}
        seen: Row = {"z": [plain(line) for line in cells], "x": groups, "y": groups, "text": told, "showscale": False}
        seen |= {"zmin": 0, "zmax": 100, "colorscale": SCALE, "texttemplate": "%{z:.1f}"}
        hover = "%{z:.1f} % of %{y} taken for %{x}%{text}<extra>" + plain([name])[0] + "</extra>"
        traces.append({"type": "heatmap", "name": plain([name])[0], "hovertemplate": hover, **seen, **on})
    third: Row = {"xaxis": "x3", "yaxis": "y3", "hovertemplate": "%{y:.1f} % of all predictions"}
    for (name, share), (color, pattern) in zip(shares.items(), ((BLACK, "/"), (BLUE, "")), strict=True):
        traces.append(bars(name, groups, share[known], color=color, pattern=pattern, **third))
    mark: Row = {"color": ORANGE, "linestyle": "none", "marker": "D", "markersize": 9}
    traces.append(trace("due to the group", groups, due[known], mark, **third))
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


def _pairs_of(table: list[Row], head: str, true: str, taken: str) -> str:
    """The most frequent confusions of classes between two groups, a line each."""
    wanted = {"row": "class", "head": head, "true_group": true, "predicted_group": taken}
    found = [row for row in table if wanted.items() <= row.items()]
    found = sorted(found, key=lambda row: -row["percent"])[:WORST]
    lines = plain([f"{row['percent']:.0f} % of {row['true']} as {row['predicted']}" for row in found])
    return "".join(f"<br>{line}" for line in lines)


def _title(matrices: dict[str, np.ndarray], known: Sequence[int], names: tuple[str, str]) -> str:
    """What becomes of the smallest group's samples."""
    least, most = known[-1], known[0]
    before, after = (matrices[name][least, most] for name in names)
    if least == most or np.isnan(before):
        return "All classes are of one group"
    kind = GROUPS[least].capitalize()
    return f"{kind}-shot test samples taken for {GROUPS[most]}-shot classes: {before:.0f} % → {after:.0f} %"


def _table(
    study: Study,
    heads: dict[str, Sequence[Answers]],
    matrices: dict[str, np.ndarray],
    shares: dict[str, np.ndarray],
    due: np.ndarray,
    known: Sequence[int],
) -> list[Row]:
    """Groups, shares and the most frequent confusions of every class, told apart by `row`."""
    table: list[Row] = []
    for name, matrix in matrices.items():
        for true in known:
            for taken in known:
                cell: Row = {"row": "group", "head": name, "true": GROUPS[true], "predicted": GROUPS[taken]}
                table.append(cell | {"percent": rounded(matrix[true, taken])})
    for name, share in shares.items():
        told = {"row": "share", "head": name, "true": None}
        table += [{**told, "predicted": GROUPS[g], "percent": rounded(share[g]), "due": rounded(due[g])} for g in known]
    counts, names, group = study.counts, study.first.store.class_names, group_index(study.counts)
    for name, of in heads.items():
        listed = np.zeros(len(counts), int)
        for true, taken, percent in zip(*frequent_confusions(of, len(counts)), strict=True):
            listed[true] += 1
            if listed[true] <= WORST:
                found: Row = {"row": "class", "head": name, "true": names[true], "predicted": names[taken]}
                found |= {"percent": rounded(percent), "true_group": GROUPS[group[true]]}
                found |= {"predicted_group": GROUPS[group[taken]], "true_images": int(counts[true])}
                table.append(found | {"predicted_images": int(counts[taken])})
    return table
