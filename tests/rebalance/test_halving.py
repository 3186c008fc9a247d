"""Tuning within a budget: successive halving on class-stratified parts of the training images."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import RebalanceConfig, make_rebalance_config
from pipeline.errors import ConfigError
from pipeline.rebalance import compare, rebalance
from pipeline.rebalance.estimate import comparison_work
from pipeline.rebalance.halving import KEPT, SHARES, SubsetViews, class_sizes, rungs, share_within, subset_rows
from pipeline.rebalance.sweep import Sweep
from tests.rebalance.test_unfinished import contents, in_child
from tests.small_run import made_store

COUNTS = (400, 150, 40, 12, 5)
QUICK: dict = {"epochs": 2, "batch_size": 32, "lr": 0.02, "seeds": (0, 1), "trials": 6}
METHODS = ("cb", "iwb", "crt", "logistic", "logistic-balanced", "gda")


@given(st.lists(st.integers(1, 600), min_size=1, max_size=8), st.sampled_from(SHARES))
def test_a_share_is_stratified_and_few_shot_classes_keep_all(counts, share):
    counts = np.array(counts)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = subset_rows(labels, counts, share)
    assert len(set(rows)) == len(rows)
    sizes = np.bincount(labels[rows], minlength=len(counts))
    np.testing.assert_array_equal(sizes, class_sizes(counts, share))
    assert (sizes == counts)[counts <= KEPT].all()
    assert (sizes == np.maximum(np.ceil(share * counts), KEPT))[counts > KEPT].all()
    larger = subset_rows(labels, counts, min(1.0, 3 * share))
    assert set(rows) <= set(larger)


@given(st.integers(1, 200), st.sampled_from(SHARES))
def test_each_rung_has_a_third_of_the_settings_and_the_last_all_rows(settings, share):
    ladder = rungs(settings, share)
    assert ladder[0] == (settings, share)
    assert ladder[-1][1] == 1
    assert [number for number, _ in ladder] == [math.ceil(settings / 3**i) for i in range(len(ladder))]
    assert [s for _, s in ladder] == pytest.approx([share * 3**i for i in range(len(ladder))])


def test_the_largest_share_within_the_budget_is_taken():
    seconds = {1.0: 100.0, 1 / 3: 60.0, 1 / 9: 40.0, 1 / 27: 45.0}
    shares = [share_within(budget, seconds.__getitem__) for budget in (math.inf, 100, 99, 41, 10)]
    assert shares == [1.0, 1.0, 1 / 3, 1 / 9, 1 / 9]


def test_views_of_a_part_are_rows_of_the_whole():
    views = [np.arange(12.0).reshape(6, 2) + v for v in (0, 100)]
    part = SubsetViews(views, np.array([0, 4]))
    assert len(part) == 2
    for v in (0, 1, 0):
        np.testing.assert_array_equal(part[v], views[v][[0, 4]])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("halving") / "features.zarr", counts=COUNTS)


def test_under_a_small_budget_few_settings_see_all_rows_and_a_note_says_so(store, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "product_seconds", lambda **size: 1.0)
    add = Sweep.add

    def counted(self, heads, **kw):
        add(self, heads, **kw)
        assert len(self.features.labels) == round(self.fraction * sum(COUNTS))

    monkeypatch.setattr(Sweep, "add", counted)
    result = rebalance(store, RebalanceConfig(method=METHODS, budget="1s", **QUICK), out=tmp_path / "out", device="cpu")
    (note,) = [note for note in result.notes if "--budget 1s" in note]
    assert "a class of up to 20 images kept all of them" in note
    assert "1 on all" in note
    counts = np.array(COUNTS)
    fractions = [class_sizes(counts, share).sum() / counts.sum() for share in SHARES]
    for method in ("cb", "iwb", "crt", "logistic"):
        trials = [t for t in result.trials if t["method"] == method]
        assert {round(t["rows"], 6) for t in trials} <= {round(f, 6) for f in fractions}
        assert sum(t["rows"] == 1 for t in trials) < len(trials) / 3
        (best,) = [t for t in trials if t["chosen"]]
        assert best["rows"] == 1
    assert all("rows" not in t for t in result.trials if t["method"] == "gda")
    tested = [row for row in result.results if row.split == "test" and row.method == "cb"]
    assert [row.seed for row in tested] == [0, 1]  # the chosen setting is fitted in all batch orders, on all rows


def test_a_stopped_command_goes_on_with_its_own_thinning(store, tmp_path, monkeypatch):
    """The time of a product, and so the share, may be another one when the command is typed again."""
    config = RebalanceConfig(method=("cb", "iwb", "logistic", "logistic-balanced"), tune=True, budget="1s", **QUICK)
    monkeypatch.setattr(compare, "product_seconds", lambda **size: 1.0)
    rebalance(store, config, out=tmp_path / "whole", device="cpu")
    assert in_child(store, tmp_path / "out", config, "after:method-1", thinned=True) == -9
    assert in_child(store, tmp_path / "out", config, "after:method-3", thinned=False) == -9
    monkeypatch.setattr(compare, "product_seconds", lambda **size: 1e-9)
    rebalance(store, config, out=tmp_path / "out", device="cpu")
    parts = [contents(tmp_path / name) for name in ("whole", "out")]
    for part in parts:
        part["results.json"].pop("notes")  # estimates differ
    assert parts[0] == parts[1]


def test_the_work_of_rungs_is_counted():
    config = RebalanceConfig(method=("crt",), trials=9, epochs=10, seeds=(0, 1))
    counts = np.array([900, 90, 10])  # a third: 300, 30, 10
    work = comparison_work(config, 1 / 3, counts)["crt"]
    assert work.heads == 9 + 3 + 1
    assert work.epochs == pytest.approx((9 * 0.34 + 3 + 1) * 10 * 4)


@pytest.mark.parametrize("text", ["10", "0m", "-1h", "soon"])
def test_a_budget_that_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match="expected a duration such as 90s, 10m or 2h, or none"):
        make_rebalance_config({"rebalance": {"budget": text}}, "test")
