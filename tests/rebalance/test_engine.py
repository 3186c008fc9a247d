"""The engine computes by hand what autograd and torch.optim.SGD compute from the readable objective."""

import itertools
import math
import shutil
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rebalance.engine import c_backend as native
from pipeline.rebalance.engine.batches import batch_order
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads, plan
from pipeline.rebalance.engine.objective import iwb_objective, penalty
from pipeline.rebalance.engine.tensor_backend import stacked

COUNTS = np.array([23, 11, 6, 3, 2])
SHORT = Schedule(epochs=3, lr=0.05, momentum=0.9, weight_decay=0.01, batch_size=8)
CB = {"ce": None, "cb-softmax": "softmax", "cb-bce": "bce"}


ENGINES = [None, *(["double"] if native.instruction_sets() else [])]  # both in float64: tensors, and the kernel


def test_the_kernel_was_built_if_there_is_a_compiler():
    assert native.instruction_sets() or not shutil.which("cc"), "install the package again: pip install -e '.[dev]'"


@pytest.fixture(scope="module")
def features():
    random = np.random.default_rng(5)
    labels = random.permutation(np.repeat(np.arange(5), COUNTS))
    centres = random.normal(size=(5, 6))
    views = centres[labels] + random.normal(size=(3, len(labels), 6))
    return Features(views, labels, COUNTS, random.normal(size=(5, 6)), random.normal(size=5))


