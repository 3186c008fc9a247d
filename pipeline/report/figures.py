"""The figures of a report. Each function returns a figure, its caption and the table it shows; none touches a file."""

import textwrap

import numpy as np

from pipeline.longtail import BOUNDS, GROUPS, class_groups
from pipeline.report.chart import BLACK, BLUE, GREY, RED, bars, chart, class_axis, note, panel, rounded, trace
from pipeline.report.confusion import confusion_between_groups
from pipeline.report.curves import accuracy_panels, present_columns
from pipeline.report.drawing import AFTER, BY_GROUP, Drawing, class_table
from pipeline.report.explorer import lambda_chart
from pipeline.report.geometry import feature_geometry
from pipeline.report.norms import norm_against_size, weight_norms
from pipeline.report.predictions import read_compared
from pipeline.report.reliability import reliability_diagram
from pipeline.report.study import COLUMNS, SPLITS, Row, Study
from pipeline.results.head_id import BASELINE, HeadId
from pipeline.results.mean_std import signed

NARROW = 0.18  # share of the classes below which a group has no room for its full label


def draw_all(study: Study) -> list[Drawing]:
    """Every figure there is data for, in the order of the page."""
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
    start, kind = study.start.removeprefix("the "), study.at(0.0)
    lines = {head.name(start): [head] for head in (BASELINE, study.first.loss_only)}
    lines |= {kind.without_lam.name(): [study.at(lam) for lam in study.lams], kind.name(): [kind]}
    splits = {s: SPLITS[s] for s in (study.choosing_split, "test") if study.has_split(s)}
    curves = {s: {line: _points(study, s, heads) for line, heads in lines.items()} for s in splits}
    columns = present_columns([point for lines in curves.values() for points in lines.values() for point in points])
    table = [
        {"split": split, "classes": column, "line": line, "lam": head.lam, "mean": point[column]}
        | {"std": point[f"{column}_std"], "n": point["n"]}
        for split in splits
        for column in columns
        for line, heads in lines.items()
        for head, point in zip(heads, curves[split][line], strict=True)
        if point[column] is not None
    ]
    rows = {f"{words}{' (not selected on)' if s == 'test' else ''}\n": curves[s] for s, words in splits.items()}
    titles = {column: _columns_title(column, study) for column in columns}
    still = accuracy_panels(rows, titles, across=len(columns), star=f"chosen on {SPLITS[study.choosing_split]}")
    basis = f"The star marks the λ chosen on {SPLITS[study.choosing_split]} alone"
    zero = sum(k.lam == 0 for k in study.selected)
    if not study.chosen_on:
        basis = "One λ was given, so nothing was chosen"
    elif zero:
        by = f" by {zero} of {len(study.backbones)} backbones" if len(study.backbones) > 1 else ""
        basis += f"; λ = 0, the line of equal norms, was chosen{by}"
    caption = (
        f"{kind.without_lam.name()}; mean ± one standard deviation over {study.repeated}. {basis}; "
        "test was evaluated afterwards and selected nothing."
    )
    moving, height = lambda_chart(study, table), 1.2 + 2.9 * len(splits)
    return Drawing("accuracy-lambda", "Accuracy against λ", caption, table, moving, _gain(study), height, still)


def _points(study: Study, split: str, heads: list[HeadId]) -> list[Row]:
    """Return the accuracies of each head by group; a single one is a level line, which has no λ of its own."""
    selected = {head.lam for head in study.selected} if study.chosen_on else set()
    points = []
    for head in heads:
        cells = {column: study.spread(head, split, column) for column in COLUMNS}
        point: Row = {"lam": head.lam or None, "chosen": bool(head.lam) and head.lam in selected}
        point["n"] = max((cell.n for cell in cells.values() if cell), default=0)
        for column, cell in cells.items():
            point |= {
                column: rounded(cell.mean) if cell else None,
                f"{column}_std": rounded(cell.std) if cell else None,
            }
        points.append(point)
    return points


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
    names = [study.first.store.class_names[c] for c in order]
    gain, loss, measured = int((change > 0).sum()), int((change < 0).sum()), int(np.isfinite(change).sum())
    mean = signed(float(np.nanmean(change)))
    headline = f"{gain} classes gain, {loss} lose, {measured - gain - loss} stay; mean {mean} points"
    name = str(study.first.selected) if len(study.backbones) == 1 else "The selected head of each backbone"
    caption = f"{name} less {study.start}, test split, classes from largest to smallest; mean over {study.repeated}."
    rank, better = np.arange(1, len(change) + 1), np.nan_to_num(change) >= 0
    up, down = np.where(better, change, np.nan), np.where(better, np.nan, change)
    borders, labels = _groups(study.counts[order], change)
    drawn = chart(
        [
            bars(f"better than {study.start}", rank, up, color=BLUE, of_classes=True),
            bars(f"worse than {study.start}", rank, down, color=RED, pattern="/", of_classes=True),
        ],
        x=class_axis(names, study.counts),
        y={"title": "change of test accuracy [points]", "zerolinewidth": 1},
        barmode="overlay",
        shapes=borders,
        annotations=labels,
    )
    return Drawing("class-change", "What changes for each class", caption, table, drawn, headline, 5.0)


