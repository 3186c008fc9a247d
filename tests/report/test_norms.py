"""Lengths of class vectors: of the run's own heads, of other methods, of the target; and how they go with class size."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rebalance.engine.objective import hardness_coefficient, number_coefficient, target
from pipeline.report import norm_targets as lengths
from pipeline.report.norm_targets import maxnorm, target_norms, target_of, tau_norm
from pipeline.report.norms import norm_against_size, pearson, spearman, weight_norms
from pipeline.report.study import read_study
from tests.small_run import made_run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run in which τ-norm and MaxNorm competed."""
    methods = ("iwb", "tau-norm", "maxnorm")
    return made_run(tmp_path_factory.mktemp("norms") / "tuned", method=methods, trials=2, lam="0.1")


def test_weight_norms_are_those_of_the_heads_largest_class_first(run):
    study = read_study(run)
    drawing = weight_norms(study)
    assert [row["images"] for row in drawing.table] == [150, 60, 30, 12, 5]
    facts, weight, _ = study.first.heads
    mine = [i for i, f in enumerate(facts) if f["lam"] == study.first.selected.lam and f["method"] == "iwb"]
    expected = np.linalg.norm(weight[mine].astype(np.float64), axis=2).mean(0)
    np.testing.assert_allclose(
        [row[str(study.first.selected)] for row in drawing.table], expected[study.by_size], atol=1e-4
    )
    before = np.linalg.norm(study.first.store.classifier[0], axis=1)
    np.testing.assert_allclose([row["stage 1"] for row in drawing.table], before[study.by_size], atol=1e-4)


def test_target_norms_are_the_mean_target_of_the_objective(run):
    backbone = read_study(run).first
    facts, weight, _ = backbone.heads
    first = next(i for i, f in enumerate(facts) if backbone.selected.matches(f))
    vectors, features = (
        torch.from_numpy(weight[first]).double(),
        torch.from_numpy(backbone.store.read("train")).double(),
    )
    labels = torch.from_numpy(backbone.store.labels("train"))
    number = number_coefficient(torch.from_numpy(backbone.store.counts).double())
    expected = target(number, hardness_coefficient(vectors, features, labels), backbone.selected.lam).mean(0)
    found = torch.from_numpy(target_norms(backbone, target_of(backbone))).double()
    torch.testing.assert_close(found - found.mean(), expected - expected.mean(), atol=1e-5, rtol=0)
    assert float(found.mean()) == pytest.approx(backbone.norms(backbone.selected).mean(), abs=1e-5)


@pytest.mark.parametrize("setting", [{"hardness": "scalar"}, {"number": False}, {"divergence": "mse"}])
def test_no_target_is_drawn_that_the_figure_does_not_know(tmp_path, setting):
    study = read_study(made_run(tmp_path / "run", lam="0.3", **setting))
    assert target_of(study.first) is None
    assert [row.get("NC · HC, the target P over λ") for row in norm_against_size(study).table] == [None] * 7


def test_tau_norm_and_maxnorm_are_those_that_the_run_tuned(tuned):
    backbone = read_study(tuned).first
    facts, weight, _ = backbone.heads
    kept = {f["method"]: np.linalg.norm(weight[i], axis=1) for i, f in enumerate(facts) if f.get("seed") in (0, None)}
    of_tau, of_max = tau_norm(backbone), maxnorm(backbone)
    chosen = {c["method"]: c["parameters"] for c in backbone.results["chosen"]}
    assert of_tau.name == f"τ-norm, τ = {chosen['tau-norm']['tau']:g}"
    before = np.linalg.norm(backbone.store.classifier[0].astype(np.float64), axis=1)
    expected = before ** (1 - chosen["tau-norm"]["tau"])
    np.testing.assert_allclose(of_tau.norms, expected * before.mean() / expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(of_tau.norms / of_tau.norms[0], kept["tau-norm"] / kept["tau-norm"][0], rtol=1e-5)
    np.testing.assert_allclose(of_max.norms, backbone.norms(lengths.MAXNORM))
    assert "own head" in of_max.source
    assert "MaxNorm is not drawn" not in weight_norms(read_study(tuned)).caption


def test_without_them_tau_is_the_literatures_and_maxnorm_is_left_out_and_both_are_said(run):
    study = read_study(run)
    store, drawing = study.first.store, weight_norms(study)
    before = np.linalg.norm(store.classifier[0].astype(np.float64), axis=1)
    shown = [row["τ-norm, τ = 0.7"] for row in drawing.table]
    scaled = before**0.3 * before.mean() / (before**0.3).mean()
    np.testing.assert_allclose(shown, scaled[study.by_size], atol=1e-4)
    assert "Kang et al." in drawing.caption
    assert not [column for column in drawing.table[0] if "MaxNorm" in column]
    assert "MaxNorm is not drawn" in drawing.caption


def test_correlations_by_hand():
    assert pearson(np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx(1)
    assert pearson(np.array([1.0, 2, 3]), np.array([1.0, 0, 2])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 10, 100]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert pearson(np.array([1.0, 1, 1]), np.array([1.0, 0, 2])) is None


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=2, max_size=30))
def test_correlations_are_those_of_scipy(pairs):
    x, y = (np.array(values, float) for values in zip(*pairs, strict=True))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert pearson(x, y) is None
        assert spearman(x, y) is None
        return
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)


def test_size_figure_shows_norms_coefficients_and_their_correlations(run):
    study = read_study(run)
    drawing = norm_against_size(study)
    first, second, *classes = drawing.table
    counts = study.counts[study.by_size]
    norms = [row["stage 1"] for row in classes]
    assert first["pearson"] == pytest.approx(scipy.stats.pearsonr(np.log(counts), norms).statistic, abs=1e-3)
    assert second["name"] == f"correlation of ln N with {study.first.selected}"
    number = np.log2(counts.sum() / (counts + 1))
    assert [row["number coefficient NC"] for row in classes] == pytest.approx(number, abs=1e-3)
    aim = target_of(study.first).norms[study.by_size] / study.first.selected.lam
    assert [row["NC · HC, the target P over λ"] for row in classes] == pytest.approx(aim, abs=1e-3)
    title = drawing.figure.axes[0].get_title("left")
    assert f"r {first['pearson']:+.2f} → {second['pearson']:+.2f}".replace("-", "−") in title


def test_balanced_classes_have_no_correlation_and_draw(tmp_path):
    study = read_study(made_run(tmp_path / "run", counts=(30,) * 5, lam="0.1"))
    drawing = norm_against_size(study)
    assert [row["pearson"] for row in drawing.table[:2]] == [None, None]
    drawing.figure.canvas.draw()


def test_the_natural_logarithm_of_the_authors_code_is_said(tmp_path):
    drawing = norm_against_size(read_study(made_run(tmp_path / "run", lam="0.1", formulation="code")))
    assert "base e" in drawing.figure.axes[1].get_ylabel()
    counts = np.array([150, 60, 30, 12, 5])
    expected = np.log(counts.sum() / (counts + 1))
    assert [row["number coefficient NC"] for row in drawing.table[2:]] == pytest.approx(expected, abs=1e-3)


def test_a_chosen_method_is_drawn_once(tuned):
    study = read_study(tuned)
    chosen = replace(study, backbones=[replace(study.first, selected=lengths.TAU_NORM)])
    columns = weight_norms(chosen).table[0].keys()
    assert "tau-norm" in columns
    assert not [column for column in columns if "τ-norm" in column]
