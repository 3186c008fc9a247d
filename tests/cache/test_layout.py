import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import CacheError, Layout, chunk_rows, owned_chunks
from cache.layout import CHUNK_BYTES, CHUNK_ROWS

sizes = st.integers(0, 500)


@given(chunks=sizes, world=st.integers(1, 40))
def test_every_chunk_has_one_owner_and_runs_are_even(chunks, world):
    owned = [owned_chunks(chunks=chunks, rank=rank, world=world) for rank in range(world)]
    assert [i for run in owned for i in run] == list(range(chunks))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@given(
    train=sizes, views=st.integers(1, 5), val=sizes, test=sizes, per_chunk=st.integers(1, 60), world=st.integers(1, 7)
)
def test_every_row_of_every_view_is_written_exactly_once(train, views, val, test, per_chunk, world):
    layout = Layout((("train", views, train), ("val", 1, val), ("test", 1, test)), 3, 2, "float16", per_chunk)
    chunks = layout.chunks()
    seen = {s: np.zeros((v, n), int) for s, v, n in layout.splits}
    for rank in range(world):
        for i in owned_chunks(chunks=len(chunks), rank=rank, world=world):
            assert 0 < chunks[i].rows <= per_chunk
            seen[chunks[i].split][chunks[i].view, chunks[i].start : chunks[i].stop] += 1
    assert all((times == 1).all() for times in seen.values())
    for split, _, _ in layout.splits:
        assert [c.key for c in chunks if c.split == split] == layout.features(split).keys


@given(width=st.integers(1, 10**8), itemsize=st.sampled_from([2, 4]))
def test_a_chunk_fills_its_size_without_exceeding_it(width, itemsize):
    rows = chunk_rows(width=width, itemsize=itemsize)
    assert rows == 1 or rows * width * itemsize <= CHUNK_BYTES
    assert rows == CHUNK_ROWS or (rows + 1) * width * itemsize > CHUNK_BYTES


def test_an_unknown_split_is_named_with_the_known_ones():
    with pytest.raises(CacheError, match="no split tset; this store has train, val"):
        Layout((("train", 1, 2), ("val", 1, 0)), 3, 2, "float16", 4).rows("tset")
