"""Differences between rows: against a bootstrap that draws every sample, and against what variance must be."""

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.results.differences import Hits, differences, paired_difference, read_hits

COUNTS = np.array([500, 300, 120, 60, 40, 12, 4])
GROUPS = {"all": slice(None), "many": slice(0, 3), "medium": slice(3, 5), "few": slice(5, 7)}


def made(seed=0, seeds=3):
    """Labels, 20 to 50 samples a class, and how often of `seeds` two related classifiers are right on each."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(7), random.integers(20, 50, 7)))
    level = random.random((seeds, len(labels))) * 0.3 + random.random(len(labels))
    return labels, (level < 0.8).mean(0), (level < 0.7).mean(0)


def brute_force(first, second, labels, *, resamples):
    """Differences (resamples, 4) in float64: indices drawn with replacement, class by class, used for both."""
    random, means = np.random.default_rng(99), np.empty((2, resamples, 7))
    for c in range(7):
        mine = np.flatnonzero(labels == c)
        drawn = mine[random.integers(0, len(mine), (resamples, len(mine)))]
        for k, of in enumerate((first, second)):
            means[k, :, c] = of[drawn].mean(1)
    return {g: 100 * (means[0][:, s].mean(1) - means[1][:, s].mean(1)) for g, s in GROUPS.items()}


def test_the_intervals_are_those_of_a_bootstrap_by_brute_force():
    labels, first, second = made()
    found = paired_difference(first, second, labels, COUNTS, resamples=40_000)
    expected = brute_force(first, second, labels, resamples=40_000)
    for group, drawn in expected.items():
        error = 4 * drawn.std() / 40_000**0.5 / 0.3  # of a quantile at 2.5 %, four standard errors
        assert found[group]["low"] == pytest.approx(np.quantile(drawn, 0.025), abs=error)
        assert found[group]["high"] == pytest.approx(np.quantile(drawn, 0.975), abs=error)
        per_class = [100 * (first - second)[labels == c].mean() for c in range(7)]
        assert found[group]["difference"] == pytest.approx(np.mean(per_class[GROUPS[group]]))


def test_the_width_is_that_of_the_analytic_variance():
    """Of a mean over classes of class means: the sum over classes of variance/m, over the number of classes squared."""
    labels = np.repeat(np.arange(7), 400)
    first, second = (np.random.default_rng(s).random(2800) < p for s, p in ((1, 0.7), (2, 0.6)))
    found = paired_difference(first.astype(float), second.astype(float), labels, COUNTS, resamples=20_000)
    for group, taken in GROUPS.items():
        variance = [np.var(first[labels == c] * 1.0 - second[labels == c]) / 400 for c in range(7)][taken]
        half = 100 * 1.96 * np.sqrt(sum(variance)) / len(variance)
        assert (found[group]["high"] - found[group]["low"]) / 2 == pytest.approx(half, rel=0.03)


def test_pairing_narrows_the_interval():
    """10 of 7,000 samples differ; unpaired, the noise of both classifiers would reach a point to either side."""
    labels, random = np.repeat(np.arange(7), 1000), np.random.default_rng(0)
    second = (random.random(7000) < 0.5).astype(float)
    first = second.copy()
    first[np.flatnonzero(second == 0)[:10]] = 1
    found = paired_difference(first, second, labels, COUNTS)["all"]
    assert found["difference"] == pytest.approx(100 * 10 / 7000)
    assert 0 < found["low"] < found["difference"] < found["high"] < 0.3


def test_classes_drawn_together_are_drawn_as_if_apart():
    """40 equal classes of 5 samples each, one of them right in a single classifier."""
    labels, counts = np.repeat(np.arange(40), 5), np.full(40, 10)
    first, second = np.tile([1.0, 0, 0, 0, 0], 40), np.zeros(200)
    found = paired_difference(first, second, labels, counts, resamples=20_000)
    half = 100 * 1.96 * np.sqrt(0.2 * 0.8 / (5 - 1) / 40)  # the variance over other samples, not over draws of these
    assert found["few"] == found["all"]
    assert (found["all"]["high"] - found["all"]["low"]) / 2 == pytest.approx(half, rel=0.05)
    assert found["many"] is found["medium"] is None


@pytest.mark.parametrize("images", [2, 3, 10])
def test_intervals_cover_the_truth_with_few_images_a_class(images):
    """50 classes; the first head is right with probability 0.6, the second with 0.5, each on its own: the truth is 10 points."""
    random, labels = np.random.default_rng(images), np.repeat(np.arange(50), images)
    covered = []
    for _ in range(400):
        first, second = (random.random(len(labels)) < p for p in (0.6, 0.5))
        column = paired_difference(first * 1.0, second * 1.0, labels, np.full(50, 10))["all"]
        covered.append(column["low"] <= 10 <= column["high"])
    assert 0.91 <= np.mean(covered) <= 0.98  # 0.95, with a standard error of 0.011


def test_equal_rows_differ_by_nothing_and_classes_without_samples_are_left_out():
    labels, first, _ = made()
    assert paired_difference(first, first, labels, COUNTS)["all"] == {"difference": 0, "low": 0, "high": 0}
    seen = labels != 6
    alone = paired_difference(first[seen], np.zeros(seen.sum()), labels[seen], COUNTS)
    assert alone["few"]["difference"] == pytest.approx(100 * first[labels == 5].mean())


def test_the_same_seed_gives_the_same_interval():
    labels, first, second = made()
    assert paired_difference(first, second, labels, COUNTS) == paired_difference(first, second, labels, COUNTS)
    assert paired_difference(first, second, labels, COUNTS) != paired_difference(first, second, labels, COUNTS, seed=1)


def facts(method, lam=None):
    return {"method": method, "loss": "cb", "lam": lam}


def test_rows_are_means_over_seeds_then_over_backbones_and_survive_the_disk(tmp_path):
    labels, counts = np.repeat(np.arange(2), 3), np.array([200, 5])
    heads = [facts("iwb", 0.1) | {"seed": 0}, facts("iwb", 0.1) | {"seed": 1}, facts("cb") | {"seed": 0}]
    first = Hits(heads, np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6], bool), labels, counts)
    second = Hits(heads, np.array([[1] * 6, [1] * 6, [0] * 6], bool), labels, counts)
    (tmp_path / "hits").write_bytes(second.to_bytes())
    others = {"baseline": None, "cb": facts("cb"), "runner_up": facts("iwb", 0.1)}
    found = differences(facts("iwb", 0.1), others, [first, read_hits(tmp_path / "hits")])
    assert [row["against"] for row in found["rows"]] == ["cb"]  # neither a missing row nor itself
    # first backbone: 100 and 16.7 % less 0; second: 100 and 100 %
    assert found["rows"][0]["all"]["difference"] == pytest.approx((100 + (100 / 6 + 100) / 2) / 2)
    assert found["rows"][0]["few"]["difference"] == pytest.approx((100 / 6 + 100) / 2)
    assert (found["samples"], found["resamples"], found["level"]) == (6, 2000, 0.95)
    other = Hits(heads, second.hit, labels[::-1], counts)
    with pytest.raises(DataError, match="different samples"):
        differences(facts("iwb", 0.1), others, [first, other])
    (tmp_path / "hits").write_bytes(b"torn")
    with pytest.raises(DataError, match="pipeline rebalance"):
        read_hits(tmp_path / "hits")
