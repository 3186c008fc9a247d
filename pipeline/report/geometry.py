"""Feature map of the largest and smallest classes, and the spread of features within a class, in training and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cache import Cache
from pipeline.longtail import BOUNDS, GROUPS, class_groups
from pipeline.report.chart import (
    BLACK,
    BLUE,
    GREY,
    RED,
    bars,
    chart,
    errors,
    note,
    panel,
    panel_titles,
    plain,
    rounded,
    trace,
)
from pipeline.report.drawing import Drawing
from pipeline.report.picture import WIDTH
from pipeline.report.study import Row, Study
from pipeline.results.mean_std import MeanStd, mean_std
from pipeline.seeds import derive

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
    "training images": {"color": BLACK, "dash": "dot", "symbol": "square", "fill": "white"},
    "test images": {"color": BLUE, "symbol": "circle"},
    "test around training mean": {"color": RED, "dash": "dash", "symbol": "triangle-up", "fill": "white"},
}
PATTERNS = {"training images": "/", "test images": "", "test around training mean": "."}
LETTER = 9.5 / 72  # inches of the names in a map


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
    run_names = names or [study.folder.resolve().name for study in studies]
    runs = [Geometry(study, name) for study, name in zip(studies, run_names, strict=True)]
    runs = sorted((run for run in runs if "test images" in run.of_classes), key=lambda run: run.imbalance)
    if not runs:
        return None
    groups = [g for g in GROUPS if any(class_groups(run.study.counts)[g].any() for run in runs)]
    columns = 2 if len(runs) == 1 else min(max(len(runs), len(groups)), MAPS_IN_A_LINE)
    lines = -(-len(runs) // columns)
    height = 5.4 if len(runs) == 1 else 3.7 * lines + 3.6
    map_size = np.array([WIDTH / columns - 0.6, (height - 1.4) / (lines + (len(runs) > 1))])
    title, drawn = _title(runs, groups), _chart(runs, groups, columns=columns, letter=LETTER / map_size)
    caption = f"{title}. {_caption(runs)}"
    return Drawing(
        "feature-geometry", "Feature map and class spread", caption, _table(runs, groups), drawn, title, height
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


def _names_on_map(run: Geometry, panel_number: int, letter: np.ndarray) -> tuple[list[Row], Row, Row]:
    """Return the names of the classes in the middle of their points, and axes (x, y) with room for all points.

    Arguments:
        letter: (width, height) of a letter in parts of the panel.
    """
    bare: Row = {"showticklabels": False, "showgrid": False, "zeroline": False}
    if run.map is None:
        none = note("too few test samples", 0.5, 0.5, panel_number=panel_number, inside=False)
        return [none], bare, bare
    low, high = run.map.places.min(0), run.map.places.max(0)
    margin = 0.05 * np.maximum(high - low, 1e-6)
    low, room = low - margin, high - low + 2 * margin
    points = {c: run.map.places[run.map.labels == c] for part in ends(run.study.counts) for c in part.tolist()}
    names = {c: _shortened(run.study.first.store.class_names[c]) for c, dots in points.items() if len(dots)}
    middles = {c: (np.median(points[c], axis=0) - low) / room for c in names}
    texts = []
    for c, place in _apart(middles, names, letter).items():
        x, y = low + np.array(place) * room
        text = note(names[c], float(x), float(y), panel_number=panel_number)
        texts.append(text | {"font": {"size": 9.5, "color": BLACK}, "yshift": 10 if len(points[c]) < FEW else 0})
    x_axis, y_axis = (bare | {"range": [float(low[i]), float(low[i] + room[i])]} for i in (0, 1))
    return texts, x_axis, y_axis


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


def _chart(runs: Sequence[Geometry], groups: Sequence[str], *, columns: int, letter: np.ndarray) -> Row:
    """Maps, in which hovering tells the class, and dispersions: of one run as bars, of several by imbalance factor."""
    traces: list[Row] = []
    axes: Row = {}
    notes: list[Row] = []
    several = len(runs) > 1
    for number, run in enumerate(runs, 1):
        traces += _points_of(run, panel(number), first=number == 1)
        texts, axes[f"xaxis{number}"], axes[f"yaxis{number}"] = _names_on_map(run, number, letter)
        notes += texts
    titles = [f"Test features (t-SNE){f', IF {run.imbalance:.3g}' if several else ''}" for run in runs]
    measures = {m: s for m, s in MEASURES.items() if any(m in run.of_classes for run in runs)}
    if not several:
        present = [g for g in groups if class_groups(runs[0].study.counts)[g].any()]
        for measure, style in measures.items():
            spreads = [runs[0].of_group(measure, g) for g in present]
            more = errors([s.std or 0.0 for s in spreads], GREY) if any(s.std for s in spreads) else {}
            more |= {"text": ["" if s.mean is None else f"{s.mean:.3f}" for s in spreads], "textposition": "outside"}
            labels, values = [f"{g}<br>{BOUNDS[g]} images" for g in present], plain([s.mean for s in spreads])
            drawn = bars(measure, labels, values, color=style["color"], pattern=PATTERNS[measure], **more, **panel(2))
            traces.append(drawn | {"x": labels})
        axes |= {"xaxis2": {"showgrid": False}, "yaxis2": {"title": "1 − mean cosine to the class mean"}}
        titles.append("Dispersion within a class")
    start = -(-len(runs) // columns) * columns
    factors = [f"{run.imbalance:.3g}" for run in runs]
    if len(set(factors)) < len(runs):
        factors = [f"{factor}<br>{plain([run.name])[0]}" for factor, run in zip(factors, runs, strict=True)]
    for number, group in enumerate(groups if several else (), start + 1):
        for measure, style in measures.items():
            spreads = [run.of_group(measure, group) if measure in run.of_classes else MeanStd(None) for run in runs]
            keys: Row = {
                "legendgroup": measure,
                "showlegend": number == start + 1,
                "text": plain([r.name for r in runs]),
            }
            keys |= errors([s.std for s in spreads], style["color"]) | panel(number)
            traces.append(trace(measure, range(len(runs)), plain([s.mean for s in spreads]), style, **keys))
        ticks: Row = {"tickvals": list(range(len(runs))), "ticktext": factors, "range": [-0.3, len(runs) - 0.7]}
        axes[f"xaxis{number}"] = ticks | {"title": "imbalance factor"}
        first = number == start + 1
        title = "dispersion within a class\n1 − mean cosine to the mean" if first else ""
        axes[f"yaxis{number}"] = {"title": title, "rangemode": "tozero"} | (
            {} if first else {"matches": f"y{start + 1}"}
        )
        notes.append(note(f"{group}: {BOUNDS[group]} images", 0, 1, panel_number=number, anchor="bottom", inside=False))
    more_keys: Row = {"height": 760} if several else {}
    first_axes = {"x": axes.pop("xaxis1"), "y": axes.pop("yaxis1")}
    return chart(
        traces, **first_axes, columns=columns, **axes, **more_keys, annotations=[*panel_titles(titles), *notes]
    )


def _points_of(run: Geometry, place: Row, *, first: bool) -> list[Row]:
    """A trace for every class of the map."""
    if run.map is None:
        return []
    traces, names = [], run.study.first.store.class_names
    for part, size in zip(ends(run.study.counts), SHADES, strict=True):
        face: Row = {"dash": "none", "size": 4, "symbol": "circle"}
        face |= {} if size == "largest" else {"symbol": "triangle-up", "fill": "rgba(0,0,0,0)"}
        for c, color in zip(part.tolist(), SHADES[size], strict=False):
            x, y = run.map.places[run.map.labels == c].T
            hover = f"{plain([names[c]])[0]}<br>{run.study.counts[c]:,} training images<extra></extra>"
            more: Row = {"hovertemplate": hover, "legendgroup": size, "showlegend": False}
            traces.append(trace(names[c], x, y, face | {"color": color}, **more, **place))
        label = f"{len(part)} {size} classes" if len(part) > 1 else f"the {size} class"
        middle: Row = face | {"color": SHADES[size][len(part) // 2]}
        traces.append(trace(label, [None], [None], middle, legendgroup=size, showlegend=first, **place))
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