def _groups(counts: np.ndarray, change: np.ndarray) -> tuple[list[Row], list[Row]]:
    """Return borders between many, medium and few, and the mean change of each; counts and change largest class first."""
    start, borders, labels = 0, list[Row](), list[Row]()
    for group, inside in class_groups(counts).items():
        size, measured = int(inside.sum()), change[inside & np.isfinite(change)]
        if not size:
            continue
        if start:
            line = {"color": GREY, "dash": "dash", "width": 1}
            place = {"x0": start + 0.5, "x1": start + 0.5, "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
            borders.append({"type": "line", "line": line, **place})
        text = f"{group} ({BOUNDS[group]} images)\nmean " if size >= NARROW * len(counts) else f"{group}\n"
        text += signed(measured.mean()) if len(measured) else "–"
        label = note(text, start + 0.5 + size / 2, 1.01, anchor="bottom")
        labels.append(label | {"yref": "y domain"})
        start += size
    return borders, labels


def training_curves(study: Study) -> Drawing | None:
    """Loss and accuracy of stage 1 over its epochs, a line a backbone; None where metrics.jsonl was not kept."""
    backbones = [b for b in study.backbones if b.metrics]
    if not backbones:
        return None
    lines: list[tuple[str, str, Row]] = [
        ("train_accuracy", "training images (augmented)", {"color": BLACK}),
        ("val_accuracy", "validation, all", AFTER | {"width": 2.2}),
        *((f"val_{group}", f"validation, {group}", {"width": 1.7} | BY_GROUP[group]) for group in GROUPS),
    ]
    traces = []
    for number, backbone in enumerate(backbones):  # one entry in the legend for all backbones, the later ones paler
        keys: Row = {"opacity": 1.0 if number == 0 else 0.45}
        for place, key, label, style in (
            (1, "loss", "training loss", {"color": BLACK, "symbol": "circle"}),
            *((2, *line) for line in lines),
        ):
            points = [(m["epoch"], m[key]) for m in backbone.metrics if m.get(key) is not None]
            if points:
                x, y = zip(*points, strict=True)
                marked = style if len(x) < (2 if key == "loss" else 12) else style | {"symbol": None}
                keys |= {"legendgroup": label, "showlegend": number == 0, "text": [backbone.name] * len(x)}
                traces.append(trace(label, x, y, marked, **keys, **panel(place)))
    last = backbones[0].metrics[-1]
    val = next((m["val_accuracy"] for m in reversed(backbones[0].metrics) if m.get("val_accuracy") is not None), None)
    ends = f"training {last['train_accuracy']:.0f} %" + (f", validation {val:.0f} %" if val is not None else "")
    caption = "Accuracies are means over classes, of training images as they were augmented in that epoch." + (
        f" One line for each of {len(backbones)} backbones." if len(backbones) > 1 else ""
    )
    table = [{"backbone": b.name, **line} for b in backbones for line in b.metrics]
    drawn = chart(
        traces,
        x="epoch",
        y={"title": "loss that is minimised", "rangemode": "tozero"},
        xaxis2={"title": "epoch"},
        yaxis2={"title": "accuracy [%]", "range": [0, 102]},
        columns=2,
    )
    headline = f"At the end: training loss {last['loss']:.2f}; accuracy on {ends}"
    return Drawing("training", "Stage 1, epoch by epoch", caption, table, drawn, headline)


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
