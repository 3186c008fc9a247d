"""Progress of each class during training: read from diagnostics.csv, summed up by epoch, compared, drawn."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache import refuse_unwritable
from pipeline.errors import DataError
from pipeline.prepared import Prepared, Write, replaced_or_new
from pipeline.report.chart import BLACK, BLUE, GREEN, GREY, ORANGE, RED, chart, errors, panel, panel_titles, trace
from pipeline.report.drawing import Drawing
from pipeline.report.study import Row, labels
from pipeline.results.documents import read_record
from pipeline.results.mean_std import MeanStd, mean_std
from pipeline.results.table import Column, Line, Table
from pipeline.text import Shown

FILE = "diagnostics.csv"
MEASURES = {  # of an epoch, with what they mean
    "std": "training accuracy: std over classes",
    "range": "training accuracy: best less worst",
    "gap": "training accuracy: major less minor",
    "ratio": "‖∂L/∂z‖: minor over major",
}
RECONSTRUCTED = (
    " Weakening of major features is a reconstruction from the abstract of Procrustean training (ICCV 2021)."
)
STYLES = [
    (BLACK, "square"),
    (BLUE, "circle"),
    (RED, "triangle-up"),
    (GREEN, "diamond"),
    (ORANGE, "triangle-down"),
]


@dataclass(frozen=True, eq=False)
class Progress:
    """One training, diagnosed at E epochs; NaN where nothing was measured.

    Arguments:
        epochs: (E,).
        counts: (C,) training images.
        accuracy: (E, C) in %.
        gradient: (E, C) norm of the gradient.
        weakened: the weakening of features in words, empty without.
    """

    name: str
    epochs: np.ndarray
    counts: np.ndarray
    accuracy: np.ndarray
    gradient: np.ndarray
    weakened: str = ""

    @property
    def summary(self) -> list[Row]:
        """A line an epoch: mean, std and range of accuracy over classes; major and minor classes; ratio of gradients."""
        major, minor = halves(self.counts)
        table = []
        for epoch, accuracy, gradient in zip(self.epochs.tolist(), self.accuracy, self.gradient, strict=True):
            finite = accuracy[~np.isnan(accuracy)]
            by_half = {"major": _mean(accuracy[major]), "minor": _mean(accuracy[minor])}
            pulls = {"gradient_major": _mean(gradient[major]), "gradient_minor": _mean(gradient[minor])}
            line: Row = {
                "epoch": epoch,
                "mean": _mean(finite),
                "std": float(finite.std()),
                "range": float(np.ptp(finite)),
            }
            gap, ratio = None, None
            if by_half["major"] is not None and by_half["minor"] is not None:
                gap = by_half["major"] - by_half["minor"]
            if pulls["gradient_major"] and pulls["gradient_minor"] is not None:
                ratio = pulls["gradient_minor"] / pulls["gradient_major"]
            table.append(line | by_half | {"gap": gap} | pulls | {"ratio": ratio})
        return table

    def over_epochs(self, measure: str, *, last: bool = False) -> float | None:
        """A measure's mean over the epochs, or its value at the last one; None where it is nowhere defined."""
        values = [line[measure] for line in self.summary[-1 if last else 0 :] if line[measure] is not None]
        return float(np.mean(values)) if values else None


@dataclass(frozen=True)
class Compared(Shown):
    """A comparison of several runs.

    Arguments:
        rows: of each run its measures, each a spread over its trainings.
        figure: the picture that shows them.
        note: a sentence on what they are, or nothing.
    """

    rows: tuple[Row, ...]
    figure: Path
    note: str

    def to_dict(self) -> dict[str, Any]:
        return {"runs": list(self.rows), "figure": str(self.figure)}

    def __rich_console__(self, console, options):
        less = f"less {self.rows[0]['run']}"
        for row in self.rows:
            paired = "less_first" in row["std"]
            title = f"{row['run']}: {row['n']} training{'s' if row['n'] > 1 else ''}"
            names = ["", "over the epochs", *[less] * paired, "last epoch", *[less] * paired]
            lines = []
            for measure, meaning in MEASURES.items():
                cells = [
                    (_number_text(values[measure]), _number_text(values[measure].get("less_first")))
                    for values in (row, row["last"])
                ]
                lines.append(Line([meaning, *(text for pair in cells for text in pair[: 1 + paired])]))
            table = Table([Column(name, left=not name) for name in names], lines, title)
            yield table
        if self.note:
            yield self.note.strip()
        yield f"picture: {self.figure}"


