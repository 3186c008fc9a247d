"""Which group the test samples of each group are taken for, before and after: where a head sends its mistakes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.metrics import GROUPS, class_groups
from pipeline.report import axes as look
from pipeline.report.answers import Answers, Compared
from pipeline.report.axes import BLACK, BLUE, GREY, ORANGE
from pipeline.report.drawing import Drawing, rounded
from pipeline.report.source import BOUNDS, Row, Study, classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST = 3  # confusions of each class that the CSV lists


def head_names(study: Study) -> tuple[str, str]:
    """What before and after are called."""
    after = str(study.first.selected) if len(set(study.selected)) == 1 else study.first.selected.method_name
    return study.start.removeprefix("the "), after


def group_of(counts: np.ndarray) -> np.ndarray:
    """(C,) the number of each class's group in GROUPS."""
    return np.argmax(np.stack(list(class_groups(counts).values())), axis=0)


def group_confusion(predicted: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(3, 3) in %: row the true group, column the predicted one, mean over the classes of the true group.

    Classes without a sample are left out; nan in rows where no class is left.
    """
    group, number = group_of(counts), len(GROUPS)
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
    heads = dict(zip(names, (compared.before, compared.after), strict=True))
    matrices = {
        name: compared.mean(of, [group_confusion(a.predicted, a.labels, counts) for a in of])
        for name, of in heads.items()
    }
    known = [g for g in range(len(GROUPS)) if (group_of(counts) == g).any()]
    tested = np.unique(np.concatenate([a.labels for a in compared.before]))
    due = 100 * np.bincount(group_of(counts)[tested], minlength=len(GROUPS)) / len(tested)
    shares = {name: np.nansum(due[:, None] * matrix / 100, axis=0) for name, matrix in matrices.items()}

    figure = look.figure_of(11.5, 3.9)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=False):
        _matrix(axes, matrix[np.ix_(known, known)], [GROUPS[g] for g in known], name)
    panels[0].set_ylabel("true group")
    _shares(panels[2], {name: share[known] for name, share in shares.items()}, due[known], [GROUPS[g] for g in known])
    figure.suptitle(_title(matrices, known, names), x=0.01, ha="left", fontsize=13)
    look.legend(figure, panels)
    sizes = ", ".join(
        f"{GROUPS[g]} {BOUNDS[GROUPS[g]]} images ({classes(int((group_of(counts) == g).sum()))})" for g in known
    )
    caption = (
        f"Test split, {len(compared.before[0].labels):,} samples, clean view; % of the samples of a true group (row), mean over "
        f"its classes, that a head takes for a class of each group (column); the diagonal holds wrong classes of the same group "
        f"too. Right: the share of predictions that each group gets, every class counting the same, and the share that is due "
        f"to it. {sizes}. Mean over {study.repeated}. The CSV lists the {WORST} most frequent confusions of every class."
    )
    table = _table(study, heads, matrices, shares, due, known)
    return Drawing("confusion", "Which group is taken for which", caption, figure, table)


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
    counts, names, group = study.counts, study.first.store.class_names, group_of(study.counts)
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
