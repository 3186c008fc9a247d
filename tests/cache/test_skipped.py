"""Rows without features: kept in their place, marked for every reader, listed by the seal and tried again when asked for."""

import numpy as np
import pytest
import zarr

from cache import CacheError, open_cache, open_writer, verify
from tests.cache.test_damage import flip


def write_all(small, writer, absent=()):
    """Every missing chunk; absent: (split, view, row) without features."""
    for chunk in writer.missing():
        rows = small.features(chunk.split, chunk.view)[chunk.start : chunk.stop]
        none = [r - chunk.start for s, v, r in absent if (s, v) == (chunk.split, chunk.view)]
        none = [r for r in none if 0 <= r < chunk.rows]
        rows[none] = 1e9  # whatever came of no image is neither stored nor checked
        writer.write(chunk, rows, absent=none)


def skipping(small, absent=(("train", 0, 9), ("train", 2, 9), ("train", 2, 22), ("val", 0, 0))):
    with small.create() as writer:
        write_all(small, writer, absent)
        writer.seal()
    return open_cache(small.path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_rows_without_features_are_nan_for_every_reader_and_listed(small, dtype):
    small.dtype = dtype
    cache = skipping(small)
    assert cache.skipped("train").tolist() == [9, 22]
    assert np.flatnonzero(~cache.valid("train")).tolist() == [9, 22]
    assert cache.skipped("val").tolist() == [0]
    assert cache.valid("test").shape == (0,)
    for view in range(3):
        rows = cache.read("train", view)
        assert np.flatnonzero(np.isnan(rows).all(1)).tolist() == [[9], [], [9, 22]][view]
        assert np.isfinite(rows[cache.valid("train")]).all()
    np.testing.assert_array_equal(cache.ids("train"), np.arange(100, 123))
    np.testing.assert_array_equal(cache.labels("train"), small.labels)
    assert (
        cache.counts.tolist() == (np.bincount(small.labels) - np.bincount(small.labels[[9, 22]], minlength=3)).tolist()
    )
    assert verify(small.path) == []
    if dtype != "bfloat16":
        plain = zarr.open_group(small.path, mode="r")["train/features"]
        assert np.isnan(plain[2, 22]).all()
        assert np.isfinite(plain[2, 21]).all()


def test_what_is_skipped_is_part_of_the_digest_and_of_the_check(small, tmp_path):
    cache = skipping(small)
    other = type(small)(tmp_path / "other.zarr")
    other.sealed()
    assert cache.digest != open_cache(other.path).digest
    file = small.path / "zarr.json"
    text = file.read_text()
    assert '"skipped"' in text
    file.write_text(text.replace("22\n", "21\n"))
    assert text != file.read_text()
    with pytest.raises(CacheError, match="damaged"):
        open_cache(small.path)
    assert '"skipped"' not in (other.path / "zarr.json").read_text()


def test_a_nan_that_nobody_announced_is_refused_beside_one_that_was(small):
    with small.create() as writer:
        rows = np.zeros((4, 5), np.float32)
        rows[[1, 2]] = np.nan
        with pytest.raises(CacheError, match=r"sample 102 \(train view 0\) is nan"):
            writer.write(writer.chunks[0], rows, absent=[1])


def test_a_chunk_with_absent_rows_is_finished_only_for_who_skips(small):
    with small.create() as writer:
        write_all(small, writer, [("train", 1, 5)])
        assert writer.missing() == []
        assert [(c.split, c.view, c.index) for c in writer.missing(skipping=False)] == [("train", 1, 1)]


def test_skipped_rows_are_tried_again_when_asked_for_and_nothing_else_is_written(small, tmp_path):
    whole = type(small)(tmp_path / "whole.zarr")
    whole.sealed()
    skipping(small)
    assert open_writer(small.path).skipped == {"train": [9, 22], "val": [0]}
    with small.create() as writer:
        assert writer.sealed
    flip(small.path / "train/features/c/1/0/0")
    with small.create(retry={"train": [9, 22]}) as writer:
        assert writer.skipped == {"train": [9, 22], "val": [0]}
        assert [(c.split, c.view, c.index) for c in writer.missing()] == [
            *[("train", 0, 2), ("train", 0, 5)],
            *[("train", 1, 0), ("train", 1, 2), ("train", 1, 5)],  # the first is the damaged one
            *[("train", 2, 2), ("train", 2, 5)],
        ]
        write_all(small, writer)
        writer.seal()
    assert open_cache(small.path).skipped("train").tolist() == []
    assert open_cache(small.path).skipped("val").tolist() == [0]
    with small.create(retry={"val": [0]}) as writer:
        write_all(small, writer)
        writer.seal()
    assert small.files() == whole.files()


def test_the_seal_may_say_what_the_content_without_the_skipped_rows_is(small):
    with small.create() as writer:
        write_all(small, writer, [("train", 0, 3)])
        writer.seal(lambda skipped: {"dataset": f"without {skipped}"})
    assert open_cache(small.path).fingerprint == {"dataset": "without {'train': [3]}"}
    with pytest.raises(CacheError, match=r"dataset is .*, .*abc.* wanted"):
        small.create()
