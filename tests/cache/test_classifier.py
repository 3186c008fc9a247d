"""A store whose classifier follows from its features: set before the seal, kept or made again as they are."""

import numpy as np
import pytest

from cache import CacheError, open_cache, verify
from tests.cache.test_damage import flip

WEIGHT, BIAS = np.arange(15.0).reshape(3, 5) / 7, np.arange(3.0)
LATER = {"weight": None, "bias": None}


def sealed(small):
    with small.create(**LATER) as writer:
        small.fill(writer)
        writer.set_classifier(WEIGHT, BIAS)
        writer.seal()


def test_a_classifier_set_before_the_seal_gives_the_store_that_one_known_from_the_start_gives(small, tmp_path):
    with small.create(weight=WEIGHT, bias=BIAS) as writer:
        small.fill(writer)
        digest = writer.seal()
    small.path = tmp_path / "later.zarr"
    with small.create(**LATER) as writer:
        small.fill(writer, writer.missing()[:6])
        with pytest.raises(CacheError, match=r"train/features/c/1/0/0 .* is missing"):
            writer.read(writer.missing()[0])
    with small.create(**LATER) as writer:  # resumed
        assert not writer.has_classifier
        small.fill(writer)
        chunk = writer.chunks[1]
        np.testing.assert_array_equal(writer.read(chunk), small.features("train", 0)[4:8].astype(np.float16))
        with pytest.raises(CacheError, match=r"cannot be sealed: classifier/weight/c/0/0 is missing and 1 more"):
            writer.seal()
        writer.set_classifier(WEIGHT * 2, BIAS)
        writer.set_classifier(WEIGHT, BIAS)
        assert writer.seal() == digest
        with pytest.raises(CacheError, match="set once"):
            writer.set_classifier(WEIGHT, BIAS)
    np.testing.assert_array_equal(open_cache(small.path).classifier[0], WEIGHT.astype(np.float32))
    with small.create(**LATER) as writer:
        assert writer.sealed
        assert writer.has_classifier
    assert verify(small.path) == []


def test_a_repair_of_features_keeps_the_classifier_and_one_of_the_classifier_asks_for_it_again(small):
    sealed(small)
    before = small.files()
    flip(small.path / "train/features/c/0/1/0")
    with small.create(**LATER) as writer:
        assert writer.has_classifier
        small.fill(writer)
        writer.seal()
    assert small.files() == before
    flip(small.path / "classifier/bias/c/0")
    with small.create(**LATER) as writer:
        assert not writer.has_classifier
        assert writer.missing() == []
        assert not (small.path / "classifier/bias/c/0").exists()
        writer.set_classifier(WEIGHT, BIAS)
        writer.seal()
    assert small.files() == before


def test_training_rows_that_can_be_read_at_last_make_the_classifier_due_again(small):
    with small.create(**LATER) as writer:
        for chunk in writer.missing():
            rows = small.features(chunk.split, chunk.view)[chunk.start : chunk.stop]
            writer.write(chunk, rows, absent=[1] if (chunk.split, chunk.index) in (("train", 0), ("val", 0)) else [])
        writer.set_classifier(WEIGHT, BIAS)
        writer.seal()
    for split, due in (("val", False), ("train", True)):
        with small.create(**LATER, retry={split: [1]}) as writer:
            assert writer.has_classifier is not due
            small.fill(writer)
            if due:
                writer.set_classifier(WEIGHT + 1, BIAS)
            writer.seal()
    np.testing.assert_array_equal(open_cache(small.path).classifier[0], (WEIGHT + 1).astype(np.float32))


@pytest.mark.parametrize(
    ("weight", "bias"), [(WEIGHT.T, BIAS), (WEIGHT, BIAS[:2]), (WEIGHT * np.nan, BIAS), (WEIGHT, BIAS + np.inf)]
)
def test_what_is_no_classifier_is_refused(small, weight, bias):
    with small.create(**LATER) as writer, pytest.raises(ValueError, match="expected finite numbers of shape"):
        writer.set_classifier(weight, bias)
    with pytest.raises(ValueError, match="both"):
        small.create(weight=None)
