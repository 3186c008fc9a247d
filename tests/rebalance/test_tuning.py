"""Which settings are tried when methods compete, and what is refused."""

import math
from dataclasses import replace

import pytest

from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS
from pipeline.rebalance.candidates import HeadId, method_names
from pipeline.rebalance.methods import FREE, RIVALS, TRAINED
from pipeline.rebalance.tuning import (
    centre_of,
    edges,
    is_comparison,
    lams_of,
    learning_rates,
    next_trials,
    numbers,
    rates_around,
    refuse_double_balancing,
    settings_of,
)

FREE_NAMES = {rule.name for rule in FREE}


def test_the_names_are_those_of_the_rules():
    assert {*METHODS} == {"baseline", "ce", "cb", "iwb", "iwb-la", *RIVALS}
    assert method_names(("all",)) == tuple(METHODS)
    with pytest.raises(ConfigError, match=r"--method balanced-sofmax: unknown.*did you mean balanced-softmax"):
        method_names(("balanced-sofmax",))


def search(method, config, score):
    """Every setting tried where the best is always the one with the highest score."""
    tried, best = [], None
    while new := next_trials(method, config, tried, best):
        tried += new
        best = max(tried, key=score)
    return tried, best


TRAINED_NAMES = [m for m in METHODS if m != "baseline" and m not in FREE_NAMES]


@pytest.mark.parametrize("trials", [12, 24, 7, 3, 2, 1])
@pytest.mark.parametrize("method", TRAINED_NAMES)
@pytest.mark.parametrize("wanted", [1e-6, 0.004, 1e3])
def test_everything_trained_has_as_many_trials(method, trials, wanted):
    config = RebalanceConfig(trials=trials, lam="0.02,0.05,0.1,0.2,0.5,1")
    tried, _ = search(method, config, lambda s: -abs(math.log(s.lr / wanted)))
    assert len(set(tried)) == len(tried) == trials
    assert all(s.method == method and s.lr for s in tried)
    if trials >= 7:
        own = {replace(s, lr=None) for s in tried}
        assert own == set(settings_of(method, config))


@pytest.mark.parametrize("rule", TRAINED, ids=lambda rule: rule.name)
def test_the_literature_setting_is_among_the_trials(rule):
    literature = HeadId(rule.name, None, None, rule.lr or 0.04, tuple(rule.grid[0].items()))
    assert literature in next_trials(rule.name, RebalanceConfig(batch_size=rule.batch, lr=0.04))
    assert next_trials(rule.name, RebalanceConfig(batch_size=rule.batch, lr=0.04, trials=1)) == [literature]


def test_the_literature_learning_rate_goes_with_the_batch():
    assert centre_of("crt", RebalanceConfig(batch_size=128)) == pytest.approx(0.1 * 128 / 512)
    assert centre_of("cb", RebalanceConfig(batch_size=128, lr=0.3)) == 0.3


def test_ladders():
    assert learning_rates(0.01, 1) == (0.01,)
    assert learning_rates(0.01, 3) == (0.0025, 0.01, 0.04)
    assert learning_rates(0.01, 6) == (0.000156, 0.000625, 0.0025, 0.01, 0.04, 0.16)
    twelve = learning_rates(1, 12)
    assert twelve[6] == 1
    assert twelve[-1] / twelve[0] == pytest.approx(1024, rel=0.01)


def test_what_is_left_goes_around_the_best_rate_and_beyond_an_end():
    tried = [HeadId("cb", "cb", None, lr) for lr in (0.01, 0.04, 0.16)]
    assert rates_around(tried[1], tried, 4) == [0.08, 0.02, 0.0566, 0.0283]
    assert rates_around(tried[2], tried, 3) == [0.64, 0.32, 2.56]
    assert rates_around(tried[0], tried, 2) == [0.0025, 0.005]