def halves(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks (C,) of major and minor classes: above and below the geometric mean of the largest and smallest size.

    Of exponential sizes these are the two halves, of step sizes the two steps; both empty where all are equal.
    """
    counts = np.asarray(counts, dtype=np.float64)
    middle = np.sqrt(counts.max() * counts.min())
    unequal = counts.max() > counts.min()
    return unequal & (counts > middle), unequal & (counts <= middle)


def read_progress(path: Path, name: str) -> Progress:
    """The diagnostics.csv of a training; DataError naming the file if it is missing, damaged or of something else."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if None not in line.values()]  # a kill tears the last one
        table = [(int(r["epoch"]), int(r["class"]), int(r["images"]), r["accuracy"], r["gradient"]) for r in lines]
        values = np.array([[float(a or "nan"), float(g or "nan")] for *_, a, g in table])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; train with --set backbone.diagnose_every=1") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not written by `pipeline train-backbone` ({error})") from error
    counts = {c: images for _, c, images, *_ in table}
    complete = len(counts) and len(table) // len(counts)
    if not complete or [row[1] for row in table[: complete * len(counts)]] != list(range(len(counts))) * complete:
        raise DataError(f"{path}: has no whole epoch in it; train with --set backbone.diagnose_every=1")
    by_epoch = values[: complete * len(counts)].reshape(complete, len(counts), 2)
    epochs = np.array([row[0] for row in table[: complete * len(counts) : len(counts)]])
    sizes = np.array([counts[c] for c in range(len(counts))])
    return Progress(name, epochs, sizes, by_epoch[..., 0], by_epoch[..., 1], _weakening(path.with_name("run.json")))


def _weakening(record: Path) -> str:
    """Return the weakening of major features that a training's run.json records, or nothing."""
    settings = (read_record(record).get("config") or {}).get("backbone", {}).get("weaken")
    if settings is None:  # of an older version, or not there
        return ""
    strength, gamma, at = (settings[key] for key in ("strength", "gamma", "at"))
    return f"weakening as reconstructed: a = {strength:g}, γ = {gamma:g}, at {at}" if strength else ""


def trainings(run: Path) -> list[Progress]:
    """Every diagnosed training of a run (RUN/seed-N/backbone, RUN/backbone) or of a folder of `train-backbone`."""
    seeds = sorted(run.glob(f"seed-*/backbone/{FILE}"), key=lambda p: (len(p.parts[-3]), p.parts[-3]))
    paths = seeds or [p for p in (run / "backbone" / FILE, run / FILE) if p.is_file()][:1]
    return [read_progress(path, path.parts[-3] if seeds else run.name) for path in paths]


def of_run(run: Path) -> Drawing | None:
    """The figure of one run; None where its trainings were not diagnosed."""
    runs = trainings(run)
    return draw({run.resolve().name: runs}) if runs else None


@dataclass(frozen=True, eq=False)
class PreparedProgress:
    """Trainings of runs that were read, and the folder of their figure; `write` draws it.

    Arguments:
        trainings: those of each run.
    """

    trainings: dict[Path, list[Progress]]
    out: Path

    @property
    def description(self) -> Prepared:
        text = ", ".join(f"{run} ({len(progress)} training(s))" for run, progress in self.trainings.items())
        files = (self.out / "progress.png", self.out / "progress.csv")
        writes = tuple(Write(path, None, replaced_or_new(path)) for path in files)
        return Prepared("progress", {}, {"compares": text}, {"runs": [str(run) for run in self.trainings]}, writes)

    def write(self) -> Compared:
        named = dict(zip(labels([*self.trainings]), self.trainings.values(), strict=True))
        drawing = draw(named)
        _, figure = drawing.write(self.out)
        weakened = any(p.weakened for progress in named.values() for p in progress)
        return Compared(tuple(_compared(named)), figure, RECONSTRUCTED if weakened else "")


def prepare_progress(runs: Sequence[Path], *, out: Path) -> PreparedProgress:
    """Return the comparison that `compare_progress` would draw, checked; nothing is written.

    Arguments and raises: those of `compare_progress`.
    """
    by_run = {run: trainings(run) for run in runs}
    for run, progress in by_run.items():
        if not progress and not run.is_dir():
            raise DataError(f"{run}: no such folder; give runs, or the folders of trainings")
        if not progress:
            raise DataError(f"{run}: no {FILE} in it; train with --set backbone.diagnose_every=1")
    refuse_unwritable(out)
    return PreparedProgress(by_run, out)


def compare_progress(runs: Sequence[Path], *, out: Path) -> Compared:
    """Compare the trainings of runs with those of the first; write progress.png and progress.csv.

    Differences are paired by training where a run has those of the first.

    Arguments:
        runs: folders of runs, or of trainings.
        out: the folder to write to.
    Raises: DataError: a run has no diagnosed training.
    """
    return prepare_progress(runs, out=out).write()