def by_autograd(features, head, seed, schedule, rows=None):
    """(weight, bias) by the objective, autograd and torch.optim.SGD in float64.

    With head.tau the objective is taken at the bias plus τ·ln π, of which its classification loss alone takes notice.
    """
    rows = np.arange(len(features.labels)) if rows is None else rows
    weight = torch.tensor(features.weight, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(features.bias, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD(
        [weight, bias], schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )
    rule, prior = head.penalty, torch.tensor(features.counts / features.counts.sum()).log()
    for epoch in range(schedule.epochs):
        optimiser.param_groups[0]["lr"] = schedule.lr * 0.5 * (1 + math.cos(math.pi * epoch / schedule.epochs))
        order = rows[batch_order(len(rows), seed=seed, epoch=epoch)]
        view = features.views[1 + epoch % 2 if schedule.augmented else 0]
        for first in range(0, len(rows), schedule.batch_size):
            take = order[first : first + schedule.batch_size]
            loss = iwb_objective(
                weight,
                bias + head.tau * prior,
                torch.tensor(view[take], dtype=torch.float64),
                torch.tensor(features.labels[take]),
                features.counts,
                head.lam,
                cb=CB[head.loss],
                hardness=rule.hardness,
                kl_weight=rule.kl_weight,
                log_base=rule.log_base,
                direction=rule.direction,
                divergence=rule.divergence,
                detach_target=rule.detach_target,
                number=rule.number,
                beta=head.beta,
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return weight.detach().numpy(), bias.detach().numpy()


def assert_equal(fitted, expected, tolerance=1e-11):
    np.testing.assert_allclose(fitted[0], expected[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(fitted[1], expected[1], rtol=tolerance, atol=tolerance)


PENALTIES = [
    *itertools.product(
        ["vector", "scalar", "none"], ["norms-to-target", "target-to-norms"], ["kl"], [True, False], [0.7, "batch"]
    ),
    *itertools.product(["vector", "scalar", "none"], ["norms-to-target"], ["mse"], [True, False], [0.7, "batch"]),
]


@pytest.mark.parametrize(("hardness", "direction", "divergence", "detach", "kl_weight"), PENALTIES)
def test_every_penalty_is_what_autograd_computes(features, hardness, direction, divergence, detach, kl_weight):
    """By tensors, by the kernel, and by three threads of the kernel that share each head."""
    rule = penalty(
        hardness=hardness, direction=direction, divergence=divergence, detach_target=detach, kl_weight=kl_weight
    )
    heads = [Head("cb-softmax", 0.4, rule), Head("cb-softmax", 0.9, rule)]
    expected = [[by_autograd(features, head, seed, SHORT) for head in heads] for seed in (0, 3)]
    for kernel in ENGINES:
        weight, bias = fit_heads(features, heads, seeds=(0, 3), schedule=SHORT, dtype=torch.float64, kernel=kernel)
        for s, k in itertools.product(range(2), range(2)):
            assert_equal((weight[s, k], bias[s, k]), expected[s][k])
    with three_threads_on_one_head():
        weight, bias = fit_heads(features, heads[1:], seeds=(3,), schedule=SHORT, dtype=torch.float64)
    assert_equal((weight[0, 0], bias[0, 0]), expected[1][1])


@contextmanager
def three_threads_on_one_head():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "SHARED", 0)
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", ENGINES)
@pytest.mark.parametrize("loss", CB)
@pytest.mark.parametrize("formulation", ["paper", "code"])
@pytest.mark.parametrize("number", [True, False])
def test_every_loss_is_what_autograd_computes(features, loss, formulation, number, kernel):
    head = Head(loss, 0.3, penalty(formulation, number=number), beta=0.9)
    weight, bias = fit_heads(features, [head], seeds=(1,), schedule=SHORT, dtype=torch.float64, kernel=kernel)
    assert_equal((weight[0, 0], bias[0, 0]), by_autograd(features, head, 1, SHORT))


@pytest.mark.parametrize("kernel", [None, *(name for name in native.instruction_sets() if name != "double")])
@pytest.mark.parametrize("classes", [5, 16, 17, 67])
def test_every_instruction_set_computes_the_same_in_float32(kernel, classes):
    """Numbers of classes with and without padding; a width and a batch that fill no register tile."""
    random = np.random.default_rng(classes)
    labels = random.permutation(np.repeat(np.arange(classes), 3 + np.arange(classes) % 4))
    centres = random.normal(size=(classes, 13))
    views = (centres[labels] + random.normal(size=(3, len(labels), 13))).astype(np.float32)
    weight, bias = 0.3 * random.normal(size=(classes, 13)), random.normal(size=classes)
    many = Features(views, labels, np.bincount(labels), weight, bias)
    schedule = Schedule(epochs=2, lr=0.05, batch_size=9)
    for head in (Head("cb-softmax", 0.5, penalty()), Head("cb-bce", 0.5, penalty("code", kl_weight=1.0))):
        fitted = fit_heads(many, [head], seeds=(1,), schedule=schedule, kernel=kernel)
        expected = by_autograd(many, head, 1, schedule)
        assert_equal((fitted[0][0, 0], fitted[1][0, 0]), expected, 2e-5)


@pytest.mark.skipif("double" not in native.instruction_sets(), reason="the kernel was not built")
def test_the_kernel_for_double_precision_refuses_float32(features):
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        fit_heads(features, [Head("ce")], seeds=(0,), schedule=SHORT, kernel="double", dtype=torch.float32)


def test_threads_that_share_a_head_give_the_head_of_one(features):
    head = Head("cb-softmax", 0.5, penalty())
    alone = fit_heads(features, [head], seeds=(0,), schedule=SHORT)
    with three_threads_on_one_head():
        shared = fit_heads(features, [head], seeds=(0,), schedule=SHORT)
    assert_equal(shared, alone, 1e-5)


def test_logits_far_apart_neither_overflow_nor_turn_into_nan(features):
    loud = Features(features.views * 1e4, features.labels, COUNTS, features.weight, features.bias)
    for kernel in [None, *native.instruction_sets()]:
        dtype = torch.float64 if kernel == "double" else torch.float32
        weight, _ = fit_heads(loud, [Head("ce")], seeds=(0,), schedule=SHORT, kernel=kernel, dtype=dtype)
        assert np.isfinite(weight).all()


@pytest.mark.parametrize("kernel", ENGINES)
def test_heads_of_all_kinds_fitted_together_are_those_fitted_alone(features, monkeypatch, kernel):
    monkeypatch.setattr("pipeline.rebalance.engine.tensor_backend.CPU_STACK_LOGITS", 3 * 2 * 5 * 8)
    heads = [
        Head("ce"),
        Head("cb-softmax", 0.5, penalty()),
        Head("cb-bce", 0.2, penalty("code")),
        Head("cb-softmax"),
        Head("ce", 0.1, penalty(kl_weight=3.0)),
        Head("cb-softmax", 0.5, penalty(log_base="e", number=False)),
        Head("cb-softmax", 0.0, penalty(), beta=0.5),
        Head("cb-bce"),
        Head("ce", 0.7, penalty(hardness="scalar")),
        Head("ce", 0.4, penalty(), tau=1.0),
        Head("cb-softmax", tau=0.5),
        Head("ce", 0.4, penalty("code", hardness="scalar"), tau=0.7),
    ]
    weight, bias = fit_heads(features, heads, seeds=(0, 7), schedule=SHORT, dtype=torch.float64, kernel=kernel)
    for s, seed in enumerate((0, 7)):
        for k, head in enumerate(heads):
            assert_equal((weight[s, k], bias[s, k]), by_autograd(features, head, seed, SHORT))


@pytest.mark.parametrize("kernel", [None, *list(native.instruction_sets())[:1]])
def test_float32_stacks_equal_solo_fits_to_rounding(features, kernel):
    heads = [Head("cb-softmax", lam, penalty()) for lam in (0.0, 0.3, 0.8)] + [Head("ce")]
    stacked = fit_heads(features, heads, seeds=(0, 1), schedule=SHORT, kernel=kernel)
    assert stacked[0].dtype == np.float32
    for s, k in itertools.product(range(2), range(4)):
        solo = fit_heads(features, [heads[k]], seeds=(s,), schedule=SHORT, kernel=kernel)
        assert_equal((stacked[0][s, k], stacked[1][s, k]), (solo[0][0, 0], solo[1][0, 0]), 1e-5)
    assert np.abs(stacked[0][0] - stacked[0][1]).max() > 1e-3, "two seeds must see two orders"


@pytest.mark.parametrize("kernel", ENGINES)
def test_few_bytes_mean_more_passes_and_the_same_heads(features, kernel):
    heads = [Head("cb-softmax", lam, penalty()) for lam in (0.0, 0.3, 0.8)] + [Head("cb-bce")]
    fit = partial(fit_heads, features, heads, seeds=(0,), schedule=SHORT, dtype=torch.float64, kernel=kernel)
    once, often = fit(), fit(memory_bytes=1)
    assert_equal(once, often, 1e-12)


@pytest.mark.parametrize("kernel", ENGINES)
def test_small_blocks_change_nothing(features, monkeypatch, kernel):
    heads = [Head("cb-softmax", 0.3, penalty("code"))]
    fit = partial(fit_heads, features, heads, seeds=(0, 1), schedule=SHORT, dtype=torch.float64, kernel=kernel)
    once = fit()
    monkeypatch.setattr("pipeline.rebalance.engine.batches.BLOCK_BYTES", {"cpu": 1})
    monkeypatch.setattr("pipeline.rebalance.engine.c_backend.PIECE_BYTES", 1)
    assert_equal(once, fit(), 1e-12)


def test_a_fold_sees_its_rows_and_keeps_the_counts_of_all(features):
    rows = np.arange(0, 45, 2)
    head = Head("cb-softmax", 0.3, penalty())
    weight, bias = fit_heads(features, [head], seeds=(2,), schedule=SHORT, rows=rows, dtype=torch.float64)
    assert_equal((weight[0, 0], bias[0, 0]), by_autograd(features, head, 2, SHORT, rows))


def test_clean_views_see_view_0_alone(features):
    schedule = Schedule(epochs=3, lr=0.05, batch_size=8, augmented=False)
    head = Head("ce")
    weight, bias = fit_heads(features, [head], seeds=(2,), schedule=schedule, dtype=torch.float64)
    assert_equal((weight[0, 0], bias[0, 0]), by_autograd(features, head, 2, schedule))


def test_batch_order_is_a_permutation_of_seed_and_epoch():
    one = batch_order(50, seed=1, epoch=2)
    assert sorted(one) == list(range(50))
    assert (one == batch_order(50, seed=1, epoch=2)).all()
    assert (one != batch_order(50, seed=1, epoch=3)).any()
    assert (one != batch_order(50, seed=2, epoch=2)).any()


def test_plan_is_even_and_covers_every_head_once():
    assert plan(10, 1, 4) == [(0, 3), (3, 6), (6, 10)]
    assert plan(3, 100, 1) == [(0, 1), (1, 2), (2, 3)]
    assert plan(5, 1, 5) == [(0, 5)]


@given(
    st.lists(st.sampled_from(["ce", "cb-softmax", "cb-bce"]), min_size=1, max_size=20),
    st.integers(1, 5),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_stacks_hold_every_head_once_and_like_beside_like(losses, most, threads, random):
    kinds = [penalty(), penalty(hardness="scalar"), penalty(kl_weight=0.0), penalty(kl_weight=9.0)]
    heads = [Head(loss, 0.1, random.choice(kinds)) for loss in losses]
    stacks = stacked(heads, most, threads)
    assert sorted(i for stack in stacks for i in stack) == list(range(len(heads)))
    for stack in stacks:
        assert 1 <= len(stack) <= most
        assert len({heads[i].form for i in stack if heads[i].penalised}) <= 1
        assert len({heads[i].form.cb for i in stack}) == 1
        weightings = [heads[i].weighting for i in stack]
        assert len(list(itertools.groupby(weightings))) == len(set(weightings)), "one product for each weighting"
