"""The figures of a report. Each function returns a figure, its caption and the table it shows; none touches a file."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.longtail import BOUNDS, GROUPS, class_groups
from pipeline.report import axes as look
from pipeline.report.axes import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY
from pipeline.report.chart import bars, chart, class_axis, trace
from pipeline.report.confusion import confusion_between_groups
from pipeline.report.drawing import AFTER, ALONE, BEFORE, ZERO, Drawing, class_table, rounded
from pipeline.report.explorer import lambda_chart
from pipeline.report.geometry import feature_geometry
from pipeline.report.norms import norm_against_size, weight_norms
from pipeline.report.predictions import read_compared
from pipeline.report.reliability import reliability_diagram
from pipeline.report.study import COLUMNS, SPLITS, Row, Study, signed
from pipeline.results.head_id import BASELINE
from pipeline.results.mean_std import MeanStd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROW = 0.18  # share of the classes below which a group has no room for its full label


def draw_all(study: Study) -> list[Drawing]:
    """Every figure there is data for, in the order of the page."""
    with look.style():
        compared = read_compared(study)
        drawings = [
            accuracy_against_lambda(study),
            weight_norms(study),
            norm_against_size(study),
            class_change(study),
            confusion_between_groups(study, compared),
            reliability_diagram(study, compared),
            feature_geometry([study]),
            training_curves(study),
        ]
    return [d for d in drawings if d is not None]


def accuracy_against_lambda(study: Study) -> Drawing | None:
    """Accuracy of every group against λ: validation, which chose, above test, which did not; None without any λ."""
    if not study.lams:
        return None
    splits = [s for s in (study.choosing_split, "test") if study.has_split(s)]
    columns = [c for c in COLUMNS if any(r.get(c) is not None for r in study.first.rows)]
    figure = look.figure_of(2 + 3 * len(columns), 1.2 + 2.9 * len(splits))
    grid: Any = figure.subplots(len(splits), len(columns), sharex=True, sharey="col", squeeze=False)
    table: list[Row] = []
    for split, line in zip(splits, grid, strict=True):
        for column, axes in zip(columns, line, strict=True):
            table += _lambda_panel(axes, study, split, column)
            look.lambda_axis(axes, study.lams)
        line[0].set_ylabel(f"{SPLITS[split]}{' (not selected on)' if split == 'test' else ''}\naccuracy [%]")
    for column, top, bottom in zip(columns, grid[0], grid[-1], strict=True):
        top.set_title(_columns_title(column, study))
        bottom.set_xlabel("λ, scale of the target norms")
    look.legend(figure, grid)
    figure.suptitle(_gain(study), x=0.01, ha="left", fontsize=13)
    kind = study.at(0.0)
    basis = f"The star marks the λ chosen on {SPLITS[study.choosing_split]} alone"
    zero = sum(k.lam == 0 for k in study.selected)
    if not study.chosen_on:
        basis = "One λ was given, so nothing was chosen"
    elif zero:
        by = f" by {zero} of {len(study.backbones)} backbones" if len(study.backbones) > 1 else ""
        basis += f"; λ = 0, the dash-dotted line, was chosen{by}"
    caption = (
        f"{kind.without_lam.name()}; mean ± one standard deviation over {study.repeated}. {basis}; "
        "test was evaluated afterwards and selected nothing."
    )
    return Drawing("accuracy-lambda", "Accuracy against λ", caption, figure, table, lambda_chart(study, table))


def _lambda_panel(axes: "Axes", study: Study, split: str, column: str) -> list[Row]:
    """Draws one group on one split; the numbers drawn."""
    table = []
    start = study.start.removeprefix("the ")
    references = ((BASELINE, BEFORE), (study.first.loss_only, ALONE), (study.at(0.0), ZERO))
    for label, kind, style in [(head.name(start), head, style) for head, style in references]:
        value = study.spread(kind, split, column)
        if value is not None and value.mean is not None:
            axes.axhline(value.mean, label=label, linewidth=1.6, **style)
            table.append(_numbers(split, column, label, kind.lam, value))
    spreads = {lam: s for lam in study.lams if (s := study.spread(study.at(lam), split, column)) and s.mean is not None}
    if not spreads:
        axes.text(0.5, 0.5, "no sample", transform=axes.transAxes, ha="center", color=GREY)
        return table
    x, y = np.array(list(spreads)), np.array([s.mean for s in spreads.values()], dtype=float)
    error = np.array([s.std or 0.0 for s in spreads.values()])
    name = study.at(0.0).without_lam.name()
    if len(x) > 1:
        axes.fill_between(x, y - error, y + error, color=SKY, alpha=0.35, linewidth=0)
        axes.plot(x, y, label=name, linewidth=2, markersize=5, **AFTER)
    else:
        axes.errorbar(x, y, error if error.any() else None, label=name, markersize=7, capsize=4, **AFTER)
    if study.chosen_on:
        for lam in sorted({k.lam for k in study.selected if k.lam in spreads}):
            star: Row = {"markersize": 17, "markeredgecolor": BLACK, "color": ORANGE, "zorder": 5, "linestyle": "none"}
            label = f"chosen on {SPLITS[study.choosing_split]}"
            axes.plot([lam], [y[list(spreads).index(lam)]], marker="*", label=label, **star)
    return table + [_numbers(split, column, name, lam, s) for lam, s in spreads.items()]


def class_change(study: Study) -> Drawing | None:
    """Test accuracy of every class less what stage 2 started from, largest class first; None where nobody measured it."""
    reference = [b.class_accuracy(BASELINE, "test") for b in study.backbones]
    selected = [b.class_accuracy(b.selected, "test") for b in study.backbones]
    if any(v is None for v in (*reference, *selected)):
        return None
    first, last = np.mean(np.array(reference), 0), np.mean(np.array(selected), 0)
    table = class_table(study)
    for row in table:
        a, b = first[row["class"]], last[row["class"]]
        row |= {study.start.removeprefix("the "): rounded(a), "selected": rounded(b), "change": rounded(b - a)}
    order = study.by_size
    change = (last - first)[order]
    figure = look.figure_of(11.5, 4.6)
    axes = figure.subplots()
    x, y = look.thinned(change)
    width = 0.85 * (x[1] - x[0] if len(x) > 1 else 1)
    up = np.nan_to_num(y) >= 0
    worse: Row = {
        "color": "white",
        "edgecolor": RED,
        "hatch": "////",
        "linewidth": 0.8,
        "label": f"worse than {study.start}",
    }
    axes.bar(x[up], y[up], width, color=BLUE, label=f"better than {study.start}")
    axes.bar(x[~up], y[~up], width, **worse)
    axes.axhline(0, color=BLACK, linewidth=1)
    _mark_groups(axes, study.counts[order], change)
    names = [study.first.store.class_names[c] for c in order]
    look.class_axis(axes, names, study.counts)
    axes.set_ylabel("change of test accuracy\n[percentage points]")
    gain, loss, measured = int((change > 0).sum()), int((change < 0).sum()), int(np.isfinite(change).sum())
    mean = signed(float(np.nanmean(change)))
    axes.set_title(f"{gain} classes gain, {loss} lose, {measured - gain - loss} stay; mean {mean} points", pad=40)
    look.legend(figure, np.array([axes]))
    name = str(study.first.selected) if len(study.backbones) == 1 else "The selected head of each backbone"
    caption = f"{name} less {study.start}, test split, classes from largest to smallest; mean over {study.repeated}."
    rank, better = np.arange(1, len(change) + 1), np.nan_to_num(change) >= 0
    figure_chart = chart(
        [
            bars(f"better than {study.start}", rank, np.where(better, change, np.nan), color=BLUE, of_classes=True),
            bars(
                f"worse than {study.start}",
                rank,
                np.where(better, np.nan, change),
                color=RED,
                pattern="/",
                of_classes=True,
            ),
        ],
        x=class_axis(names, study.counts),
        y="change of test accuracy [points]",
        barmode="overlay",
    )
    return Drawing("class-change", "What changes for each class", caption, figure, table, figure_chart)


def _mark_groups(axes: "Axes", counts: np.ndarray, change: np.ndarray) -> None:
    """Borders between many, medium and few, and the mean change of each; counts and change largest class first."""
    start = 0
    for group, inside in class_groups(counts).items():
        size, measured = int(inside.sum()), change[inside & np.isfinite(change)]
        if not size:
            continue
        if start:
            axes.axvline(start + 0.5, color=GREY, linewidth=1, linestyle="--")
        wide = size >= NARROW * len(counts)
        text = f"{group} ({BOUNDS[group]} images)\nmean " if wide else f"{group}\n"
        text += signed(measured.mean()) if len(measured) else "–"
        place: Row = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "color": GREY}
        axes.text(start + 0.5 + size / 2, 1.015, text, fontsize=10.5, **place)
        start += size


def training_curves(study: Study) -> Drawing | None:
    """Loss and accuracy of stage 1 over its epochs, a line a backbone; None where metrics.jsonl was not kept."""
    backbones = [b for b in study.backbones if b.metrics]
    if not backbones:
        return None
    figure = look.figure_of(11.5, 4.3)
    left, right = figure.subplots(1, 2)
    traces: list[Row] = []
    styles = [(ORANGE, "--", "s"), (GREEN, "-.", "D"), (RED, ":", "v")]
    lines: list[tuple[str, str, Row]] = [
        ("train_accuracy", "training images (augmented)", {"color": BLACK, "linestyle": "-"}),
        ("val_accuracy", "validation, all", AFTER | {"linewidth": 2.2}),
    ]
    for group, (color, line, marker) in zip(GROUPS, styles, strict=True):
        lines.append((f"val_{group}", f"validation, {group}", {"color": color, "linestyle": line, "marker": marker}))
    for number, backbone in enumerate(backbones):
        named = {"alpha": 1.0 if number == 0 else 0.45}
        epochs, losses = zip(*((m["epoch"], m["loss"]) for m in backbone.metrics), strict=True)
        left.plot(epochs, losses, color=BLACK, linewidth=2, marker="o" if len(epochs) == 1 else None, **named)
        marked: Row = {"color": BLACK, "marker": "o" if len(epochs) == 1 else None}
        traces.append(trace("training loss", epochs, losses, marked, **_part_of(number, "loss", **named)))
        for key, label, style in lines:
            points = [(m["epoch"], m[key]) for m in backbone.metrics if m.get(key) is not None]
            if points:
                every = {"markevery": max(1, len(points) // 8), "label": label if number == 0 else None}
                line_style = {"linewidth": 1.7, "markersize": 5, "markerfacecolor": "white", **style, **every, **named}
                x, y = zip(*points, strict=True)
                right.plot(x, y, **line_style)
                plain_style = {"linewidth": 1.7, **style, "marker": style.get("marker") if len(x) < 12 else None}
                second: Row = {"xaxis": "x2", "yaxis": "y2", "text": [backbone.name] * len(x)}
                traces.append(trace(label, x, y, plain_style, **second, **_part_of(number, label, **named)))
    last = backbones[0].metrics[-1]
    val = next((m["val_accuracy"] for m in reversed(backbones[0].metrics) if m.get("val_accuracy") is not None), None)
    left.set(title=f"Training loss: {last['loss']:.2f} at the end", ylabel="loss that is minimised")
    left.set_ylim(bottom=0)
    ends = f"training {last['train_accuracy']:.0f} %" + (f", validation {val:.0f} %" if val is not None else "")
    right.set(title=f"Accuracy at the end: {ends}", ylabel="accuracy [%]", ylim=(0, 102))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    look.legend(figure, np.array([right]))
    caption = "Accuracies are means over classes, of training images as they were augmented in that epoch." + (
        f" One line for each of {len(backbones)} backbones." if len(backbones) > 1 else ""
    )
    table = [{"backbone": b.name, **line} for b in backbones for line in b.metrics]
    figure_chart = chart(
        traces,
        x="epoch",
        y={"title": "loss that is minimised", "rangemode": "tozero"},
        xaxis2={"title": "epoch"},
        yaxis2={"title": "accuracy [%]", "range": [0, 102]},
        grid={"rows": 1, "columns": 2, "pattern": "independent"},
    )
    return Drawing("training", "Stage 1, epoch by epoch", caption, figure, table, figure_chart)


def _part_of(number: int, group: str, *, alpha: float) -> Row:
    """Keys of a trace of the number-th backbone: one entry in the legend for all backbones, the later ones paler."""
    return {"opacity": alpha, "legendgroup": group, "showlegend": number == 0}


def _columns_title(column: str, study: Study) -> str:
    bounds = f": {BOUNDS[column]} images," if column in BOUNDS else ""
    return textwrap.fill(f"{column}{bounds} {study.classes_of(column)}", 36)


def _gain(study: Study) -> str:
    """The result in one line."""
    parts = []
    for column, name in (("all", "all classes"), ("few", "few-shot classes")):
        reference, selected = (study.spread(kinds, "test", column) for kinds in (BASELINE, study.selected))
        if reference and selected and reference.mean is not None and selected.mean is not None:
            parts.append(f"{name} {reference.mean:.1f} → {selected.mean:.1f} %")
    lams = sorted({k.lam for k in study.selected if k.lam is not None})
    at = f"λ = {', '.join(f'{lam:g}' for lam in lams)}" if lams else study.first.selected.method
    return f"{study.start[0].upper()}{study.start[1:]} → rebalanced ({at}), test: {', '.join(parts)}"


def _numbers(split: str, column: str, line: str, lam: float | None, value: MeanStd) -> Row:
    numbers = {"mean": rounded(value.mean), "std": rounded(value.std), "n": value.n}
    return {"split": split, "classes": column, "line": line, "lam": lam, **numbers}
