"""What heads say of the test samples: confusion between groups and reliability, by hand and against the table."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.method_names import PROBE
from pipeline.metrics import confidence_bins, expected_calibration_error
from pipeline.report import predictions as scoring
from pipeline.report.confusion import confusion_between_groups, frequent_confusions, group_confusion
from pipeline.report.figures import draw_all
from pipeline.report.predictions import Answers, answers, read_compared
from pipeline.report.reliability import reliability_diagram
from pipeline.report.study import read_study
from pipeline.results.head_id import BASELINE, HeadId
from pipeline.results.heads import Gated, Linear, predict, predict_array
from tests.small_run import made_run

COUNTS = np.array([150, 60, 30, 12, 5])  # many, medium, medium, few, few


def said(labels, predicted, confidence=None, backbone="one"):
    confidence = np.full(len(labels), 0.5) if confidence is None else np.array(confidence)
    return Answers(backbone, np.array(labels), np.array(predicted), confidence)


@pytest.mark.parametrize("gated", [False, True])
def test_arrays_are_predicted_as_tensors_are(gated, monkeypatch):
    random = np.random.default_rng(0)
    first, second = (Linear(*(random.normal(size=s).astype(np.float32) for s in ((7, 4), 7))) for _ in range(2))
    head = Gated(first, second, random.normal(size=5).astype(np.float32) * 50) if gated else first
    features = random.normal(size=(101, 4)).astype(np.float32)
    monkeypatch.setattr("pipeline.results.heads.LOGITS_AT_ONCE", 7 * 10)
    for found, expected in zip(predict_array(head, features), predict(head, torch.from_numpy(features)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_confusion_between_groups_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3])
    predicted = np.array([0, 0, 0, 4, 0, 2, 2, 0, 4])
    found = group_confusion(predicted, labels, COUNTS)
    # class 1: half to many, half to medium; class 2: all to medium; class 4 has no sample
    np.testing.assert_allclose(found, [[75, 0, 25], [25, 75, 0], [50, 0, 50]])


def test_a_group_without_samples_or_classes_is_unknown():
    found = group_confusion(np.array([0]), np.array([0]), np.array([150, 60]))
    np.testing.assert_array_equal(found[0], [100, 0, 0])
    assert np.isnan(found[1:]).all()


def test_the_most_frequent_confusions_come_first_and_right_answers_not_at_all():
    true, taken, percent = frequent_confusions([said([0, 0, 0, 0, 1], [0, 2, 2, 1, 1]), said([1], [0])], 3)
    assert list(zip(true.tolist(), taken.tolist(), percent.tolist(), strict=True)) == [
        (0, 2, 50),
        (1, 0, 50),
        (0, 1, 25),
    ]


def test_answers_agree_with_the_table(run):
    backbone = read_study(run).first
    rows = json.loads((run / "rebalance" / "results.json").read_text())["results"]
    for kind in (BASELINE, backbone.selected, backbone.loss_only):
        found = answers(backbone, kind)
        wanted = [r for r in rows if r["split"] == "test" and kind.matches(r)]
        assert len(found) == len(wanted)
        for one, row in zip(found, wanted, strict=True):
            accuracy = [one.hit[one.labels == c].mean() for c in range(5)]
            assert 100 * np.mean(accuracy) == pytest.approx(row["all"])
            assert expected_calibration_error(one.confidence, one.hit) == pytest.approx(row["ece"], abs=1e-3)


def test_confusion_figure_shows_both_heads_and_shares(run):
    study = read_study(run)
    drawing = confusion_between_groups(study, read_compared(study))
    after = np.mean(
        [group_confusion(a.predicted, a.labels, study.counts) for a in answers(study.first, study.first.selected)], 0
    )
    groups = ("many", "medium", "few")
    cells = {(r["head"], r["true"], r["predicted"]): r["percent"] for r in drawing.table if r["row"] == "group"}
    assert len(cells) == 18
    for i, true in enumerate(groups):
        for j, taken in enumerate(groups):
            assert cells[str(study.first.selected), true, taken] == pytest.approx(after[i, j], abs=1e-3)
        assert sum(cells["stage 1", true, taken] for taken in groups) == pytest.approx(100, abs=1e-2)
    shares = [r for r in drawing.table if r["row"] == "share" and r["head"] == "stage 1"]
    assert [r["due"] for r in shares] == [20, 40, 40]
    assert sum(r["percent"] for r in shares) == pytest.approx(100, abs=1e-2)
    [first] = answers(study.first, BASELINE)
    wrong = first.predicted[(first.labels == 4) & ~first.hit]
    listed = [r for r in drawing.table if (r["row"], r["head"], r["true"]) == ("class", "stage 1", "eel")]
    most = np.bincount(wrong, minlength=5)
    assert listed[0]["percent"] == pytest.approx(100 * most.max() / 12, abs=1e-3)
    assert most[("ant", "bee", "cat", "dog", "eel").index(listed[0]["predicted"])] == most.max()
    assert f"{cells['stage 1', 'few', 'many']:.0f} %" in drawing.figure.get_suptitle()


def test_bins_by_hand():
    confidence, hit = np.array([0.2, 0.1, 0.9, 1.0, 0.0]), np.array([True, False, True, False, False])
    samples, right, sure = confidence_bins(confidence, hit, bins=5)
    assert samples.tolist() == [3, 0, 0, 0, 2]  # a bin holds its upper edge
    assert right.tolist() == [1, 0, 0, 0, 1]
    np.testing.assert_allclose(sure, [0.3, 0, 0, 0, 1.9])
    assert expected_calibration_error(confidence, hit, bins=5) == pytest.approx(100 * (0.7 + 0.9) / 5)


@pytest.mark.parametrize("which", ["run", "runs"])
def test_reliability_has_the_ece_of_the_table_and_bins_that_add_up_to_it(which, request):
    study = read_study(request.getfixturevalue(which))
    compared = read_compared(study)
    drawing = reliability_diagram(study, compared)
    summary = {r["head"]: r for r in drawing.table if r["predicted"] == "all" and r["from"] is None}
    for (name, row), kinds in zip(summary.items(), (BASELINE, study.selected), strict=True):
        table = study.spread(kinds, "test", "ece").mean
        assert row["ece"] == pytest.approx(table, abs=1e-3)
        assert f"{table:.1f}" in drawing.figure.get_suptitle()
        bins = [r for r in drawing.table if (r["predicted"], r["head"]) == ("all", name) and r["from"] is not None]
        assert len(bins) == 15
        assert sum(r["samples"] for r in bins) == row["samples"]
        gaps = [abs(r["accuracy"] - r["confidence"]) * r["samples"] for r in bins if r["samples"]]
        assert sum(gaps) / row["samples"] <= table + 1e-3  # of several heads together, equal for one
        if len(compared.start) == 1 and name == "stage 1":
            assert sum(gaps) / row["samples"] == pytest.approx(table, abs=1e-2)
    by_group = [r["samples"] for r in drawing.table if r["from"] is None and r["predicted"] != "all"]
    assert sum(by_group) == sum(r["samples"] for r in summary.values())


@pytest.mark.parametrize(
    "counts",
    [(150, 140, 130, 120, 110), (60, 50, 40, 30, 20), (150, 60, 5)],
    ids=["many only", "medium only", "one class a group"],
)
def test_runs_that_lack_groups_or_have_one_class_in_each_draw(tmp_path, counts):
    names = ("ant", "bee", "cat", "dog", "eel")[: len(counts)]
    study = read_study(made_run(tmp_path / "run", counts=counts, names=names, lam="0.1", seeds=(0,)))
    compared = read_compared(study)
    drawn = confusion_between_groups(study, compared), reliability_diagram(study, compared)
    for drawing in drawn:
        drawing.figure.canvas.draw()
    groups = {r["true"] for r in drawn[0].table if r["row"] == "group"}
    assert len(groups) == (3 if len(counts) == 3 else 1)


def test_a_head_that_is_not_linear_is_scored(tmp_path):
    run = made_run(tmp_path / "run", method=("iwb", "disalign"), trials=1, lam="0.1", seeds=(0,))
    backbone = read_study(run).first
    [found] = answers(backbone, HeadId("disalign"))
    row = next(r for r in backbone.rows if r["method"] == "disalign" and r["split"] == "test")
    assert expected_calibration_error(found.confidence, found.hit) == pytest.approx(row["ece"], abs=1e-3)
    study = replace(read_study(run), backbones=[replace(backbone, selected=HeadId("disalign"))])
    drawn = {drawing.name: drawing for drawing in draw_all(study)}
    assert {"weight-norms", "norm-size", "confusion", "reliability", "feature-geometry"} <= drawn.keys()
    assert "disalign" in {row["head"] for row in drawn["reliability"].table}
    assert not [column for row in drawn["weight-norms"].table for column in row if "disalign" in column]  # it has none


def test_a_linear_probe_is_called_that_where_it_is_what_stage_2_started_from(run, monkeypatch):
    monkeypatch.setattr("pipeline.report.study.start_name", lambda fingerprint: PROBE)
    drawn = {drawing.name: drawing for drawing in draw_all(read_study(run))}
    for name in ("confusion", "reliability"):
        assert {row["head"] for row in drawn[name].table} == {PROBE, str(read_study(run).first.selected)}
    for name in ("weight-norms", "norm-size"):
        assert PROBE in drawn[name].table[-1]
    assert "of its length in the linear probe" in drawn["weight-norms"].caption


def test_skipped_test_samples_and_a_class_that_lost_all_of_them(tmp_path):
    absent = {"test": (0, *range(48, 60)), "train": (3,)}
    run = made_run(tmp_path / "run", absent=absent, lam="0.1", seeds=(0,))
    study = read_study(run)
    compared = read_compared(study)
    assert len(compared.start[0].labels) == 47
    table = confusion_between_groups(study, compared).table
    assert "eel" not in {r["true"] for r in table if r["row"] == "class"}
    few = [r["percent"] for r in table if (r["row"], r["head"], r["true"]) == ("group", "stage 1", "few")]
    assert sum(few) == pytest.approx(100, abs=1e-2)
    assert [r["due"] for r in table if r["row"] == "share"][:3] == [25, 50, 25]
    reliability_diagram(study, compared).figure.canvas.draw()


def test_without_heads_samples_or_time_there_is_no_figure(run, tmp_path, monkeypatch):
    study = read_study(run)
    assert answers(study.first, HeadId("ncm")) == []
    assert answers(study.first, BASELINE, "nothing") == []
    monkeypatch.setattr(scoring, "PRODUCTS_FOR_A_FIGURE", 10)
    assert read_compared(study) is None
    assert confusion_between_groups(study, None) is None
    assert reliability_diagram(study, None) is None


def test_of_more_batch_orders_than_take_seconds_the_first_are_scored(run, monkeypatch):
    study = read_study(run)
    both = answers(study.first, study.first.selected)
    assert len(both) == 2
    monkeypatch.setattr(scoring, "PRODUCTS_FOR_A_FIGURE", 60 * 5 * 8)
    [first] = answers(study.first, study.first.selected)
    np.testing.assert_array_equal(first.confidence, both[0].confidence)
