import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.seeds import derive, uniform


@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True))
def test_uniform_depends_on_the_sample_alone(seed, ids):
    together = uniform(seed, ids, 3)
    alone = np.concatenate([uniform(seed, [i], 3) for i in ids])
    assert (together == alone).all()
    assert ((together >= 0) & (together < 1)).all()


def test_uniform_is_uniform_and_uncorrelated():
    draws = uniform(7, np.arange(20000), 4)
    assert abs(draws.mean() - 0.5) < 0.005
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
    assert np.abs(uniform(8, np.arange(20000), 4) - draws).mean() > 0.3  # another seed, other numbers


def test_derive_separates_purposes_and_indices():
    seeds = {derive(s, p, i) for s in range(5) for p in ("order", "augment") for i in range(5)}
    assert len(seeds) == 50
    assert derive(1, "order", 2) == derive(1, "order", 2) < 2**63
