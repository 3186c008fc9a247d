"""The method `iwb-la`: its head is the sum it says it is, its trials are as many as anyone's."""

import numpy as np

from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks, choose_device
from pipeline.rebalance.candidates import head_of, is_trained, schedule_of
from pipeline.rebalance.engine.features import Features, FeatureSplit
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.objective import penalty
from pipeline.rebalance.methods.iwb_la import with_means
from pipeline.rebalance.sweep import Sweep
from pipeline.rebalance.tuning import is_comparison, next_trials
from pipeline.results.head_id import HeadId

COUNTS = np.array([200, 40, 12, 6])


def features(seed):
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), COUNTS)
    centres = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    views = [(centres[labels] + random.normal(size=(len(labels), 8))).astype(np.float32) for _ in range(2)]
    return Features(views, labels, COUNTS, 0.1 * centres, np.log(COUNTS).astype(np.float32))


def test_class_means_are_added_at_a_share_of_the_mean_norm():
    weight, means = np.array([[3.0, 4.0], [0.0, 15.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    got = with_means(weight, np.array([1.0, 2.0]), means, np.array([0.5, -0.5]), 0.5)
    np.testing.assert_allclose(got[0], [[8.0, 4.0], [0.0, 20.0]])  # norms 5 and 15, their mean 10, half of it 5
    np.testing.assert_allclose(got[1], [3.5, -0.5])


def test_its_head_is_the_engines_on_the_clean_view_plus_the_class_means():
    known = features(1)
    sweep = Sweep(known, None, RebalanceConfig(seeds=(3,)), Ranks(0, 1, choose_device("cpu")), chosen_on=None)
    setting = HeadId("iwb-la", "la", 0.6, 0.01, (("means", 0.25),))
    sweep.add([setting])
    schedule = Schedule(lr=0.01, augmented=False)
    weight, bias = fit_heads(known, [Head("ce", 0.6, penalty(), tau=1.0)], seeds=(3,), schedule=schedule)
    x = known.views[0].astype(np.float64)
    middle = x.mean(0)
    unit = (x - middle) / np.linalg.norm(x - middle, axis=1, keepdims=True)
    means = np.stack([unit[known.labels == c].mean(0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    share = 0.25 * np.linalg.norm(weight[0, 0], axis=1).mean()
    head = sweep.heads[setting, 3]
    np.testing.assert_allclose(head.weight, weight[0, 0] + share * means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.bias, bias[0, 0] - share * means @ middle, rtol=1e-5, atol=1e-6)


def test_it_is_tuned_with_as_many_trials_as_others_and_finds_the_small_classes():
    config = RebalanceConfig(method=("iwb-la",), seeds=(0,), batch_size=16, lr=0.05)
    assert is_comparison(config)
    other = features(2)
    sweep = Sweep(
        features(1),
        FeatureSplit(other.views[0], other.labels),
        config,
        Ranks(0, 1, choose_device("cpu")),
        chosen_on=None,
    )
    tried, best = [], None
    while new := next_trials("iwb-la", config, tried, best):
        sweep.add(new)
        tried += new
        best = tried[sweep.choose(tried, "val").index]
    assert len(tried) == len(set(tried)) <= config.trials
    assert len({s.lam for s in tried}) > 2
    few = {s: sweep.scored["val"][s, 0 if is_trained(s) else None].summary["few"] for s in (best, HeadId("baseline"))}
    assert few[best] > few[HeadId("baseline")] + 5


def test_the_default_and_the_logit_adjusted_loss_mean_these_heads():
    config = RebalanceConfig()
    assert config.formulation == "mixed"
    assert head_of(HeadId("iwb", "cb", 0.3), config) == Head("cb-bce", 0.3, penalty("paper"))
    assert head_of(HeadId("cb", "cb"), config) == Head("cb-bce")
    paper = RebalanceConfig(formulation="paper")
    assert head_of(HeadId("iwb", "cb", 0.3), paper) == Head("cb-softmax", 0.3, penalty("paper"))
    assert head_of(HeadId("iwb", "la", 0.3), config) == Head("ce", 0.3, penalty("paper"), tau=1.0)
    assert not schedule_of(config, HeadId("iwb-la", "la", 0.3)).augmented
    assert schedule_of(config, HeadId("iwb", "cb", 0.3)).augmented
    tuned = HeadId("iwb", "cb", 0.3, 0.02, (("views", "clean"), ("weight_decay", 0.03), ("kl_weight", 4.0)))
    schedule = schedule_of(config, tuned)
    assert (schedule.lr, schedule.weight_decay, schedule.augmented) == (0.02, 0.03, False)
    assert head_of(tuned, config) == Head("cb-bce", 0.3, penalty("paper", kl_weight=4.0))
