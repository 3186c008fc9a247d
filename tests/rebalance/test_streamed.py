from functools import partial

import numpy as np
import pytest
import torch

from cache import StoreSplit, create_store, open_cache
from pipeline.config import RebalanceConfig, parse_bytes
from pipeline.errors import DataError
from pipeline.linear import logistic
from pipeline.rebalance.engine.c_backend import instruction_sets
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.objective import penalty
from pipeline.rebalance.engine.streamed import StreamedViews
from pipeline.rebalance.load import StoredViews, load
from pipeline.rebalance.methods import fit, linear_families
from tests.small_run import made_store

ROWS, WIDTH, VIEWS, ABSENT = 200, 16, 3, 37
VIEW = ROWS * WIDTH * 2


def sealed(path, absent=()):
    """A store of chunks of ten rows, each holding its own number and view; absent: rows without features."""
    labels = np.arange(ROWS) % 4
    head = {"weight": np.ones((4, WIDTH)), "bias": np.zeros(4), "class_names": list("abcd")}
    splits = {"train": StoreSplit(VIEWS, labels, np.arange(ROWS)), "test": StoreSplit(1, [0], [0])}
    made = {"counts": np.bincount(labels), "fingerprint": {}, "provenance": {}, "rows_per_chunk": 10}
    with create_store(path, splits=splits, width=WIDTH, dtype="float16", **head, **made) as writer:
        for chunk in writer.missing():
            numbers = np.arange(chunk.start, chunk.stop)[:, None] + np.zeros((1, WIDTH), np.float32)
            numbers[:, 1] = chunk.view
            here = [row - chunk.start for row in absent if chunk.split == "train" and chunk.start <= row < chunk.stop]
            writer.write(chunk, numbers, absent=here)
        writer.seal()
    return open_cache(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("streamed") / "f.zarr", [ABSENT])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("whole") / "f.zarr")


