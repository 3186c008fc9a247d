import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DataConfig, make_config
from pipeline.data import load_dataset
from pipeline.data.subset import class_sizes, held_out_sizes, hold_out, long_tail
from pipeline.errors import ConfigError
from tests.conftest import digits_tree


@pytest.mark.parametrize(
    ("imbalance", "total", "groups"), [(100, 10847, (35, 35, 30)), (50, 12608, (41, 41, 18)), (10, 19573, None)]
)
def test_cifar100_lt_has_the_published_sizes(imbalance, total, groups):
    sizes = class_sizes(classes=100, largest=500, imbalance=imbalance, shape="exponential")
    assert sizes.sum() == total
    assert sizes[0] == 500
    if groups:
        assert ((sizes > 100).sum(), ((sizes >= 20) & (sizes <= 100)).sum(), (sizes < 20).sum()) == groups


def test_step_imbalance_by_hand():
    assert class_sizes(classes=5, largest=480, imbalance=100, shape="step").tolist() == [480, 480, 4, 4, 4]


def test_long_tail_follows_the_public_recipe():
    labels = np.repeat([0, 1], 5)
    random = np.random.RandomState(0)
    first, second = np.arange(5), np.arange(5, 10)
    random.shuffle(first)
    random.shuffle(second)
    kept, left = long_tail(labels, np.array([5, 2]), val_per_class=2, seed=0)
    assert kept.tolist() == [*first, *second[:2]]
    assert left.tolist() == second[2:4].tolist()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 30), st.integers(0, 5))
def test_hold_out_keeps_every_sample_once_and_takes_so_many_of_each_class(labels, per_class, seed):
    labels = np.array(labels)
    counts = np.bincount(labels, minlength=5)
    stay, held = hold_out(labels, held_out_sizes(counts, per_class), seed=seed)
    assert sorted([*stay, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=5).tolist() == [min(per_class, n // 5) for n in counts]


def test_without_a_number_15_percent_of_a_class_are_held_out_within_limits():
    counts = np.array([0, 1, 4, 5, 13, 14, 17, 100, 333, 334, 5000])
    assert held_out_sizes(counts, None).tolist() == [0, 0, 0, 2, 2, 2, 3, 15, 50, 50, 50]


def test_both_missing_splits_take_their_share_of_the_whole_class(tmp_path):
    sizes = (100, 5, 4)
    labels = np.repeat(np.arange(3), sizes)
    np.savez(tmp_path / "a.npz", images=np.zeros((len(labels), 2, 2, 3), np.uint8), labels=labels)
    source = {"source": "npz", "path": tmp_path / "a.npz"}
    for settings, expected in (
        ({}, {"train": [70, 1, 4], "val": [15, 2, 0], "test": [15, 2, 0]}),
        ({"val_per_class": 20, "test_per_class": 20}, {"train": [64, 4, 4], "val": [16, 0, 0], "test": [20, 1, 0]}),
    ):
        dataset = load_dataset(DataConfig(**source, **settings))
        assert {
            name: np.bincount(split.labels, minlength=3).tolist() for name, split in dataset.splits.items()
        } == expected
        ids = np.concatenate([split.ids for split in dataset.splits.values()])
        assert sorted(ids) == list(range(len(labels)))


def test_digits_are_split_as_documented():
    dataset = load_dataset(make_config(digits_tree(), "t").data)
    assert dataset.counts.tolist() == [110, 78, 55, 39, 27, 19, 14, 9, 7, 5]
    assert np.bincount(dataset.test.labels).tolist() == [40] * 10
    assert np.bincount(dataset.val.labels).tolist() == [20] * 10
    used = np.concatenate([s.ids for s in dataset.splits.values()])
    assert len(np.unique(used)) == len(used)


def test_a_subset_that_cannot_be_drawn_is_refused():
    tree = digits_tree()
    tree["data"]["max_per_class"] = 5000
    with pytest.raises(ConfigError, match="max_per_class=5000: class 0 would need 5000 images"):
        load_dataset(make_config(tree, "t").data)