def draw(runs: Mapping[str, Sequence[Progress]]) -> Drawing:
    """Training accuracy and gradients of major and minor classes by epoch, their spread and ratio; a colour a run."""
    traces = []
    for number, (name, trainings) in enumerate(runs.items()):
        color, symbol = STYLES[number % len(STYLES)]
        style: Row = {"color": color, "symbol": symbol, "size": 5, "fill": "white"}
        label = f"{name} ({weakening})" if (weakening := trainings[0].weakened) else name
        for place, measure in (
            (1, "major"),
            (1, "minor"),
            (2, "std"),
            (3, "gradient_major"),
            (3, "gradient_minor"),
            (4, "ratio"),
        ):
            dash = "dash" if "minor" in measure else "solid"
            keys: Row = {"legendgroup": name, "showlegend": measure == "major"} | panel(place)
            traces.append(_trace(label, trainings, measure, style | {"dash": dash}, **keys))
    for kind, dash in (("major classes", "solid"), ("minor classes", "dash")):
        traces.append(trace(kind, [None], [None], {"color": GREY, "dash": dash}))
    titles = ["Accuracy on clean training images", "Standard deviation of that accuracy over classes"]
    titles += ["Gradient at the features", "Gradient of minor over major classes"]
    drawn = chart(
        traces,
        x="",
        y={"title": "accuracy [%]", "range": [0, 102]},
        xaxis2={},
        yaxis2={"title": "standard deviation [points]", "rangemode": "tozero"},
        xaxis3={"title": "epoch"},
        yaxis3={"title": "mean ‖∂L/∂z‖", "rangemode": "tozero"},
        xaxis4={"title": "epoch"},
        yaxis4={"title": "ratio", "rangemode": "tozero"},
        columns=2,
        height=720,
        showlegend=True,
        annotations=panel_titles(titles),
    )
    several = max(map(len, runs.values()))
    bands = f" Lines are means over up to {several} trainings, bands one standard deviation." if several > 1 else ""
    caption = (
        "The same training images of every class after each epoch, clean, unmixed, in evaluation mode; z is what enters "
        "the classifier, L cross-entropy. Major classes are larger than the geometric mean of the largest and the "
        f"smallest.{bands}{RECONSTRUCTED if any(p.weakened for trainings in runs.values() for p in trainings) else ''}"
    )
    table = [
        {"run": name, "training": p.name, **line}
        for name, trainings in runs.items()
        for p in trainings
        for line in p.summary
    ]
    return Drawing("progress", "Progress of large and small classes", caption, table, drawn, height=7.6)


def _trace(label: str, trainings: Sequence[Progress], measure: str, style: Row, **keys: Any) -> Row:
    """Return the mean over trainings of a measure by epoch, with its standard deviation where there are several."""
    values: dict[int, list[float]] = {}
    for training in trainings:
        for line in training.summary:
            if line[measure] is not None:
                values.setdefault(line["epoch"], []).append(line[measure])
    spreads = [mean_std(values[epoch]) for epoch in sorted(values)]
    deviations = errors((s.std for s in spreads), style["color"]) if len(trainings) > 1 else {}
    return trace(label, sorted(values), [s.mean for s in spreads], style, **deviations, **keys)


def _compared(named: Mapping[str, Sequence[Progress]]) -> list[Row]:
    """A row a run: each measure over the epochs, and in `last` at the last one."""
    rows: list[Row] = []
    first = next(iter(named.values()))
    for label, trainings in named.items():
        pairs = _pairs(trainings, first) if rows else []
        measures = [{m: _spread_of(trainings, pairs, m, last=last) for m in MEASURES} for last in (False, True)]
        rows.append(
            {"run": label, "n": len(trainings), "weakened": trainings[0].weakened, **measures[0], "last": measures[1]}
        )
    return rows


def _pairs(trainings: Sequence[Progress], first: Sequence[Progress]) -> list[tuple[Progress, Progress]]:
    """Trainings with those of the first run they are held against: the same seeds, or the only one; else nothing."""
    by_name = {p.name: p for p in first}
    if len(trainings) == len(first) == 1:
        return [(trainings[0], first[0])]
    return [(p, by_name[p.name]) for p in trainings] if {p.name for p in trainings} == by_name.keys() else []


def _spread_of(
    trainings: Sequence[Progress], pairs: Sequence[tuple[Progress, Progress]], measure: str, *, last: bool
) -> Row:
    """Mean and standard deviation of a measure; less_first, those of its differences, where there are pairs."""
    row: Row = mean_std(p.over_epochs(measure, last=last) for p in trainings).to_dict()
    if not pairs:
        return row
    value_pairs = [(p.over_epochs(measure, last=last), q.over_epochs(measure, last=last)) for p, q in pairs]
    return row | {"less_first": mean_std(a - b for a, b in value_pairs if a is not None and b is not None).to_dict()}


def _number_text(value: Row | None) -> str:
    return "–" if value is None else MeanStd(value["mean"], value["std"]).text(2)


def _mean(values: np.ndarray) -> float | None:
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else None
