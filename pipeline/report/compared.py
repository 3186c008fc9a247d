"""Several runs side by side: what each is and reached, accuracy against λ, class by class, and their training."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.report.chart import chart, class_axis, panel, plain, rounded, trace
from pipeline.report.curves import accuracy_curves, style_of
from pipeline.report.drawing import Drawing
from pipeline.report.geometry import feature_geometry
from pipeline.report.study import COLUMNS, SPLITS, Row, Study
from pipeline.results.head_id import BASELINE
from pipeline.results.mean_std import MeanStd, mean_std, signed
from pipeline.results.table import Cell, Column, Line, Table
from pipeline.results.tables import TITLES

Studies = Mapping[str, Study]
SHOWN = ("many", "medium", "few", "all", "ece")


def compared(studies: Studies) -> tuple[str, list[Row]]:
    """(tables of what the runs are and what they reached, the same as rows for a program)."""
    facts, numbers, rows = [], [], []
    for name, study in studies.items():
        network, counts = study.first.network, study.counts
        lams = ", ".join(dict.fromkeys(f"{k.lam:g}" for k in study.selected if k.lam is not None))
        row: Row = {
            "run": name,
            "network": network.get("network"),
            "parameters": network.get("parameters"),
            "data": study.first.training.get("dataset", {}).get("name"),
            "classes": len(counts),
            "images": int(counts.sum()),
            "imbalance_factor": round(float(counts.max() / counts.min()), 4),
            "repeated": study.repeated,
            "lam": lams or None,
            "chosen_on": study.chosen_on,
        }
        parameters = f"{row['parameters']:,}" if row["parameters"] else "–"
        sizes = [f"{row['classes']:,}", f"{row['images']:,}", f"{row['imbalance_factor']:g}", study.repeated]
        facts.append((name, [row["network"] or "–", parameters, row["data"] or "–", *sizes]))
        selected_name = f"{study.first.selected.without_lam.name()}{f', λ = {lams}' if lams else ''}"
        for key, head, kinds in (("start", study.start, BASELINE), ("selected", selected_name, study.selected)):
            cells = {column: study.spread(kinds, "test", column) for column in SHOWN}
            row[key] = {c: s.mean if s else None for c, s in cells.items()}
            row[key] |= {f"{c}_std": s.std if s else None for c, s in cells.items()}
            numbers.append((name if key == "start" else "", [head, *cells.values()]))
        rows.append(row)
    titles = ["Network", "Parameters", "Data", "Classes", "Images", "Imbalance", "n"]
    tables = _named(["Run", "Head", *(TITLES[c] for c in SHOWN)], numbers)
    note = "Test split in %, mean ± std; each head was selected without it. " + _differing(studies)
    return f"{tables}<p class=note>{note}</p>{_named(['Run', *titles], facts)}", rows


def _differing(studies: Studies) -> str:
    """Return the settings in which the runs differ besides the one that is compared."""
    several = [
        quantity
        for quantity, value_of in (
            ("networks", lambda s: (s.first.network.get("network"), s.first.network.get("parameters"))),
            ("class sizes", lambda s: tuple(s.counts.tolist())),
            ("augmentation", lambda s: s.first.network.get("augmentation")),
        )
        if len({value_of(s) for s in studies.values()}) > 1
    ]
    if not several:
        return "The runs share network, class sizes and augmentation."
    return f"The runs differ in {' and '.join(several)}: a difference between them may be due to any of what differs."


def _named(titles: Sequence[str], lines: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Return a table of the page whose lines begin with a name."""
    return Table([Column(title) for title in titles], [Line([name, *cells]) for name, cells in lines]).html()


def draw_compared(studies: Studies) -> list[Drawing]:
    """Every figure that there is data for."""
    geometry = feature_geometry(list(studies.values()), list(studies))
    drawings = [_accuracy(studies), _class_difference(studies), geometry, _training(studies)]
    return [d for d in drawings if d is not None]


