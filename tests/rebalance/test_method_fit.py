"""One step of every trained rival against an independent float64 formula, and how its trials are fitted together."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import cache
from pipeline.errors import DataError, PipelineError
from pipeline.metrics import scores_of
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Schedule
from pipeline.rebalance.engine.streamed import StreamedViews
from pipeline.rebalance.methods import RIVALS, TRAINED, Free
from pipeline.rebalance.methods.fit import Trial, bytes_of_one, class_balanced_order, fit, passes, solve, stage1_of
from pipeline.rebalance.methods.trained import deferred_weight
from pipeline.results.heads import Gated, Linear, predict
from pipeline.seeds import derive
from tests.markdown import blocks
from tests.small_run import made_store

COUNTS = np.array([9, 4, 2])
PI = COUNTS / 15


def small(seed=0, counts=COUNTS, width=4):
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    return Features(
        [random.normal(size=(len(labels), width)) for _ in range(3)],
        labels,
        counts,
        random.normal(size=(len(counts), width)),
        random.normal(size=len(counts)),
    )


ONE = Schedule(epochs=1, batch_size=15, augmented=False, momentum=0.9, weight_decay=0.03)
FEATURES = small()
W, B = FEATURES.weight, FEATURES.bias
NORMS = np.linalg.norm(W, axis=1)


def log_softmax(z):
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


def ce(z, y):
    return -log_softmax(z)[np.arange(len(y)), y]


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def less_at(z, y, less):
    z = z.copy()
    z[np.arange(len(y)), y] -= less
    return z


def ala(p, x, y):
    cos, q = unit(x) @ unit(p["weight"]).T, np.log(2) / np.log(COUNTS / 2 + 1)
    hardness = (1 - (unit(x) @ unit(W).T)[np.arange(len(y)), y]) / 2  # held at the start of the step
    return ce(30 * less_at(cos, y, hardness * q[y]), y)


def las(p, x, y):
    e = 0.1 + 0.3 * np.sin(np.pi / 2 * (COUNTS - 2) / 7)
    log_p = log_softmax(p["scale"] * (x @ p["weight"].T + p["bias"]))
    target = np.where(np.eye(3)[y] > 0, 1 - e[y][:, None], e[y][:, None] / 2)
    return -(target * log_p).sum(1)


def ldam(p, x, y):
    m = 0.5 * COUNTS**-0.25 / (2**-0.25)
    return ce(30 * less_at(unit(x) @ unit(p["weight"]).T, y, m[y]), y)


def focal(p, x, y):
    surprise = plain(p, x, y)
    return (1 - np.exp(-surprise)) ** 2 * surprise


def plain(p, x, y):
    return ce(x @ p["weight"].T + p["bias"], y)


def align(p, x, y):
    gate = 1 / (1 + np.exp(-(x @ p["v"] + p["e"])))[:, None]
    return ce((1 + gate * p["s"]) * (x @ W.T + B) + gate * p["b"], y)


def layer(p):
    return p["weight"], p["bias"]


def chord(p):
    length = np.linalg.norm(FEATURES.views[0].astype(np.float32), axis=1).mean()
    return unit(p["weight"]) * 30 / length, np.zeros(3)


def new_layer():
    random = np.random.default_rng(derive(7, "start of crt"))
    return {"weight": random.uniform(-0.5, 0.5, (3, 4)), "bias": random.uniform(-0.5, 0.5, 3)}


def gate_start():
    return np.random.default_rng(derive(7, "start of disalign")).normal(0, 0.1, 4)


def binary(p, x, y):
    z = x @ p["weight"].T + p["bias"]
    probability = 1 / (1 + np.exp(-z))
    return -np.where(np.eye(3)[y] > 0, np.log(probability), np.log(1 - probability)).mean(1)


def held(p):
    threshold = NORMS.min() + 0.1 * (NORMS.max() - NORMS.min())
    length = np.linalg.norm(p["weight"], axis=1, keepdims=True)
    return p["weight"] * np.minimum(1, threshold / length), p["bias"]


STAGE_1 = {"weight": W, "bias": B}
CB = (1 - 0.9999) / (1 - 0.9999**COUNTS)
IIF = np.log(16 / (COUNTS + 1)) + 1
EVEN = np.ones(3)
REFERENCE = {  # own values, start, per-sample loss, class weights, weight decay, deployed head
    "focal": ({"gamma": 2.0}, STAGE_1, focal, EVEN, 0.03, layer),
    "grw": ({"rho": 1.2}, STAGE_1, plain, PI**-1.2, 0.03, layer),
    "crt": ({}, new_layer(), plain, EVEN, 5e-4, layer),
    "lws": (
        {},
        {"scale": np.ones(3)},
        lambda p, x, y: ce(p["scale"] * (x @ W.T + B), y),
        EVEN,
        5e-4,
        lambda p: (p["scale"][:, None] * W, p["scale"] * B),
    ),
    "balanced-softmax": (
        {"tau": 0.7},
        STAGE_1,
        lambda p, x, y: ce(x @ p["weight"].T + p["bias"] + 0.7 * np.log(PI), y),
        EVEN,
        0.03,
        layer,
    ),
    "ldam-drw": ({"margin": 0.5, "defer": 0.8}, {"weight": W}, ldam, EVEN, 0.03, chord),
    "maxnorm": ({"form": "bce", "weight_decay": 0.1}, STAGE_1, binary, CB, 0.1, held),
    "marc": (
        {"rho": 1.2},
        {"a": np.ones(3), "b": np.zeros(3)},
        lambda p, x, y: ce(p["a"] * (x @ W.T + B) + p["b"] * NORMS, y),
        PI**-1.2,
        0.03,
        lambda p: (p["a"][:, None] * W, p["a"] * B + p["b"] * NORMS),
    ),
    "disalign": (
        {"rho": 1.2},
        {"s": np.ones(3), "b": np.zeros(3), "v": gate_start(), "e": np.zeros(1)},
        align,
        PI**-1.2,
        0.03,
        lambda p: (W, B, p["s"][:, None] * W, p["s"] * B + p["b"], np.append(p["v"], p["e"])),
    ),
    "iif-trained": (
        {"variant": "smooth"},
        STAGE_1,
        lambda p, x, y: ce(IIF * (x @ p["weight"].T + p["bias"]), y),
        EVEN,
        0.03,
        lambda p: (IIF[:, None] * p["weight"], IIF * p["bias"]),
    ),
    "ala": ({}, {"weight": W}, ala, EVEN, 0.03, chord),
    "las": (
        {"head": 0.4, "tail": 0.1},
        {**STAGE_1, "scale": np.ones(3)},
        las,
        EVEN,
        0.03,
        lambda p: (p["scale"][:, None] * p["weight"], p["scale"] * p["bias"]),
    ),
}


def gradient(loss, params):
    """Central differences, in float64."""
    found = {}
    for name, value in params.items():
        g = np.zeros_like(value)
        for i in np.ndindex(value.shape):
            up, down = value.copy(), value.copy()
            up[i] += 1e-6
            down[i] -= 1e-6
            g[i] = (loss({**params, name: up}) - loss({**params, name: down})) / 2e-6
        found[name] = g
    return found


def test_every_trained_rival_has_a_reference():
    assert set(REFERENCE) == {rule.name for rule in TRAINED}


@pytest.mark.parametrize("name", REFERENCE)
def test_one_step_is_that_of_the_formula(name):
    own, start, loss, weights, decay, head = REFERENCE[name]
    rule, lr = RIVALS[name], 0.3
    rows = np.arange(15)
    if rule.sampling == "class-balanced":
        rows = class_balanced_order(FEATURES.labels, seed=7, epoch=0)
    x, y = FEATURES.views[0][rows], FEATURES.labels[rows]

    def batch_loss(p):
        return (weights[y] * loss(p, x, y)).sum() / weights[y].sum()

    slower = {"weight": 0.2, "bias": 0.2} if name == "las" else {}  # MiSLAS's public code: the scale learns faster
    gradients = {k: slower.get(k, 1.0) * g for k, g in gradient(batch_loss, start).items()}
    moved = {k: start[k] - lr * (g + decay * start[k]) for k, g in gradients.items()}
    if name == "maxnorm":
        moved["weight"] = held(moved)[0]
    [[found]] = fit(rule, [Trial(lr, own)], FEATURES, seeds=(7,), schedule=ONE, dtype=torch.float64)
    assert isinstance(found, Gated if name == "disalign" else Linear)
    for got, expected in zip(found.arrays, head(moved), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(head(moved), head(start), strict=True))


def test_the_documented_example_of_a_new_method_works():
    example = next(b.text for b in blocks("docs/own-method.md") if b.text.startswith("# soft_margin.py"))
    names: dict = {}
    exec(example, names)
    rule = names["SOFT_MARGIN"]
    [[head]] = fit(rule, [Trial(0.3, rule.grid[1])], FEATURES, seeds=(7,), schedule=ONE, dtype=torch.float64)
    x, y = FEATURES.views[0], FEATURES.labels

    def loss(p):
        return ce(less_at(x @ p["weight"].T + p["bias"], y, 0.3 * np.log(COUNTS[y])), y).mean()

    for got, (name, g) in zip(head.arrays, gradient(loss, STAGE_1).items(), strict=True):
        np.testing.assert_allclose(got, STAGE_1[name] - 0.3 * (g + 0.03 * STAGE_1[name]), rtol=1e-5, atol=1e-6)


def test_deferred_weights_begin_late_in_each_trial_at_its_own_time():
    given = stage1_of(FEATURES, torch.device("cpu"), torch.float64)
    own = {"defer": torch.tensor([[0.5], [0.8]], dtype=torch.float64)}
    found = deferred_weight(given, own, 0.6)
    np.testing.assert_allclose(found[0], CB * 3 / CB.sum(), rtol=1e-6)
    assert found[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("rule", TRAINED, ids=lambda rule: rule.name)
def test_fitted_together_or_alone_a_trial_is_the_same(rule):
    trials = [Trial(lr, own) for own in rule.grid for lr in (0.01, 0.1)]
    schedule = Schedule(epochs=3, batch_size=4)
    together = fit(rule, trials, FEATURES, seeds=(0, 3), schedule=schedule, dtype=torch.float64)
    given = stage1_of(FEATURES, torch.device("cpu"), torch.float64)
    little = bytes_of_one(rule, given, 4)
    split = fit(rule, trials, FEATURES, seeds=(0, 3), schedule=schedule, dtype=torch.float64, memory_bytes=little)
    for t, trial in enumerate(trials):
        [[alone]] = fit(rule, [trial], FEATURES, seeds=(3,), schedule=schedule, dtype=torch.float64)
        for a, b, c in zip(together[t][1].arrays, alone.arrays, split[t][1].arrays, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(b, c)
    first, second = (np.concatenate([a.ravel() for a in head.arrays]) for head in together[1])
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.parametrize(("shared", "cores"), [(10**9, 1), (1, 2)], ids=["small", "large"])
def test_cores_share_large_operations_alone_and_are_given_back(shared, cores, monkeypatch):
    before, seen = torch.get_num_threads(), set()
    rule = replace(RIVALS["crt"], project=lambda params, given, own: seen.add(torch.get_num_threads()))
    monkeypatch.setattr("pipeline.rebalance.methods.fit.SHARED_PRODUCT", shared)
    torch.set_num_threads(2)
    try:
        fit(rule, [Trial(0.1, {})], FEATURES, seeds=(0,), schedule=ONE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {cores}


def test_what_does_not_fit_is_split_and_what_cannot_fit_is_said():
    given = stage1_of(FEATURES, torch.device("cpu"), torch.float32)
    rule, trials = RIVALS["grw"], [Trial(0.1, {"rho": 1.0})] * 5
    one = bytes_of_one(rule, given, 8)
    assert passes(rule, trials, given, (0, 1), 8, 100 * one) == [([0, 1, 2, 3, 4], (0, 1))]
    assert passes(rule, trials, given, (0, 1), 8, 4 * one) == [([0, 1], (0, 1)), ([2, 3], (0, 1)), ([4], (0, 1))]
    assert [list(seeds) for _, seeds in passes(rule, trials, given, (0, 1), 8, one)] == [[0]] * 5 + [[1]] * 5
    with pytest.raises(PipelineError, match=r"grw: one trial takes .* GiB .*--batch-size"):
        passes(rule, trials, given, (0, 1), 8, one - 1)
    kinds = [Trial(0.1, {"variant": "raw"}), Trial(0.2, {"variant": "smooth"}), Trial(0.3, {"variant": "raw"})]
    assert passes(RIVALS["iif-trained"], kinds, given, (0,), 8, 100 * one) == [([0, 2], (0,)), ([1], (0,))]


def test_a_large_problem_is_never_taken_whole():
    class Large:
        weight = torch.empty(8142, 2048, device="meta")
        bias = torch.empty(8142, device="meta")

    given = Large()
    rule = replace(RIVALS["grw"], start=lambda given, random: {"weight": given.weight, "bias": given.bias})
    groups = passes(rule, [Trial(0.1, {"rho": 1.0})] * 12, given, (0, 1, 2), 512, 16 << 30)  # type: ignore[arg-type]
    cost = bytes_of_one(rule, given, 512)  # type: ignore[arg-type]
    assert cost > 3 * 8142 * 2048 * 4
    assert max(len(members) * len(seeds) for members, seeds in groups) * cost <= 16 << 30
    assert sum(len(members) * len(seeds) for members, seeds in groups) == 36


def test_class_balanced_order():
    labels = np.repeat(np.arange(4), [50, 10, 3, 1])
    found = class_balanced_order(labels, seed=1, epoch=2)
    assert len(found) == 64
    assert np.bincount(labels[found]).tolist() == [16, 16, 16, 16]
    seen = np.bincount(found, minlength=64)
    for c in range(4):
        of_class = seen[labels == c]
        assert of_class.max() - of_class.min() <= 1  # in turn
    assert (found == class_balanced_order(labels, seed=1, epoch=2)).all()
    assert (found != class_balanced_order(labels, seed=1, epoch=3)).any()
    assert (found != class_balanced_order(labels, seed=2, epoch=2)).any()
    gone = labels[labels != 2]
    assert sorted(np.unique(gone[class_balanced_order(gone, seed=0, epoch=0)])) == [0, 1, 3]


def test_only_the_rows_given_are_seen():
    rows = np.setdiff1d(np.arange(15), [0, 9])
    spoiled = small()
    for view in spoiled.views:
        view[[0, 9]] = np.nan
    for name in ("crt", "ldam-drw", "balanced-softmax"):
        rule = RIVALS[name]
        [[head]] = fit(rule, [Trial(0.1, rule.grid[0])], spoiled, seeds=(0,), schedule=Schedule(epochs=2), rows=rows)
        assert np.isfinite(head.weight).all()
    assert np.isfinite(solve(RIVALS["ncm"], [{}], spoiled, rows=rows)[0].weight).all()


@pytest.fixture(scope="module")
def long_tail():
    """Eight normal classes of 300 … 6 samples, and the head that is right for those frequencies."""
    random = np.random.default_rng(5)
    counts = np.array([300, 200, 120, 60, 30, 15, 9, 6])
    centres = random.normal(size=(8, 6))

    def draw(labels):
        return (centres[labels] + 0.9 * random.normal(size=(len(labels), 6))).astype(np.float32)

    labels = np.repeat(np.arange(8), counts)
    bias = -(centres**2).sum(1) / (2 * 0.81) + np.log(counts / counts.sum())
    balanced = np.repeat(np.arange(8), 100)
    weight = centres / 0.81
    weight, bias = weight - weight.mean(0), bias - bias.mean()  # as training from small numbers leaves it
    features = Features([draw(labels) for _ in range(3)], labels, counts, weight, bias)
    return features, torch.as_tensor(draw(balanced)), balanced


NOT_FOR_SMALL_CLASSES = ("focal", "ala")  # nothing in them makes up for the class sizes after stage 1


@pytest.mark.parametrize("name", [n for n in RIVALS if n not in NOT_FOR_SMALL_CLASSES])
def test_small_classes_gain(long_tail, name):
    features, x, y = long_tail
    rule = RIVALS[name]
    if isinstance(rule, Free):
        heads = solve(rule, rule.grid, features)
    else:
        trials = [Trial(lr, own) for own in rule.grid for lr in (0.001, 0.01, 0.1)]
        schedule = Schedule(epochs=10, batch_size=32)
        heads = [h for of in fit(rule, trials, features, seeds=(0,), schedule=schedule) for h in of]
    before = scores_of(*predict(Linear(features.weight, features.bias), x), y, features.counts).summary
    after = max((scores_of(*predict(h, x), y, features.counts).summary for h in heads), key=lambda s: s["all"])
    assert after["few"] > before["few"] + 4
    assert after["all"] > before["all"]


@pytest.mark.parametrize("name", ["grw", "crt"])
def test_a_view_that_memory_cannot_hold_is_refused_with_what_to_set(tmp_path, name):
    store = cache.open_cache(made_store(tmp_path / "features.zarr"))
    views = StreamedViews(store, 2, memory_bytes=1 << 12)
    features = Features(views, store.labels("train"), store.counts, *store.classifier)
    rule = RIVALS[name]
    with pytest.raises(DataError, match=r"features\.zarr: .* rows of features at once .* --set rebalance\.memory="):
        fit(rule, [Trial(0.1, rule.grid[0])], features, seeds=(0,), schedule=ONE)
