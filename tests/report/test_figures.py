"""Figures show the numbers that were measured, and draw every shape of run."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import picture as look
from pipeline.report import write_report
from pipeline.report.chart import chart, lambda_axis, trace
from pipeline.report.figures import (
    accuracy_against_lambda,
    class_change,
    draw_all,
    training_curves,
)
from pipeline.report.study import read_study
from tests.small_run import made_run


def labels(drawing):
    return {text.get_text() for legend in drawing.figure.legends for text in legend.get_texts()}


def texts(drawing):
    parts = [(a.get_title("left"), a.get_title(), a.get_ylabel(), a.get_xlabel()) for a in drawing.figure.axes]
    return " ".join([drawing.figure.get_suptitle(), *(text for part in parts for text in part)])


def test_accuracy_against_lambda_shows_what_was_measured(run):
    study = read_study(run)
    drawing = accuracy_against_lambda(study)
    rows = json.loads((run / "rebalance" / "results.json").read_text())["results"]
    for split in ("val", "test"):
        for column in ("all", "many", "medium", "few"):
            for lam in (0.05, 0.1, 1.0):
                expected = [r[column] for r in rows if (r["method"], r["lam"], r["split"]) == ("iwb", lam, split)]
                wanted = {"line": "iwb", "lam": lam, "split": split, "classes": column}
                shown = [r for r in drawing.table if wanted.items() <= r.items()]
                assert [(s["mean"], s["n"]) for s in shown] == [(pytest.approx(np.mean(expected), abs=1e-4), 2)]
    references = {r["line"] for r in drawing.table} - {"iwb"}
    assert references == {"stage 1", "CB loss only", "equal norms (λ = 0)"}
    assert labels(drawing) == references | {"iwb", "chosen on validation"}
    assert "test (not selected on)" in texts(drawing)
    stars = [line for a in drawing.figure.axes for line in a.lines if line.get_marker() == "*"]
    assert [line.get_xdata()[0] for line in stars] == [study.first.selected.lam] * 8


def test_a_single_lambda_is_a_point_that_nobody_chose(tmp_path):
    drawing = accuracy_against_lambda(read_study(made_run(tmp_path / "run", lam="0.3")))
    assert "chosen on validation" not in labels(drawing)
    assert "One λ was given" in drawing.caption
    low, high = drawing.figure.axes[0].get_xlim()
    assert low < 0.3 < high


def test_the_band_over_backbones_is_their_standard_deviation(runs):
    study = read_study(runs)
    table = accuracy_against_lambda(study).table
    shown = next(r for r in table if (r["split"], r["classes"], r["line"], r["lam"]) == ("test", "all", "iwb", 0.05))
    expected = study.spread(study.at(0.05), "test", "all")
    assert (shown["std"], shown["n"]) == (pytest.approx(expected.std, abs=1e-4), 3)
    assert "over 3 backbones" in accuracy_against_lambda(study).caption


def test_class_change_is_selected_less_stage_1(runs):
    study = read_study(runs)
    drawing = class_change(study)
    after = np.mean([b.class_accuracy(b.selected, "test") for b in study.backbones], 0)
    shown = {row["class"]: row for row in drawing.table}
    for c, accuracy in enumerate(after):
        assert shown[c]["selected"] == pytest.approx(accuracy, abs=1e-3)
        assert shown[c]["change"] == pytest.approx(shown[c]["selected"] - shown[c]["stage 1"], abs=1e-3)
    gains = sum(row["change"] > 0 for row in drawing.table)
    assert f"{gains} classes gain" in texts(drawing)


def test_training_curves_have_every_epoch_and_none_without_metrics(run, tmp_path):
    drawing = training_curves(read_study(run))
    assert [row["loss"] for row in drawing.table] == [2.0, 1.0, pytest.approx(2 / 3)]
    assert "validation, all" in labels(drawing)
    assert "validation, few" not in labels(drawing)
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / "backbone" / "metrics.jsonl").unlink()
    assert training_curves(read_study(folder)) is None
    assert "training" not in [d.name for d in draw_all(read_study(folder))]


def test_strange_class_names_and_many_classes_draw_without_a_warning(tmp_path):
    names = ("$a_{$", "猫", "a very long name that does not fit", "é", "<b>")
    write_report(made_run(tmp_path / "names", names=names))
    many = made_run(
        tmp_path / "many", names=[str(i) for i in range(150)], counts=[200 - i for i in range(150)], lam="0.1"
    )
    paths = write_report(many).figures
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_charts_are_json_with_names_escaped_and_panels_that_exist(tmp_path):
    names = ("<b>ant</b>", "bee", "cat", "dog & son", "eel")
    for drawing in draw_all(read_study(made_run(tmp_path / "names", names=names, lam="0.1"))):
        text = json.dumps(drawing.chart, allow_nan=False)
        assert "<b>" not in text
        assert "dog & son" not in text
        for series in drawing.chart["data"]:
            for letter in "xy":
                axis = series.get(f"{letter}axis", letter)
                assert f"{letter}axis{axis[1:]}" in drawing.chart["layout"]


def test_a_picture_has_the_points_bars_cells_titles_and_names_of_its_chart(runs):
    for drawing in draw_all(read_study(runs)):
        shown = drawing.still or drawing.chart
        panels = [
            axes for axes in drawing.figure.axes if axes.get_xlabel() or axes.get_ylabel() or axes.get_title("left")
        ]
        lines = [line.get_ydata() for axes in panels for line in axes.lines]
        marks = [
            np.asarray(dots.get_offsets())[:, 1]
            for axes in panels
            for dots in axes.collections
            if len(dots.get_offsets())
        ]
        heights = [bar.get_height() for axes in panels for bar in axes.patches]
        for series in shown["data"]:
            if series["type"] == "heatmap":
                cells = [np.asarray(image.get_array()) for axes in panels for image in axes.images]
                assert any(np.allclose(np.array(series["z"], float), c, equal_nan=True) for c in cells)
            elif series["type"] == "bar":
                assert {h for h in series["y"] if h is not None} <= {*heights}
            elif "fill" not in series:
                y = np.array(series["y"], float)
                same = (len(d) == len(y) and np.allclose(d.astype(float), y, equal_nan=True) for d in (*lines, *marks))
                assert any(same), (drawing.name, series["name"])
        named = {
            look.plain_text(t["name"]) for t in shown["data"] if t.get("showlegend", "z" not in t) and "fill" not in t
        }
        assert labels(drawing) == (named if len(named) > 1 else set())
        titles = [look.plain_text(note["text"]) for note in shown["layout"].get("annotations", ()) if note["y"] == 1]
        assert [axes.get_title("left") for axes in panels][: len(titles)] == titles


def test_tables_beside_the_figures_are_complete(run, tmp_path):
    report = write_report(run, out=tmp_path)
    assert [p.stem for p in report.figures] == [
        "accuracy-lambda",
        "weight-norms",
        "norm-size",
        "class-change",
        "confusion",
        "reliability",
        "feature-geometry",
        "training",
    ]
    with open(tmp_path / "figures" / "weight-norms.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["ant", "bee", "cat", "dog", "eel"]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=400))
def test_thinning_keeps_the_mean_and_the_ends(values):
    x, y = look.thinned(np.array(values))
    assert len(x) == min(len(values), look.BINS)
    assert 1 <= x[0] <= x[-1] <= len(values)
    sizes = [len(part) for part in np.array_split(np.arange(len(values)), len(x))]
    assert np.average(y, weights=sizes) == pytest.approx(np.mean(values))


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=40, unique=True).map(sorted))
def test_lambda_axis_has_ticks_at_tried_values_and_room_for_all(lams):
    points = trace("accuracy", lams, lams, {"color": "black", "symbol": "circle"})
    [axes] = look.picture(chart([points], x=lambda_axis(lams), y="")).axes
    low, high = axes.get_xlim()
    assert low < lams[0] <= lams[-1] < high
    assert set(axes.get_xticks()) <= set(lams)
    assert (axes.get_xscale() == "log") == (lams[-1] >= 10 * lams[0])


def test_a_report_loads_neither_torch_nor_pyplot(run, tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline.report import write_report; "
        f"write_report(Path({str(run)!r}), out=Path({str(tmp_path)!r})); "
        "sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