@pytest.mark.parametrize("wanted", [1e-4, 3e-4, 0.002, 0.011, 0.05, 0.3])
def test_the_search_comes_near_the_best_rate_and_finds_the_best_value(wanted):
    def score(s):
        return -abs(math.log(s.lr / wanted)) - abs(dict(s.values)["rho"] - 1.6)

    tried, best = search("grw", RebalanceConfig(lr=0.005), score)
    assert dict(best.values)["rho"] == 1.6
    assert 0.4 < best.lr / wanted < 2.5
    assert not [b for b in edges(best, tried) if b.startswith("lr")]


def test_lambda_shares_the_trials_with_the_learning_rate():
    assert lams_of(RebalanceConfig()) == (0.05, 0.15, 0.5)
    assert lams_of(RebalanceConfig(lam="0.2")) == (0.2,)
    assert lams_of(RebalanceConfig(lam="0.1,0.2,0.3,0.4,0.5")) == (0.1, 0.3, 0.5)
    assert lams_of(RebalanceConfig(lam="0.1,0.2,0.3", trials=1)) == (0.2,)
    twelve = "0.02,0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5,0.6,0.8,1"
    assert lams_of(RebalanceConfig(lam=twelve)) == (0.1, 0.3, 0.8)
    assert len(lams_of(RebalanceConfig(lam=twelve, trials=144))) == 12
    first = next_trials("iwb", RebalanceConfig(lam="0.1,0.2,0.4"))
    assert {s.lam for s in first} == {0.2}
    assert len(first) == 6
    then = next_trials("iwb", RebalanceConfig(lam="0.1,0.2,0.4"), first, first[1])
    assert [(s.lam, s.lr) for s in then] == [(0.1, first[1].lr), (0.4, first[1].lr)]


def test_the_border_of_a_grid_is_told():
    tried = [HeadId("x", None, None, lr, (("rho", rho),)) for lr in (0.1, 0.2, 0.4) for rho in (1.0, 2.0)]
    assert edges(tried[0], tried) == ["lr 0.1 (0.1 … 0.4)"]  # two values of rho have nothing between them
    assert edges(tried[2], tried) == []
    assert edges(tried[4], tried) == ["lr 0.4 (0.1 … 0.4)"]
    kinds = next_trials("logit-adjust", RebalanceConfig())
    last = next(s for s in kinds if dict(s.values) == {"tau": 1.0, "form": "multiplicative"})
    assert edges(last, kinds) == ["tau 1 (0 … 1)"]  # although the additive form goes on to 2
    assert numbers(last) == {"tau": 1.0}


def test_methods_are_tuned_where_they_compete_with_a_rival():
    assert not is_comparison(RebalanceConfig(method=("cb", "iwb")))
    assert is_comparison(RebalanceConfig(method=("cb", "iwb"), tune=True))
    assert is_comparison(RebalanceConfig(method=("iwb", "ncm")))
    assert is_comparison(RebalanceConfig(method=("all",)))


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("balanced-softmax", {"sampling": "class-balanced"}, "prior in it and class-balanced sampling"),
        ("balanced-softmax", {"weighting": "class-balanced"}, "prior in it and class weights"),
        ("grw", {"sampling": "class-balanced"}, "class weights and class-balanced sampling"),
        ("crt", {"weighting": "class-balanced"}, "class weights and class-balanced sampling"),
        ("iif-trained", {"sampling": "class-balanced"}, "iif-trained: .* twice; .*--force-double-balancing"),
    ],
)
def test_double_balancing_is_refused_unless_forced(method, settings, said):
    with pytest.raises(ConfigError, match=said):
        refuse_double_balancing(RebalanceConfig(method=(method,), **settings))
    refuse_double_balancing(RebalanceConfig(method=(method,), force_double_balancing=True, **settings))


def test_balancing_once_is_allowed():
    refuse_double_balancing(RebalanceConfig(method=("all",)))
    refuse_double_balancing(RebalanceConfig(method=("focal", "tau-norm"), sampling="class-balanced"))
    refuse_double_balancing(RebalanceConfig(method=("grw",), sampling="class-balanced", weighting="none"))
    with pytest.raises(ConfigError, match="cb samples instances"):
        refuse_double_balancing(RebalanceConfig(method=("crt", "cb"), sampling="instance"))
