"""Which group the test samples of each group are taken for, before and after: where a head sends its mistakes."""

from collections.abc import Sequence

import numpy as np

from pipeline.longtail import BOUNDS, GROUPS, group_index
from pipeline.report.chart import BLACK, BLUE, ORANGE, bars, chart, panel, panel_titles, plain, rounded, trace
from pipeline.report.drawing import Drawing
from pipeline.report.predictions import Answers, ComparedAnswers
from pipeline.report.study import Row, Study

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

    title = _title(matrices, present, names)
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
    return Drawing("confusion", "Confusion between groups", caption, table, interactive, title, 3.9)


def _chart(
    matrices: dict[str, np.ndarray],
    shares: dict[str, np.ndarray],
    due: np.ndarray,
    present: list[int],
    table: list[Row],
) -> Row:
    """Both matrices and the shares; hovering over a cell tells the classes that are mistaken most often."""
    groups, traces = [GROUPS[g] for g in present], []
    for number, (name, matrix) in enumerate(matrices.items(), 1):
        cells = matrix[np.ix_(present, present)]
        hover_texts = [[_pairs_of(table, name, true, predicted) for predicted in groups] for true in groups]
        heat: Row = {
            "z": [plain(line) for line in cells],
            "x": groups,
            "y": groups,
            "text": hover_texts,
            "showscale": False,
        }
        heat |= {"zmin": 0, "zmax": 100, "colorscale": SCALE, "texttemplate": "%{z:.1f}"}
        hover = "%{z:.1f} % of %{y} taken for %{x}%{text}<extra>" + plain([name])[0] + "</extra>"
        traces.append({"type": "heatmap", "name": plain([name])[0], "hovertemplate": hover, **heat, **panel(number)})
    third: Row = panel(3) | {"hovertemplate": "%{y:.1f} % of all predictions"}
    for (name, share), (color, pattern) in zip(shares.items(), ((BLACK, "/"), (BLUE, "")), strict=True):
        texts: Row = {"text": [f"{value:.0f}" for value in share[present]], "textposition": "outside"}
        traces.append(bars(name, groups, share[present], color=color, pattern=pattern, **texts, **third))
    mark: Row = {"color": ORANGE, "dash": "none", "symbol": "diamond", "size": 9}
    traces.append(trace("due to the group", groups, due[present], mark, **third))
    upside_down: Row = {"autorange": "reversed", "showgrid": False}
    predicted_group: Row = {"title": "predicted group", "showgrid": False}
    return chart(
        traces,
        x=predicted_group,
        y=upside_down | {"title": {"text": "true group", "standoff": 10}},
        xaxis2=predicted_group,
        yaxis2=upside_down,
        xaxis3=predicted_group,
        yaxis3={"title": "share of all predictions [%]", "rangemode": "tozero"},
        columns=3,
        annotations=panel_titles([*matrices, "Share of all predictions"]),
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
