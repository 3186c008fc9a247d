"""Which settings are tried when methods compete, and what is refused."""

import math

import pytest

from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS, RECOMMENDED
from pipeline.rebalance.candidates import HeadId, method_names
from pipeline.rebalance.methods import FREE, RIVALS, TRAINED
from pipeline.rebalance.tuning import (
    axes_of,
    centre_of,
    edges,
    is_comparison,
    lams_of,
    learning_rates,
    next_trials,
    numbers,
    rates_around,
    refuse_double_balancing,
)

FREE_NAMES = {rule.name for rule in FREE}


def test_the_names_are_those_of_the_rules():
    assert {*METHODS} == {"baseline", "ce", "cb", "iwb", "iwb-la", "ensemble", *RIVALS}
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


TRAINED_NAMES = [m for m in METHODS if m not in ("baseline", "ensemble") and m not in FREE_NAMES]


@pytest.mark.parametrize("trials", [30, 20, 7, 3, 2, 1])
@pytest.mark.parametrize("method", TRAINED_NAMES)
@pytest.mark.parametrize("wanted", [1e-6, 0.004, 1e3])
def test_nothing_trained_has_more_trials_and_every_axis_is_tried(method, trials, wanted):
    config = RebalanceConfig(method=(method,), trials=trials, lam="0.02,0.05,0.1,0.2,0.5,1")
    tried, _ = search(method, config, lambda s: -abs(math.log(s.lr / wanted)))
    assert len(set(tried)) == len(tried) <= trials
    assert all(s.method == method and s.lr for s in tried)
    if trials >= 20:
        for axis in axes_of(method, config):
            assert all(point in [axis.point_of(trial) for trial in tried] for point in axis.points)
        assert len({trial.lr for trial in tried}) == 8  # five of the ladder, three around the best


def test_each_axis_is_searched_at_the_best_of_the_others():
    def score(s):
        values = dict(s.values)
        fits = [values.get("views") == "clean", values.get("weight_decay") == 0.03, s.lam == 0.1]
        return sum(fits) - abs(math.log(s.lr / 0.02)) - abs(math.log2(values.get("kl_weight", 1) / 4)) / 10

    tried, best = search("iwb", RebalanceConfig(), score)
    assert best.lam == 0.1
    assert dict(best.values) == {"views": "clean", "weight_decay": 0.03, "kl_weight": 4.0}
    assert 0.5 < best.lr / 0.02 < 2
    assert len(tried) <= 20


def test_what_the_configuration_sets_is_not_tuned():
    names = {name for axis in axes_of("iwb", RebalanceConfig()) for name in axis.names}
    assert names == {"views", "weight_decay", "λ", "kl_weight"}
    settings = {"views": "augmented", "weight_decay": 0.01, "kl_weight": 2.0}
    assert [axis.names for axis in axes_of("iwb", RebalanceConfig(**settings))] == [("λ",)]
    assert [axis.names for axis in axes_of("iwb", RebalanceConfig(formulation="code", views="clean"))] == [
        ("λ",),
        ("weight_decay",),
    ]
    own = [axis for axis in axes_of("maxnorm", RebalanceConfig()) if "weight_decay" in axis.names]
    assert [axis.points for axis in own] == [RIVALS["maxnorm"].grid]


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


def test_lambda_shares_the_trials_with_other_settings():
    assert lams_of(RebalanceConfig()) == (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    assert lams_of(RebalanceConfig(lam="0.2")) == (0.2,)
    assert lams_of(RebalanceConfig(lam="0.1,0.2,0.3", trials=1)) == (0.2,)
    twelve = "0.02,0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5,0.6,0.8,1"
    assert len(lams_of(RebalanceConfig(lam=twelve))) == 8
    assert len(lams_of(RebalanceConfig(lam=twelve, trials=144))) == 12
    assert {s.lam for s in next_trials("iwb", RebalanceConfig(lam="0.1,0.2,0.4"))} == {0.2}


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
    assert is_comparison(RebalanceConfig())
    assert method_names(RebalanceConfig().method) == RECOMMENDED
    assert RebalanceConfig(lam=0.05).method == ("iwb",)
    assert not is_comparison(RebalanceConfig(lam=0.05))
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
