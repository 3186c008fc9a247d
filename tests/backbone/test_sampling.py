"""Who is drawn how often, and when."""

import numpy as np
import pytest

from pipeline.backbone.sampling import epoch_order, nth_draw, quotas, shares
from pipeline.seeds import derive

COUNTS = np.array([97, 40, 11, 3, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))
EXPECTED = {"class-balanced": np.full(5, 152 / 5), "square-root": 152 * np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()}


@pytest.mark.parametrize("sampler", ["class-balanced", "square-root"])
def test_every_class_has_its_quota_in_each_epoch_and_over_all(sampler):
    each = np.array(
        [np.bincount(LABELS[epoch_order(LABELS, seed=1, epoch=e, sampler=sampler)], minlength=5) for e in range(50)]
    )
    assert (each.sum(1) == 152).all()
    assert (np.abs(each - EXPECTED[sampler]) < 1).all()
    assert (np.abs(each.cumsum(0) - EXPECTED[sampler] * np.arange(1, 51)[:, None]) < 2).all()
    np.testing.assert_array_equal(each, quotas(COUNTS, sampler=sampler, seed=1, epochs=50))


@pytest.mark.parametrize("sampler", ["class-balanced", "square-root"])
def test_an_image_is_seen_again_when_all_of_its_class_were(sampler):
    drawn = np.zeros(len(LABELS), int)
    for epoch in range(30):
        np.add.at(drawn, epoch_order(LABELS, seed=0, epoch=epoch, sampler=sampler), 1)
        for c in range(5):
            assert np.ptp(drawn[c == LABELS]) <= 1
    assert drawn.min() > 0


def test_rounds_and_places_are_random():
    """Which images of the largest class come in the first epoch, and where the only image of the last class stands."""
    epochs = [epoch_order(LABELS, seed=s, epoch=0, sampler="class-balanced") for s in range(400)]
    many = np.flatnonzero(LABELS == 0)
    seen = np.array([np.isin(many, order) for order in epochs])
    share = seen.mean()
    expected = len(epochs) * share
    chi_square = ((seen.sum(0) - expected) ** 2 / (expected * (1 - share))).sum()
    assert 55 < chi_square < 150  # 96 degrees of freedom: 1 in 1,000 on either side
    alone = np.concatenate([np.flatnonzero(LABELS[order] == 4) for order in epochs])
    assert abs(alone.mean() - 75.5) < 4 * 44 / np.sqrt(len(alone))


def test_an_order_is_a_function_of_seed_and_epoch_and_instance_sampling_is_a_permutation():
    for sampler in ("instance", "class-balanced", "square-root"):
        first = epoch_order(LABELS, seed=3, epoch=7, sampler=sampler)
        np.testing.assert_array_equal(first, epoch_order(LABELS, seed=3, epoch=7, sampler=sampler))
        assert (first != epoch_order(LABELS, seed=3, epoch=8, sampler=sampler)).any()
        assert (first != epoch_order(LABELS, seed=4, epoch=7, sampler=sampler)).any()
    was = np.random.default_rng(derive(3, "order", 7)).permutation(152)
    np.testing.assert_array_equal(epoch_order(LABELS, seed=3, epoch=7), was)


def test_draws_are_counted():
    assert nth_draw(np.array([5, 2, 5, 5, 0, 2])).tolist() == [0, 0, 1, 2, 0, 1]
    assert nth_draw(np.array([], int)).tolist() == []
    assert nth_draw(np.random.default_rng(0).permutation(20)).tolist() == [0] * 20


def test_ranks_share_every_batch_whatever_the_sampler():
    order = epoch_order(LABELS, seed=0, epoch=0, sampler="class-balanced")
    for batch in np.array_split(order, 5):
        dealt = shares(batch, world=3, parts=2)
        np.testing.assert_array_equal(np.concatenate([part for rank in dealt for part in rank]), batch)


def test_a_class_without_images_is_never_drawn():
    labels = np.array([0, 0, 2, 2, 2])
    for sampler in ("class-balanced", "square-root"):
        assert set(labels[epoch_order(labels, seed=0, epoch=4, sampler=sampler)]) == {0, 2}


def test_a_large_epoch_takes_a_moment():
    """8,142 classes of 1,000 … 11 images: the work must not be a Python loop over classes and rounds."""
    import time

    counts = (1000 * np.arange(1, 8143) ** -0.5).astype(int)
    labels = np.repeat(np.arange(8142), counts)
    started = time.process_time()
    order = epoch_order(labels, seed=0, epoch=90, sampler="class-balanced")
    assert len(order) == len(labels)
    assert time.process_time() - started < 2