@pytest.fixture
def views(store):
    return StreamedViews(store, VIEWS, memory_bytes=VIEW // 2)


def test_a_view_that_does_not_fit_is_streamed_and_only_that(whole):
    def kind(memory):
        return type(load(whole, augmented=True, memory_bytes=memory).features.views)

    assert kind(VIEW) is StoredViews
    assert kind(VIEW - 1) is StreamedViews
    assert type(load(whole, augmented=True).features.views) is StoredViews


def test_views_that_do_not_fit_together_are_kept_one_at_a_time(whole):
    views = StoredViews(whole, VIEWS, memory_bytes=VIEW)
    assert views[1] is views[1]
    assert [len(views._in_memory) for _ in (views[0], views[2])] == [1, 1]
    together = StoredViews(whole, VIEWS, memory_bytes=VIEWS * VIEW)
    assert len([together[v] for v in range(VIEWS)]) == len(together._in_memory) == VIEWS


@pytest.mark.parametrize("augmented", [True, False])
def test_an_epoch_gives_each_sample_once_with_its_features_in_the_order_told(store, whole, views, augmented):
    numbers = np.flatnonzero(store.valid("train"))
    features = load(whole, augmented=True, memory_bytes=VIEW // 2).features
    orders = []
    for epoch, seed in [(0, 0), (1, 0), (2, 0), (0, 1)]:
        blocks = list(views.blocks(epoch, seed, 16, augmented=augmented))
        assert all(len(rows) % 16 == 0 for rows, _ in blocks[:-1])
        assert len(blocks) > 2
        rows, found = (np.concatenate(part) for part in zip(*blocks, strict=True))
        np.testing.assert_array_equal(rows, views.order(epoch, seed))
        np.testing.assert_array_equal(np.sort(rows), np.arange(ROWS - 1))
        np.testing.assert_array_equal(found[:, 0], numbers[rows])
        assert set(found[:, 1]) == {features.view_of_epoch(epoch, augmented=augmented)}
        orders.append(rows.tolist())
    assert len({tuple(order) for order in orders}) == 4
    assert views.seconds > 0


def test_some_rows_alone_and_streams_that_share_the_memory(store):
    views = StreamedViews(store, VIEWS, memory_bytes=VIEW)
    wanted = np.arange(3, 199, 7)
    blocks = list(views.blocks(0, 0, 5, rows=wanted, streams=2))
    rows = np.concatenate([rows for rows, _ in blocks])
    np.testing.assert_array_equal(np.sort(rows), wanted)
    np.testing.assert_array_equal(rows, views.order(0, 0, rows=wanted, streams=2))
    assert views.order(0, 0, streams=2).tolist() != views.order(0, 0).tolist()


def test_rows_are_read_by_number_but_never_the_whole_view(store, views):
    rows = np.array([0, ABSENT, 50])
    np.testing.assert_array_equal(views[2][rows][:, 0], np.flatnonzero(store.valid("train"))[rows])
    for take in (torch.as_tensor, np.asarray, lambda view: view[:], lambda view: view[np.arange(ROWS - 1)]):
        with pytest.raises(DataError, match=r"allow more with --set rebalance\.memory=1GiB"):
            take(views[0])
    with pytest.raises(IndexError):
        views[VIEWS]


def test_too_little_memory_says_how_much(store):
    views = StreamedViews(store, VIEWS, memory_bytes=1000)
    for wanted in (lambda: views.order(0, 0), lambda: next(views.blocks(0, 0, 16))):
        with pytest.raises(DataError, match=r"needs 2,.*: --set rebalance\.memory=SIZE"):
            wanted()


def test_a_number_that_is_not_finite_is_named(store, tmp_path):
    labels = np.zeros(4, int)
    made = {"counts": [4], "class_names": ["a"], "fingerprint": {}, "provenance": {}, "rows_per_chunk": 1}
    head = {"weight": np.ones((1, 1)), "bias": [0]}
    splits = {"train": StoreSplit(1, labels, labels)}
    with create_store(tmp_path / "f.zarr", splits=splits, width=1, dtype="float16", **head, **made) as writer:
        for chunk in writer.missing():
            writer.write(chunk, np.ones((1, 1), np.float32))
        writer.seal()
    views = StreamedViews(open_cache(tmp_path / "f.zarr"), 1, memory_bytes=1 << 20)
    views.store.stream = lambda *_, **__: iter([(np.arange(2), np.array([[1.0], [np.nan]]))])
    with pytest.raises(DataError, match="train features, view 0: 1 of 2 rows hold NaN"):
        list(views.blocks(0, 0, 1))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5MiB", 3 << 19), (4096, 4096), ("2k", 2000), ("64KiB", 1 << 16)],
)
def test_sizes_are_text(text, size):
    assert RebalanceConfig(memory=text).memory_bytes == size


@pytest.mark.parametrize("text", ["", "GiB", "0", "-1GiB", "8 GB iB", "8 TiBs", "a lot"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="a size such as 8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("kernel", [None, *(["double"] if instruction_sets() else [])])
@pytest.mark.parametrize("rows", [None, np.arange(0, ROWS - 1, 3)])
def test_heads_fitted_from_the_stream_are_those_fitted_from_memory_in_its_order(store, monkeypatch, kernel, rows):
    seeds, schedule = (0, 5), Schedule(epochs=4, lr=1e-6, batch_size=16)
    heads = [Head("cb-softmax", 0.3, penalty()), Head("ce")]
    streamed = load(store, augmented=True, memory_bytes=VIEW - 64).features
    fit = partial(fit_heads, heads=heads, seeds=seeds, schedule=schedule, rows=rows, dtype=torch.float64, kernel=kernel)
    weight, bias = fit(streamed)
    memory = load(store, augmented=True).features
    assert type(memory.views) is StoredViews
    for s, seed in enumerate(seeds):
        streams = 1 if kernel is None else len(seeds)

        def same_order(n, *, seed, epoch, streams=streams):
            found = streamed.views.order(epoch, seed, rows=rows, streams=streams)
            return found if rows is None else np.searchsorted(rows, found)

        monkeypatch.setattr("pipeline.rebalance.engine.epochs.batch_order", same_order)
        expected = fit(memory, seeds=(seed,))
        np.testing.assert_allclose(weight[s], expected[0][0], rtol=1e-12)
        np.testing.assert_allclose(bias[s], expected[1][0], rtol=1e-12, atol=1e-13)
    assert np.abs(bias[0] - bias[1]).max() > 1e-9


@pytest.mark.parametrize("kernel", [None, next(iter(instruction_sets()), None)])
def test_heads_from_a_stream_are_those_from_memory_in_the_same_order(whole, monkeypatch, kernel):
    seeds, schedule = (0, 1), Schedule(epochs=3, lr=1e-5, batch_size=16)
    streamed = load(whole, augmented=True, memory_bytes=VIEW - 1).features
    apart = 2 if kernel else 1  # the kernel takes both seeds along, so that their streams share the memory
    monkeypatch.setattr(
        "pipeline.rebalance.engine.epochs.batch_order",
        lambda rows, *, seed, epoch: streamed.views.order(epoch, seed, streams=apart),
    )
    heads = [Head("cb-softmax", 0.1, penalty()), Head("ce")]
    found = [
        fit_heads(features, heads, seeds=seeds, schedule=schedule, kernel=kernel)
        for features in (streamed, load(whole, augmented=True).features)
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found[0][0][0], found[0][0][1], rtol=1e-6)


def test_convex_and_closed_form_heads_of_a_streamed_view_are_those_of_one_in_memory(tmp_path, monkeypatch):
    """Blocks are read again for every pass, and none is kept."""
    path = made_store(tmp_path / "f.zarr")
    streamed, in_memory = (load(path, augmented=False, memory_bytes=bytes_).features for bytes_ in (4000, None))
    assert [type(features.views) for features in (streamed, in_memory)] == [StreamedViews, StoredViews]
    monkeypatch.setattr(fit, "BLOCK", 64)
    monkeypatch.setattr(linear_families, "TOLERANCE", 1e-6)
    standardised, kept = logistic.Standardised, []
    monkeypatch.setattr(
        logistic, "Standardised", lambda *a, resident: kept.append(resident) or standardised(*a, resident=resident)
    )
    for rule in linear_families.LINEAR_FAMILIES:
        grid = [point for point in rule.grid if point.get("l2", 0.05) == 0.05][:4]
        heads = [fit.solve(rule, grid, features) for features in (streamed, in_memory)]
        for first, second in zip(*heads, strict=True):
            for a, b in zip(first.arrays, second.arrays, strict=True):
                assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b), rule.name
    assert kept == [False, True] * (len(kept) // 2)
    assert kept
