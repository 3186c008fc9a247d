"""Feature map of the largest and smallest classes, and the spread of features within a class, in training and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cache import Cache
from pipeline.longtail import BOUNDS, GROUPS, class_groups
from pipeline.report import axes as look
from pipeline.report.axes import BLACK, BLUE, GREY, RED
from pipeline.report.chart import bars, chart, plain, trace
from pipeline.report.drawing import Drawing, rounded
from pipeline.report.study import Row, Study
from pipeline.results.mean_std import MeanStd, mean_std
from pipeline.seeds import derive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSES_IN_A_MAP = 10  # half of them the largest, half the smallest
SAMPLES_OF_A_CLASS = 100
LEAST_IN_A_MAP = 8  # samples; fewer have no neighbourhoods
MAPS_IN_A_LINE = 4
FEW = 10  # samples of a class in a map, whose name stands above them
SHADES = {  # of the classes in a map, largest first; head and tail differ in their marks too
    "largest": ("#1561a9", "#3080bd", "#539ecd", "#7db8da", "#a6cee4"),
    "smallest": ("#a63603", "#d94801", "#f16913", "#fd8d3c", "#fdae6b"),
}
MEASURES: dict[str, Row] = {
    "training images": {"color": BLACK, "linestyle": ":", "marker": "s", "hatch": "////", "fill": "white"},
    "test images": {"color": BLUE, "linestyle": "-", "marker": "o", "hatch": "", "fill": BLUE},
    "test around training mean": {
        "color": RED,
        "linestyle": "--",
        "marker": "^",
        "hatch": "....",
        "fill": "white",
    },
}


@dataclass(frozen=True, eq=False)
class Map:
    """Test samples in two dimensions: their rows in the store, classes (n,) and places (n, 2)."""

    rows: np.ndarray
    labels: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class Geometry:
    """Measurements of one run, by class and by group."""

    study: Study
    name: str

    @property
    def imbalance(self) -> float:
        return float(self.study.counts.max() / self.study.counts.min())

    @cached_property
    def of_classes(self) -> dict[str, list[np.ndarray]]:
        """Dispersions (C,), one for every backbone, of each of MEASURES that could be measured."""
        dispersions: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
        for backbone in self.study.backbones:
            train, test = backbone.directions["train"], backbone.directions["test"]
            measures = (
                train.dispersion if train else None,
                test.dispersion if test else None,
                test.around(train) if test and train else None,
            )
            for name, values in zip(MEASURES, measures, strict=True):
                if values is not None:
                    dispersions[name].append(values)
        return {name: arrays for name, arrays in dispersions.items() if len(arrays) == len(self.study.backbones)}

    def of_group(self, measure: str, group: str) -> MeanStd:
        """Mean over the classes of a group; its spread is over backbones."""
        return mean_std(
            [_mean_of(values, class_groups(self.study.counts)[group]) for values in self.of_classes[measure]]
        )

    def uncorrected(self, measure: str, group: str) -> MeanStd | None:
        """As of_group, of the means as they are, to which few samples lie nearer than many."""
        split = {"training images": "train", "test images": "test"}.get(measure)
        if split is None:
            return None
        inside, per_backbone = (
            class_groups(self.study.counts)[group],
            [b.directions[split] for b in self.study.backbones],
        )
        return mean_std([_mean_of(directions.plain, inside) for directions in per_backbone if directions])

    @cached_property
    def map(self) -> Map | None:
        return map_of(self.study.first.store, *ends(self.study.counts))


def feature_geometry(studies: Sequence[Study], names: Sequence[str] | None = None) -> Drawing | None:
    """A map of test features, and dispersions by group: of one run, or of several side by side by imbalance factor.

    names: what the runs are called, their folders' names by default. None where no run has test features.
    """
    with look.style():
        return _drawn(studies, names)


def _drawn(studies: Sequence[Study], names: Sequence[str] | None) -> Drawing | None:
    run_names = names or [study.folder.resolve().name for study in studies]
    runs = [Geometry(study, name) for study, name in zip(studies, run_names, strict=True)]
    runs = sorted((run for run in runs if "test images" in run.of_classes), key=lambda run: run.imbalance)
    if not runs:
        return None
    groups = [g for g in GROUPS if any(class_groups(run.study.counts)[g].any() for run in runs)]
    if len(runs) == 1:
        figure = look.figure_of(11.5, 5.4)
        panels = list(figure.subplots(1, 2, width_ratios=(1.2, 1)))
        _bars(panels[1], runs[0], groups)
    else:
        lines = -(-len(runs) // MAPS_IN_A_LINE)
        across = -(-len(runs) // lines)
        figure = look.figure_of(11.5, 3.7 * lines + 3.6)
        grid = figure.add_gridspec(lines + 1, 12)
        width = 12 // across
        places = [(i // across, slice(i % across * width, (i % across + 1) * width)) for i in range(len(runs))]
        panels = [figure.add_subplot(grid[line, columns]) for line, columns in places]
        span = 12 // len(groups)
        for i, group in enumerate(groups):
            axes = figure.add_subplot(grid[lines, slice(i * span, (i + 1) * span)], sharey=panels[-1] if i else None)
            _lines(axes, runs, group, first=i == 0)
            panels.append(axes)
        panels[-1].set_ylim(0, 1.04 * panels[-1].get_ylim()[1])  # once all groups are drawn: they share the axis
    for axes, run in zip(panels, runs, strict=False):
        _draw_map(axes, run, alone=len(runs) == 1)
    title = _title(runs, groups)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    look.legend(figure, np.array(panels))
    table, figure_chart = _table(runs, groups), _chart(runs, groups)
    return Drawing(
        "feature-geometry", "Feature map and class spread", f"{title}. {_caption(runs)}", figure, table, figure_chart
    )


def ends(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest classes, as many of each, largest first."""
    order = np.argsort(-counts, kind="stable")
    half = min(CLASSES_IN_A_MAP // 2, len(counts) // 2)
    return order[:half], order[len(order) - half :]


def map_of(store: Cache, head: np.ndarray, tail: np.ndarray) -> Map | None:
    """t-SNE of test features of two sets of classes, scaled to length 1, at most SAMPLES_OF_A_CLASS of each.

    The sample and the map are functions of the store alone. None where there are too few samples for one.
    """
    labels, valid = store.labels("test"), store.valid("test")
    chosen_rows = []
    for c in (*head, *tail):
        rows = np.flatnonzero((labels == c) & valid)
        random = np.random.default_rng(derive(0, "feature map", int(c)))
        chosen_rows.append(np.sort(random.permutation(rows)[:SAMPLES_OF_A_CLASS]))
    rows = np.concatenate(chosen_rows) if chosen_rows else np.empty(0, np.int64)
    if len(rows) < LEAST_IN_A_MAP or store.width < 2:
        return None
    return Map(rows, labels[rows], embedded(store.read_rows("test", rows).astype(np.float32)))


def embedded(features: np.ndarray) -> np.ndarray:
    """(n, 2) places of features (n, D), scaled to length 1: t-SNE from their principal components, the same every time."""
    from sklearn.manifold import TSNE

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
    if not np.ptp(unit, axis=0).any():
        return np.zeros((len(unit), 2))
    perplexity = min(30.0, (len(unit) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(unit).astype(np.float64)


def _draw_map(axes: "Axes", run: Geometry, *, alone: bool) -> None:
    """Points of head and tail classes; each class is named at the middle of its points."""
    from matplotlib.patheffects import withStroke

    head, tail = ends(run.study.counts)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.set_title(f"Test features (t-SNE){'' if alone else f', IF {run.imbalance:.3g}'}")
    if run.map is None:
        axes.text(0.5, 0.5, "too few test samples", transform=axes.transAxes, ha="center", color=GREY)
        return
    for part, size in ((head, "largest"), (tail, "smallest")):
        for c, color in zip(part, SHADES[size], strict=False):
            dots = run.map.places[run.map.labels == c]
            face: Row = (
                {"marker": "o", "facecolor": color} if size == "largest" else {"marker": "^", "facecolor": "white"}
            )
            axes.scatter(
                dots[:, 0],
                dots[:, 1],
                14 if alone else 8,
                alpha=0.8,
                edgecolor=color,
                linewidth=0.8,
                **face,
            )
        middle = SHADES[size][len(part) // 2]
        label = f"{len(part)} {size} classes" if len(part) > 1 else f"the {size} class"
        legend: Row = {"marker": face["marker"], "markerfacecolor": middle if size == "largest" else "white"}
        axes.plot([], [], linestyle="none", color=middle, label=label, **legend)
    points = {c: run.map.places[run.map.labels == c] for c in (*head, *tail)}
    names = {c: _shortened(run.study.first.store.class_names[c]) for c, dots in points.items() if len(dots)}
    letters: Row = {"ha": "center", "va": "center", "fontsize": 9.5 if alone else 7.5, "color": BLACK}
    size = letters["fontsize"] * axes.figure.dpi / 72 / axes.bbox.size  # of a letter, in parts of the panel
    axes.autoscale_view()  # which else waits until the figure is drawn
    middles = {c: axes.transLimits.transform(np.median(points[c], axis=0)) for c in names}
    for c, place in _apart(middles, names, size).items():
        above = (0, 10 if len(points[c]) < FEW else 0)  # a name would hide them
        label_text = axes.annotate(names[c], place, above, "axes fraction", textcoords="offset points", **letters)
        label_text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _apart(middles: dict[int, np.ndarray], names: dict[int, str], letter: np.ndarray) -> dict[int, tuple[float, float]]:
    """Places of names that do not lie on one another: from the top down, each is lowered until it is free.

    middles and letter (width, height): in parts of the panel.
    """
    placed: dict[int, tuple[float, float]] = {}
    for c in sorted(middles, key=lambda c: -middles[c][1]):
        x, y = map(float, middles[c])
        while any(
            abs(x - other_x) < 0.3 * letter[0] * (len(names[c]) + len(names[neighbour]))
            and abs(y - other_y) < letter[1]
            for neighbour, (other_x, other_y) in placed.items()
        ):
            y -= letter[1] / 4
        placed[c] = (x, y)
    return placed


def _shortened(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:8]}…{name[-5:]}"


def _bars(axes: "Axes", run: Geometry, groups: Sequence[str]) -> None:
    """Dispersion by group, a bar for everything that was measured."""
    present = [g for g in groups if class_groups(run.study.counts)[g].any()]
    place, width = np.arange(len(present)), 0.8 / len(run.of_classes)
    for number, measure in enumerate(run.of_classes):
        spreads = [run.of_group(measure, group) for group in present]
        heights = np.array([np.nan if s.mean is None else s.mean for s in spreads])
        error = np.array([s.std or 0.0 for s in spreads])
        style, x = MEASURES[measure], place + (number - (len(run.of_classes) - 1) / 2) * width
        filled: Row = {"color": style["fill"], "edgecolor": style["color"], "hatch": style["hatch"], "linewidth": 0.8}
        axes.bar(x, heights, 0.9 * width, yerr=error if error.any() else None, capsize=3, label=measure, **filled)
        for at, height, above in zip(x, heights, error, strict=True):
            if np.isfinite(height):
                axes.text(at, height + above, f"{height:.3f}", ha="center", va="bottom", fontsize=9, color=GREY)
    axes.set_xticks(place, [f"{g}\n{BOUNDS[g]} images" for g in present])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.1)
    axes.set(title="Dispersion within a class", ylabel="1 − mean cosine to the class mean")


def _lines(axes: "Axes", runs: Sequence[Geometry], group: str, *, first: bool) -> None:
    """Dispersion of a group in every run, by imbalance factor."""
    place = np.arange(len(runs))
    for measure, style in MEASURES.items():
        spreads = [
            run.of_group(measure, group) if measure in run.of_classes else MeanStd(None, None, 0) for run in runs
        ]
        y = np.array([np.nan if s.mean is None else s.mean for s in spreads])
        error = np.array([s.std or 0.0 for s in spreads])
        line_style: Row = {key: style[key] for key in ("color", "linestyle", "marker")}
        line_style |= {"markerfacecolor": style["fill"], "linewidth": 1.8, "capsize": 3, "label": measure}
        if np.isfinite(y).any():
            axes.errorbar(place, y, error if error.any() else None, **line_style)
    factors = [f"{run.imbalance:.3g}" for run in runs]
    ticks = (
        factors if len(set(factors)) == len(runs) else [f"{f}\n{r.name}" for f, r in zip(factors, runs, strict=True)]
    )
    axes.set_xticks(place, ticks)
    axes.set_xlim(-0.3, len(runs) - 0.7)
    axes.set(title=f"{group}: {BOUNDS[group]} images", xlabel="imbalance factor")
    if first:
        axes.set_ylabel("dispersion within a class\n1 − mean cosine to the mean")


def _chart(runs: Sequence[Geometry], groups: Sequence[str]) -> Row:
    """Maps, in which hovering tells the class, and dispersions."""
    traces: list[Row] = []
    axes: Row = {}
    columns = 2 if len(runs) == 1 else max(len(runs), len(groups))
    for panel, run in enumerate(runs, 1):
        traces += _points_of(run, _place(panel), first=panel == 1)
        factor = "" if len(runs) == 1 else f", IF {run.imbalance:.3g}"
        bare: Row = {"showticklabels": False, "showgrid": False, "zeroline": False}
        axes |= {f"xaxis{panel}": bare | {"title": f"test features (t-SNE){factor}"}, f"yaxis{panel}": bare}
    measures = {m: s for m, s in MEASURES.items() if any(m in run.of_classes for run in runs)}
    if len(runs) == 1:
        for measure, style in measures.items():
            spreads = [runs[0].of_group(measure, g) for g in groups]
            error = {"type": "data", "array": plain([s.std or 0.0 for s in spreads]), "color": GREY}
            pattern = {"": "", "////": "/", "....": "."}[style["hatch"]]
            more: Row = {"error_y": error} if any(s.std for s in spreads) else {}
            values = plain([s.mean for s in spreads])
            traces.append(bars(measure, groups, values, color=style["color"], pattern=pattern, **more, **_place(2)))
        axes |= {"xaxis2": {"title": "classes"}, "yaxis2": {"title": "1 − mean cosine to the class mean"}}
    for number, group in enumerate(groups if len(runs) > 1 else ()):
        panel = columns + number + 1
        for measure, style in measures.items():
            means = [run.of_group(measure, group).mean if measure in run.of_classes else None for run in runs]
            legend: Row = {"legendgroup": measure, "showlegend": number == 0, "text": plain([r.name for r in runs])}
            traces.append(trace(measure, range(len(runs)), plain(means), style, **legend, **_place(panel)))
        ticks: Row = {"tickvals": list(range(len(runs))), "ticktext": [f"{run.imbalance:.3g}" for run in runs]}
        axes[f"xaxis{panel}"] = ticks | {"title": f"imbalance factor, {group}"}
        axes[f"yaxis{panel}"] = {"title": "" if number else "dispersion within a class", "rangemode": "tozero"}
    grid = {"rows": 1 if len(runs) == 1 else 2, "columns": columns, "pattern": "independent"}
    tall: Row = {} if len(runs) == 1 else {"height": 760}
    return chart(traces, x=axes.pop("xaxis1"), y=axes.pop("yaxis1"), grid=grid, **axes, **tall)


def _place(panel: int) -> Row:
    return {"xaxis": f"x{panel}", "yaxis": f"y{panel}"} if panel > 1 else {}


def _points_of(run: Geometry, place: Row, *, first: bool) -> list[Row]:
    """A trace for every class of the map."""
    if run.map is None:
        return []
    traces, names = [], run.study.first.store.class_names
    for part, size in zip(ends(run.study.counts), SHADES, strict=True):
        for c, color in zip(part.tolist(), SHADES[size], strict=False):
            x, y = run.map.places[run.map.labels == c].T
            face: Row = {"marker": "o"} if size == "largest" else {"marker": "^", "markerfacecolor": "rgba(0,0,0,0)"}
            hover = f"{plain([names[c]])[0]}<br>{run.study.counts[c]:,} training images<extra></extra>"
            style: Row = {"color": color, "linestyle": "none", "markersize": 5, **face}
            more: Row = {"hovertemplate": hover, "legendgroup": f"{c}", "showlegend": first}
            traces.append(trace(names[c], x, y, style, **more, **place))
    return traces


def _title(runs: Sequence[Geometry], groups: Sequence[str]) -> str:
    """The smallest classes of the most unbalanced run: training against test."""
    run = runs[-1]
    present = [g for g in groups if class_groups(run.study.counts)[g].any()]
    parts = [run.of_group(m, present[-1]).mean for m in MEASURES if m in run.of_classes]
    at = f" at imbalance {run.imbalance:.3g}" if len(runs) > 1 else ""
    if len(parts) < 2 or parts[0] is None or parts[1] is None:
        return "Spread of features within a class"
    return f"Features of {present[-1]}-shot classes scatter by {parts[0]:.3f} in training, {parts[1]:.3f} on test{at}"


def _caption(runs: Sequence[Geometry]) -> str:
    mapped = [run for run in runs if run.map is not None]
    text = (
        "Map: t-SNE of clean test features scaled to length 1, from their principal components, at most "
        f"{SAMPLES_OF_A_CLASS} samples a class (n = {', '.join(f'{len(run.map.rows):,}' for run in mapped if run.map)}). "
        "It keeps neighbours, not distances: it shows which classes mix; how wide a cloud is, and how far it lies from "
        "another, it does not show. "
        if mapped
        else ""
    )
    several = [run for run in runs if len(run.study.backbones) > 1]
    first = (
        f" The map is of the first backbone; ± is one standard deviation over {several[0].study.repeated}."
        if several
        else ""
    )
    apart = (
        " At another imbalance factor a group holds other classes; the runs are compared as they are."
        if len(runs) > 1
        else ""
    )
    return (
        f"{text}Dispersion is measured in all dimensions: one less the mean cosine of the clean features of a class to their "
        "mean direction, mean over the classes of a group. A mean lies nearer to few samples than to many; that is "
        f"corrected for (1 − √ of the mean cosine of two samples), so that 5 images and 100 compare; the CSV has the uncorrected "
        f"numbers too.{first}{apart}"
    )


def _table(runs: Sequence[Geometry], groups: Sequence[str]) -> list[Row]:
    """Dispersions by group and by class, then the points of the maps; told apart by `row`."""
    table: list[Row] = []
    for run in runs:
        for group in groups:
            inside = class_groups(run.study.counts)[group]
            for measure in run.of_classes if inside.any() else ():
                spread = run.of_group(measure, group)
                line: Row = {"row": "group", "run": run.name, "imbalance": rounded(run.imbalance), "group": group}
                line |= {"classes": int(inside.sum()), "of": measure, "dispersion": rounded(spread.mean)}
                line |= {"std": rounded(spread.std), "n": spread.n}
                plainly = run.uncorrected(measure, group)
                table.append(line | {"uncorrected": rounded(plainly.mean) if plainly else None})
    for run in runs:
        names, counts = run.study.first.store.class_names, run.study.counts
        for c in run.study.by_size:
            line = {"row": "class", "run": run.name, "class": int(c), "name": names[c], "images": int(counts[c])}
            for measure, arrays in run.of_classes.items():
                table.append(line | {"of": measure, "dispersion": rounded(_mean_of(np.array([v[c] for v in arrays])))})
    for run in runs:
        if run.map is not None:
            ids, names = run.study.first.store.ids("test"), run.study.first.store.class_names
            for row, c, (x, y) in zip(run.map.rows, run.map.labels, run.map.places, strict=True):
                line = {"row": "point", "run": run.name, "class": int(c), "name": names[c], "id": int(ids[row])}
                table.append(line | {"x": rounded(x), "y": rounded(y)})
    return table


def _mean_of(values: np.ndarray, inside: np.ndarray | slice = slice(None)) -> float | None:
    """Mean of what is known inside a mask; None where nothing is."""
    finite = values[inside]
    finite = finite[np.isfinite(finite)]
    return float(finite.mean()) if len(finite) else None
