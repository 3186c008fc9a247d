"""Dispersions by hand, and the figure of feature geometry for one run and for several."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import open_cache
from pipeline.report import dispersion
from pipeline.report.dispersion import directions, read_directions
from pipeline.report.geometry import SAMPLES_OF_A_CLASS, _apart, embedded, ends, feature_geometry
from pipeline.report.study import read_study
from tests.small_run import made_run, made_store


def of(*vectors):
    """Directions of one class."""
    features = np.array(vectors, np.float32)
    return directions(features, np.zeros(len(features), np.int64), 1)


def test_features_that_point_one_way_do_not_scatter_whatever_their_lengths():
    found = of([1, 2], [2, 4], [10, 20])
    assert found.plain[0] == pytest.approx(0, abs=1e-6)
    assert found.dispersion[0] == pytest.approx(0, abs=1e-6)


def test_opposite_features_scatter_wholly():
    assert of([1, 0], [-1, 0]).dispersion[0] == 1
    assert of([1, 0], [-3, 0]).plain[0] == 1


def test_orthogonal_features_scatter_wholly_though_they_lie_near_their_own_mean():
    found = of([1, 0, 0], [0, 1, 0], [0, 0, 1])
    assert found.plain[0] == pytest.approx(1 - 1 / np.sqrt(3))
    assert found.dispersion[0] == pytest.approx(1)


def test_dispersion_by_hand():
    found = of([1, 0], [1, 1])  # 45 degrees apart
    assert found.alike[0] == pytest.approx(np.sqrt(0.5))
    assert found.dispersion[0] == pytest.approx(1 - np.sqrt(np.sqrt(0.5)))
    assert found.plain[0] == pytest.approx(1 - np.cos(np.pi / 8))


def test_one_feature_has_no_dispersion_and_a_zero_has_no_direction():
    assert np.isnan(of([1, 2]).dispersion[0])
    assert of([1, 2], [0, 0]).number.tolist() == [1]
    empty = directions(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), 2)
    assert np.isnan(empty.plain).all()
    assert np.isnan(of([1, 0], [1, 1]).around(empty)[:1]).all()


def test_around_another_mean_by_hand():
    train, test = of([1, 0], [1, 0]), of([0, 1], [1, 0])
    assert test.around(train)[0] == pytest.approx(0.5)  # cosines 0 and 1 to the training mean
    assert np.isnan(test.around(of([1, 0]))[0])  # one training feature: its mean is all noise


def test_dispersion_does_not_depend_on_how_many_were_sampled():
    random = np.random.default_rng(0)
    features = (random.normal(size=(200_000, 16)) + 1).astype(np.float32)
    all_of_them = directions(features, np.zeros(len(features), np.int64), 1)
    few = directions(features, np.repeat(np.arange(40_000), 5), 40_000)
    assert np.square(1 - few.dispersion).mean() == pytest.approx(np.square(1 - all_of_them.dispersion[0]), abs=0.01)
    assert few.plain.mean() < all_of_them.plain[0] - 0.05  # as they are, few samples look tighter


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 5))
def test_sums_are_those_of_a_loop(seed, rows, classes):
    random = np.random.default_rng(seed)
    features, labels = random.normal(size=(rows, 3)).astype(np.float32), random.integers(0, classes, rows)
    found = directions(features, labels, classes)
    for c in range(classes):
        unit = [x / np.linalg.norm(x) for x in features[labels == c]]
        np.testing.assert_allclose(found.sums[c], np.sum(unit, axis=0) if unit else 0, atol=1e-5)
        assert found.number[c] == len(unit)
        if len(unit) > 1:
            pairs = [a @ b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
            assert found.alike[c] == pytest.approx(np.mean(pairs), abs=1e-5)


def test_skipped_rows_and_splits_that_are_too_large_or_missing_are_left_out(tmp_path, monkeypatch):
    store = open_cache(made_store(tmp_path / "s.zarr", absent={"train": (0, 255)}))
    found = read_directions(store, "train")
    assert found.number.tolist() == [149, 60, 30, 12, 4]
    assert np.isfinite(found.dispersion).all()
    valid = store.valid("train")
    expected = directions(store.read("train")[valid].astype(np.float32), store.labels("train")[valid], 5)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-6)
    assert read_directions(store, "nothing") is None
    monkeypatch.setattr(dispersion, "PASS_FOR_A_FIGURE", store.rows("train") * store.width - 1)
    assert read_directions(store, "train") is None


def test_the_figure_has_what_was_measured(run):
    study = read_study(run)
    drawing = feature_geometry([study])
    store = study.first.store
    for split, measure in (("train", "training images"), ("test", "test images")):
        found = read_directions(store, split).dispersion
        shown = {
            row["class"]: row["dispersion"] for row in drawing.table if row["row"] == "class" and row["of"] == measure
        }
        assert [shown[c] for c in range(5)] == pytest.approx(found, abs=1e-4)
        few = [r for r in drawing.table if (r["row"], r.get("group"), r.get("of")) == ("group", "few", measure)]
        assert few[0]["dispersion"] == pytest.approx(found[3:].mean(), abs=1e-4)
        assert (few[0]["classes"], few[0]["n"]) == (2, 1)
        plain = read_directions(store, split).plain
        assert few[0]["uncorrected"] == pytest.approx(plain[3:].mean(), abs=1e-4)
    points = [row for row in drawing.table if row["row"] == "point"]
    head, tail = ends(study.counts)
    assert {row["class"] for row in points} == {*head.tolist(), *tail.tolist()} == {0, 1, 3, 4}
    labels = store.labels("test")
    by_id = dict(zip(store.ids("test").tolist(), labels.tolist(), strict=True))
    assert all(by_id[row["id"]] == row["class"] for row in points)
    assert len(points) == 48
    assert "n = 48" in drawing.caption
    assert "neighbours, not distances" in drawing.caption


def test_a_name_stands_in_the_middle_of_its_points_and_on_no_other(run):
    drawing = feature_geometry([read_study(run)])
    panel = drawing.figure.axes[0]
    drawing.figure.canvas.draw()
    boxes = {told.get_text(): told.get_window_extent() for told in panel.texts}
    points = {row["name"]: [] for row in drawing.table if row["row"] == "point"}
    for row in (row for row in drawing.table if row["row"] == "point"):
        points[row["name"]].append(panel.transData.transform((row["x"], row["y"])))
    assert boxes.keys() == points.keys()
    for name, box in boxes.items():
        middle = np.median(points[name], axis=0)
        assert abs(middle - [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]).max() < 0.1 * panel.bbox.size.min()
    close = _apart(
        {0: np.array([0.5, 0.5]), 1: np.array([0.5, 0.51]), 2: np.array([0.9, 0.5])}, ["wolf"] * 3, [0.02, 0.04]
    )
    assert (close[1], close[2]) == ((0.5, 0.51), (0.9, 0.5))
    assert close[0][1] <= 0.51 - 0.04


def test_several_runs_stand_side_by_side_by_imbalance(run, tmp_path):
    even = made_run(tmp_path / "even", counts=(40, 36, 32, 28, 24), lam="0.1")  # neither many nor few
    drawing = feature_geometry([read_study(run), read_study(even)])
    titles = [axes.get_title(loc="left") for axes in drawing.figure.axes]
    assert titles[:2] == ["Test features (t-SNE), IF 1.67", "Test features (t-SNE), IF 30"]
    groups = [
        (row["run"], row["group"]) for row in drawing.table if row["row"] == "group" and row["of"] == "test images"
    ]
    assert groups == [("even", "medium"), ("one", "many"), ("one", "medium"), ("one", "few")]
    few = drawing.figure.axes[-1]
    assert few.get_title(loc="left") == "few: < 20 images"
    assert [t.get_text() for t in few.get_xticklabels()] == ["1.67", "30"]
    low, high = few.get_ylim()
    shown = [y for axes in drawing.figure.axes[2:] for line in axes.lines for y in line.get_ydata() if np.isfinite(y)]
    assert low == 0
    assert max(shown) < high


def test_spread_is_over_backbones(runs):
    study = read_study(runs)
    row = next(r for r in feature_geometry([study]).table if r["of"] == "test images" and r["group"] == "few")
    each = [read_directions(b.store, "test").dispersion[3:].mean() for b in study.backbones]
    assert row["dispersion"] == pytest.approx(np.mean(each), abs=1e-4)
    assert row["std"] == pytest.approx(np.std(each, ddof=1), abs=1e-4)


def test_the_map_is_the_same_every_time_and_copes_with_features_that_are_all_alike():
    features = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    np.testing.assert_array_equal(embedded(features), embedded(features))
    assert not embedded(np.ones((10, 4), np.float32)).any()


@pytest.mark.parametrize(("classes", "each"), [(2, 1), (3, 1), (9, 4), (100, 5)])
def test_head_and_tail_have_no_class_in_common(classes, each):
    head, tail = ends(np.arange(classes) + 1)
    assert len(head) == len(tail) == each
    assert not {*head.tolist()} & {*tail.tolist()}
    assert head[0] == classes - 1


def test_without_test_samples_there_is_no_figure_and_with_too_many_features_no_numbers(run, monkeypatch):
    monkeypatch.setattr(dispersion, "PASS_FOR_A_FIGURE", 10)
    assert feature_geometry([read_study(run)]) is None


def test_a_map_takes_at_most_so_many_samples_of_a_class(run, monkeypatch):
    monkeypatch.setattr("pipeline.report.geometry.SAMPLES_OF_A_CLASS", 5)
    points = [row for row in feature_geometry([read_study(run)]).table if row["row"] == "point"]
    assert len(points) == 20
    assert SAMPLES_OF_A_CLASS == 100
