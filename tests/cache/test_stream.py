import json
import subprocess
import sys
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from cache import CacheError, StoreSplit, create_store, open_cache, stream_order, verify
from cache.stream import SLOT

ENOUGH = 1 << 20


@hypothesis.given(
    rows=st.integers(0, 60),
    chunk_rows=st.integers(1, 9),
    window=st.integers(2, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
    share=st.floats(0, 1),
)
def test_every_wanted_row_comes_exactly_once(rows, chunk_rows, window, seed, epoch, share):
    only = np.random.default_rng(seed).random(rows) < share
    given = {"window": window, "seed": seed, "epoch": epoch}
    order = stream_order(rows, chunk_rows, **given)
    np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    np.testing.assert_array_equal(stream_order(rows, chunk_rows, **given), order)
    np.testing.assert_array_equal(np.sort(stream_order(rows, chunk_rows, only=only, **given)), np.flatnonzero(only))


def test_seed_and_epoch_and_window_each_change_the_order():
    orders = [
        stream_order(500, 10, window=window, seed=seed, epoch=epoch).tolist()
        for window, seed, epoch in [(8, 0, 0), (8, 0, 1), (8, 1, 0), (9, 0, 0), (50, 0, 0)]
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_pool_mixes_many_chunks_into_each_batch_and_neighbours_part():
    rows, size, window = 20_000, 100, 50
    order = stream_order(rows, size, window=window, seed=0, epoch=0)
    chunks = [len(set(batch // size)) for batch in order.reshape(-1, 50)]
    assert np.mean(chunks) > 32  # what 50 draws meet of 50 chunks that are all equally likely
    place = np.empty(rows, int)
    place[order] = np.arange(rows)
    assert np.median(np.abs(np.diff(place))) > window * size / 4
    assert abs(np.corrcoef(np.arange(rows), order)[0, 1]) < 0.2


def test_a_pool_of_the_whole_view_is_a_full_shuffle():
    """Each row is equally likely at each place."""
    found = np.zeros((6, 6))
    for seed in range(3000):
        found[np.arange(6), stream_order(6, 2, window=3, seed=seed, epoch=0)] += 1
    assert np.abs(found / 3000 - 1 / 6).max() < 0.03


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("multiple_of", [1, 3, 10])
@pytest.mark.parametrize("pool", [2, 3, 100])
def test_blocks_are_the_rows_in_the_order_that_is_told(small, dtype, multiple_of, pool):
    small.dtype = dtype
    cache = open_cache(small.sealed())
    memory = least(cache) + (pool - 2) * per_chunk(cache)
    for epoch in range(4):
        given = {"seed": 7, "epoch": epoch, "memory_bytes": memory}
        blocks = list(cache.stream("train", views=(1, 2), multiple_of=multiple_of, **given))
        rows = np.concatenate([rows for rows, _ in blocks])
        features = np.concatenate([features for _, features in blocks])
        np.testing.assert_array_equal(rows, cache.stream_order("train", **given))
        np.testing.assert_array_equal(np.sort(rows), np.arange(23))
        np.testing.assert_array_equal(features, cache.read("train", 1 + epoch % 2)[rows])
        assert features.dtype == cache.read("train").dtype
        sizes = [len(rows) for rows, _ in blocks]
        assert all(size and size % multiple_of == 0 for size in sizes[:-1])
        assert max(sizes) < 1 + multiple_of


def test_only_the_rows_that_are_asked_for(small):
    cache = open_cache(small.sealed())
    wanted = np.arange(1, 23, 3)
    given = {"seed": 0, "epoch": 0, "memory_bytes": least(cache), "rows": wanted}
    rows, features = (np.concatenate(part) for part in zip(*cache.stream("train", **given), strict=True))
    np.testing.assert_array_equal(np.sort(rows), wanted)
    np.testing.assert_array_equal(rows, cache.stream_order("train", **given))
    np.testing.assert_array_equal(features, cache.read("train")[rows])


@pytest.mark.parametrize("rows", [None, [5, 6, 7, 20], [6], [], [22, 0, 6]])
def test_rows_without_features_do_not_come_also_where_rows_are_named(small, rows):
    with small.create() as writer:
        for chunk in writer.missing():
            features = small.features(chunk.split, chunk.view)[chunk.start : chunk.stop]
            holds_it = chunk.split == "train" and chunk.start <= 6 < chunk.stop
            writer.write(chunk, features, absent=[6 - chunk.start] if holds_it else [])
        writer.seal()
    cache = open_cache(small.path)
    expected = sorted(set(range(23) if rows is None else rows) - {6})
    settings = {"seed": 0, "epoch": 0, "rows": rows}
    for memory in (ENOUGH, least(cache)):
        blocks = list(cache.stream("train", memory_bytes=memory, **settings))
        order = [row for rows, _ in blocks for row in rows.tolist()]
        assert sorted(order) == expected
        assert order == cache.stream_order("train", memory_bytes=memory, **settings).tolist()
        assert all(np.isfinite(features).all() for _, features in blocks)


def test_an_empty_split_gives_nothing(small):
    cache = open_cache(small.sealed())
    assert list(cache.stream("test", seed=0, epoch=0, memory_bytes=ENOUGH)) == []
    assert len(cache.stream_order("test", seed=0, epoch=0, memory_bytes=ENOUGH)) == 0


def test_too_little_memory_names_the_least_that_will_do(small):
    cache = open_cache(small.sealed())
    for memory in (0, least(cache) - 1):
        with pytest.raises(CacheError, match=f"a pool of 2 chunks of 4 rows needs {least(cache)} bytes"):
            cache.stream("train", seed=0, epoch=0, memory_bytes=memory)
    with pytest.raises(ValueError, match="multiple_of is 0"):
        cache.stream("train", seed=0, epoch=0, memory_bytes=ENOUGH, multiple_of=0)
    with pytest.raises(CacheError, match="no view 3 of train"):
        cache.stream("train", views=[3], seed=0, epoch=0, memory_bytes=ENOUGH)


def test_a_damaged_chunk_ends_the_stream_by_name_and_a_stream_left_early_leaves_no_thread(small):
    cache = open_cache(small.sealed())
    blocks = cache.stream("train", seed=0, epoch=0, memory_bytes=least(cache))
    next(blocks)
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
    file = small.path / "train/features/c/0/3/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match=r"train/features/c/0/3/0 \(view 0, rows 12–15\) does not match"):
        list(cache.stream("train", seed=0, epoch=0, memory_bytes=least(cache)))
    assert len(verify(small.path)) == 1


def test_rows_are_read_by_number(small):
    cache = open_cache(small.sealed())
    rows = [22, 0, 5, 5, 4]
    np.testing.assert_array_equal(cache.read_rows("train", rows, 2), cache.read("train", 2)[rows])
    assert cache.read_rows("train", []).shape == (0, 5)
    for wrong in (-1, 23):
        with pytest.raises(IndexError, match="train has 23 rows"):
            cache.read_rows("train", [0, wrong])


def per_chunk(cache) -> int:
    return 4 * (5 * stored(cache) + SLOT)


def least(cache) -> int:
    given_out = 2 if cache.dtype == "float16" else 4
    return 2 * per_chunk(cache) + 4 * 5 * stored(cache) + 1 * 5 * (stored(cache) + 2 * given_out)


def stored(cache) -> int:
    return 4 if cache.dtype == "float32" else 2


PEAK = """
import json, sys
from cache import open_cache

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

cache, memory = open_cache(sys.argv[1]), int(sys.argv[2])
cache.labels("train")
before, rows = resident("VmRSS"), 0
for _ in range(2):
    for block, features in cache.stream("train", seed=0, epoch=0, memory_bytes=memory, multiple_of=64):
        rows += len(block)
print(json.dumps([resident("VmHWM") - before, rows]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_memory_stays_within_what_is_given(tmp_path, dtype):
    """Of a view four times as large; 8 MiB more for the threads, the allocator and what a first call imports."""
    rows, width = 60_000, 512 if dtype == "float32" else 1024
    head = {"weight": np.zeros((1, width)), "bias": [0], "class_names": ["a"], "counts": [rows]}
    splits = {"train": StoreSplit(1, np.zeros(rows, int), np.arange(rows))}
    made = {"splits": splits, "fingerprint": {}, "provenance": {}, "rows_per_chunk": 1024}
    with create_store(tmp_path / "f.zarr", width=width, dtype=dtype, **head, **made) as writer:
        for chunk in writer.missing():
            writer.write(chunk, np.full((chunk.rows, width), chunk.index, np.float32))
        writer.seal()
    memory = rows * width * open_cache(tmp_path / "f.zarr").read_bits("train").itemsize // 4
    command = [sys.executable, "-c", PEAK, str(tmp_path / "f.zarr"), str(memory)]
    grown, seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert seen == 2 * rows
    assert memory / 2 < grown < memory + (8 << 20)
