"""Which settings are tried when methods compete, and what is refused."""

import pytest

from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError
from pipeline.method_names import METHODS
from pipeline.rebalance.methods import Setting, asked_methods
from pipeline.rebalance.rivals import FREE, RIVALS, TRAINED
from pipeline.rebalance.tuning import (
    edges,
    is_comparison,
    lams_of,
    learning_rates,
    numbers,
    refuse_double_balancing,
    trials_of,
)

FREE_NAMES = {rule.name for rule in FREE}


def test_the_names_are_those_of_the_rules():
    assert {*METHODS} == {"baseline", "ce", "cb", "iwb", *RIVALS}
    assert asked_methods(("all",)) == tuple(METHODS)
    with pytest.raises(ConfigError, match=r"--method balanced-sofmax: unknown.*did you mean balanced-softmax"):
        asked_methods(("balanced-sofmax",))


@pytest.mark.parametrize("trials", [12, 24, 7, 3, 1])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "baseline" and m not in FREE_NAMES])
def test_nothing_trained_has_more_trials_than_another(method, trials):
    found = trials_of(method, RebalanceConfig(trials=trials, lam="0.02,0.05,0.1,0.2,0.5,1"))
    assert len(set(found)) == len(found) <= trials
    if trials in (12, 24, 1):
        assert len(found) == trials or (method == "iwb" and trials == 24)
    assert all(s.method == method and s.lr for s in found)


@pytest.mark.parametrize("rule", TRAINED, ids=lambda rule: rule.name)
def test_the_literature_setting_is_among_the_trials(rule):
    config = RebalanceConfig(batch_size=rule.batch, lr=0.04)
    found = trials_of(rule.name, config)
    assert Setting(rule.name, None, None, rule.lr or 0.04, tuple(rule.own[0].items())) in found
    only = trials_of(rule.name, RebalanceConfig(batch_size=rule.batch, lr=0.04, trials=1))
    assert only == [Setting(rule.name, None, None, rule.lr or 0.04, tuple(rule.own[0].items()))]


def test_the_literature_learning_rate_goes_with_the_batch():
    (one,) = trials_of("crt", RebalanceConfig(batch_size=128, trials=1))
    assert one.lr == pytest.approx(0.1 * 128 / 512)


def test_ladders():
    assert learning_rates(0.01, 1) == (0.01,)
    assert learning_rates(0.01, 3) == (0.00333, 0.01, 0.03)
    assert learning_rates(0.01, 4) == (0.00111, 0.00333, 0.01, 0.03)
    twelve = learning_rates(0.01, 12)
    assert (twelve[0], twelve[6], twelve[-1]) == (0.000156, 0.01, 0.32)


def test_lambda_shares_the_trials_with_the_learning_rate():
    assert lams_of(RebalanceConfig()) == (0.05, 0.15, 0.5)
    assert lams_of(RebalanceConfig(lam="0.2")) == (0.2,)
    assert lams_of(RebalanceConfig(lam="0.1,0.2,0.3,0.4,0.5")) == (0.1, 0.3, 0.5)
    assert lams_of(RebalanceConfig(lam="0.1,0.2,0.3", trials=1)) == (0.2,)
    assert len(trials_of("iwb", RebalanceConfig(lam="0.2"))) == 12


def test_the_border_of_a_grid_is_told():
    tried = [Setting("x", None, None, lr, (("rho", rho),)) for lr in (0.1, 0.2, 0.4) for rho in (1.0, 2.0)]
    assert edges(tried[0], tried) == ["lr 0.1 (0.1 … 0.4)"]  # two values of rho have nothing between them
    assert edges(tried[2], tried) == []
    assert edges(tried[4], tried) == ["lr 0.4 (0.1 … 0.4)"]
    kinds = trials_of("logit-adjust", RebalanceConfig())
    last = next(s for s in kinds if dict(s.own) == {"tau": 1.0, "form": "multiplicative"})
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