def _accuracy(studies: Studies) -> Drawing | None:
    curves: dict[str, list[Row]] = {}
    for name, study in studies.items():
        selected_lams = {k.lam for k in study.selected} if study.chosen_on else set()
        points = []
        for lam in study.lams:
            cells = {c: study.spread(study.at(lam), "test", c) for c in COLUMNS}
            numbers = {c: rounded(s.mean) if s else None for c, s in cells.items()}
            numbers |= {f"{c}_std": rounded(s.std) if s else None for c, s in cells.items()}
            n = max((s.n for s in cells.values() if s), default=0)
            points.append({"run": name, "lam": lam, "chosen": lam in selected_lams, "n": n, **numbers})
        if points:
            curves[name] = points
    on = ", ".join(dict.fromkeys(SPLITS[s.choosing_split] for s in studies.values() if s.chosen_on))
    star = f" The star marks the λ that a run chose, on {on}." if on else ""
    caption = f"Mean ± one standard deviation of what each run repeats; test selected nothing.{star}"
    return accuracy_curves(
        curves,
        name="accuracy-lambda",
        title="Accuracy against λ, run by run",
        caption=caption,
        headline="Test accuracy against λ, run by run",
    )


def _class_difference(studies: Studies) -> Drawing | None:
    """Test accuracy of every class in each run less that in the first; None where the classes are not the same."""
    (first, base), *rest = studies.items()
    if any(s.first.store.class_names != base.first.store.class_names for _, s in rest):
        return None
    accuracy = {name: _selected_accuracy(study) for name, study in studies.items()}
    if any(a is None for a in accuracy.values()):
        return None
    order, names = base.by_size, base.first.store.class_names
    ordered_accuracy = {name: np.asarray(a)[order] for name, a in accuracy.items()}
    table: list[Row] = [
        {"rank": i + 1, "class": int(c), "name": names[c], "images": int(base.counts[c])}
        | {name: rounded(a[i]) for name, a in ordered_accuracy.items()}
        | {f"{name} less {first}": rounded(ordered_accuracy[name][i] - ordered_accuracy[first][i]) for name, _ in rest}
        for i, c in enumerate(order)
    ]
    traces = []
    for number, (name, _) in enumerate(rest, 1):
        less = ordered_accuracy[name] - ordered_accuracy[first]
        texts = [f"{row['name']}: {MeanStd(row[name])} less {MeanStd(row[first])} %" for row in table]
        hover: Row = {"text": plain(texts), "hovertemplate": "%{text} = %{y:.1f}<extra></extra>"}
        label = f"{name} less {first}: mean {signed(float(np.nanmean(less)))}"
        traces.append(trace(label, np.arange(1, len(order) + 1), less, style_of(number), **hover))
    caption = f"Test accuracy of the selected heads, each run less {first}; classes by their size in {first}."
    points: Row = {"title": "difference of test accuracy [points]", "zerolinewidth": 2}
    drawn = chart(traces, x=class_axis([names[c] for c in order], base.counts), y=points, showlegend=True)
    return Drawing("class-difference", "Class by class, run by run", caption, table, drawn)


def _selected_accuracy(study: Study) -> np.ndarray | None:
    accuracies = [b.class_accuracy(b.selected, "test") for b in study.backbones]
    return None if any(a is None for a in accuracies) else np.mean(np.array(accuracies), 0)


def _training(studies: Studies) -> Drawing | None:
    """Loss and validation accuracy of stage 1, mean over the backbones of each run."""
    table: list[Row] = []
    for name, study in studies.items():
        lines = [m for b in study.backbones for m in b.metrics]
        for epoch in sorted({m["epoch"] for m in lines}):
            epoch_lines = [m for m in lines if m["epoch"] == epoch]
            means = {
                key: rounded(mean_std(m.get(key) for m in epoch_lines).mean)
                for key in ("loss", "train_accuracy", "val_accuracy")
            }
            table.append({"run": name, "epoch": epoch, "n": len(epoch_lines), **means})
    if not table:
        return None
    traces = []
    for place, key in enumerate(("loss", "val_accuracy"), 1):
        for number, name in enumerate(studies):
            x, y = _points(table, name, key)
            style = style_of(number) | ({"width": 2} if len(x) <= 12 else {"width": 2, "symbol": None})
            traces.append(trace(name, x, y, style, legendgroup=name, showlegend=place == 1, **panel(place)))
    drawn = chart(
        traces,
        x="epoch",
        y={"title": "training loss", "rangemode": "tozero"},
        xaxis2={"title": "epoch"},
        yaxis2={"title": "validation accuracy [%]", "rangemode": "tozero"},
        columns=2,
        showlegend=True,
    )
    caption = "Stage 1, mean over the backbones of each run; losses of different kinds do not compare."
    return Drawing("training", "Stage 1, run by run", caption, table, drawn)


def _points(table: Sequence[Row], name: str, key: str) -> tuple[list[int], list[float]]:
    points = [(row["epoch"], row[key]) for row in table if row["run"] == name and row[key] is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]
