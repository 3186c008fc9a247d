import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.operations import BATCHED, numbers_of
from pipeline.data.policies import IDENTITY, RANDAUGMENT, Plan, apply, autoaugment, drawn, magnitude
from pipeline.data.transform import BLOCK, Loader, Transform

CPU = torch.device("cpu")
POLICIES = ("autoaugment-cifar10", "autoaugment-imagenet", "randaugment")
SIZE = {"height": 32, "width": 32}


def transform(**how):
    facts = {"size": (12, 10), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "augment": "crop-flip"}
    return Transform(**(facts | how))


def arrays(n):
    images = np.random.default_rng(0).integers(0, 256, (n, 12, 10, 3), dtype=np.uint8)
    return Split(labels=np.zeros(n, np.int64), ids=np.arange(n) * 7 + 50, images=images)


@pytest.mark.parametrize("policy", ["cifar10", "imagenet"])
def test_the_tables_are_those_of_torchvision(policy):
    names, probabilities, levels = autoaugment(f"autoaugment-{policy}")
    ours = [
        tuple(zip(*row, strict=True))
        for row in zip(names.tolist(), probabilities.tolist(), levels.tolist(), strict=True)
    ]
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy(policy))._policies
    assert ours == [tuple((name, p, level or 0) for name, p, level in pair) for pair in theirs]


@pytest.mark.parametrize(("space", "bins"), [(v2.AutoAugment, 10), (v2.RandAugment, 31)])
def test_magnitudes_are_those_of_torchvision(space, bins):
    for name, (ladder, _) in space._AUGMENTATION_SPACE.items():
        theirs = ladder(bins, 48, 32)
        if theirs is None or name == IDENTITY:
            continue
        scale = 255 if name == "Solarize" else 1
        ours = magnitude(name, np.arange(bins) / (bins - 1), height=48, width=32)
        np.testing.assert_allclose(ours, theirs.numpy() * scale, rtol=1e-5, atol=1e-5)
    assert set(v2.RandAugment._AUGMENTATION_SPACE) == set(RANDAUGMENT)


def test_operations_come_as_often_as_the_policy_says():
    plan = drawn("autoaugment-cifar10", np.arange(50_000), 3, **SIZE)
    names, probabilities, _ = autoaugment("autoaugment-cifar10")
    for step in 0, 1:
        for name in BATCHED:
            expected = probabilities[:, step][names[:, step] == name].sum() / 25
            assert np.mean(plan.names[step] == name) == pytest.approx(expected, abs=0.006), name
    turned = plan.magnitudes[plan.names == "Rotate"]
    assert set(np.abs(turned).round(4)) == {round(2 / 9 * 30, 4)}
    assert np.mean(turned < 0) == pytest.approx(0.5, abs=0.03)
    assert (plan.magnitudes[plan.names == "Posterize"] == 5).all()  # level 7


def test_randaugment_draws_n_operations_at_one_level():
    plan = drawn("randaugment", np.arange(20_000), 3, rand_n=3, rand_m=30, **SIZE)
    assert plan.names.shape == (3, 20_000)
    for name in RANDAUGMENT:
        assert np.mean(plan.names == name) == pytest.approx(1 / 14, abs=0.004), name
    assert set(np.abs(plan.magnitudes[plan.names == "ShearX"])) == {0.3}
    assert set(plan.magnitudes[plan.names == "Solarize"]) == {0}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_is_applied_as_one_operation_after_the_other(policy):
    images = torch.from_numpy(arrays(60).images).permute(0, 3, 1, 2).contiguous()
    plan = drawn(policy, np.arange(60), 1, height=12, width=10)
    expected = images.clone()
    for i in range(60):
        for names, magnitudes in zip(plan.names, plan.magnitudes, strict=True):
            if names[i] != IDENTITY:
                numbers = numbers_of(str(names[i]), magnitudes[i : i + 1], height=12, width=10)
                expected[i : i + 1] = BATCHED[str(names[i])](expected[i : i + 1], torch.from_numpy(numbers))
    assert torch.equal(apply(plan, images.clone()), expected)
    nothing = Plan(np.full((2, 60), IDENTITY), np.zeros((2, 60)))
    assert torch.equal(apply(nothing, images.clone()), images)


@settings(max_examples=12, deadline=None)
@given(key=st.integers(0, 2**63 - 1), policy=st.sampled_from(POLICIES), cut=st.sampled_from([0, 5]), data=st.data())
def test_a_sample_looks_the_same_in_any_batch(key, policy, cut, data):
    """64 images as one batch, one by one, and in batches of any size in any order."""
    loader = Loader(arrays(64), transform(policy=policy, cutout=cut), device=CPU)
    (together,) = loader.batches([np.arange(64)], key=key)
    alone = torch.cat(list(loader.batches([np.array([i]) for i in range(64)], key=key)))
    assert torch.equal(together, alone)
    order = np.array(data.draw(st.permutations(range(64))))
    pieces = np.split(order, sorted(data.draw(st.sets(st.integers(1, 63), max_size=5))))
    assert torch.equal(torch.cat(list(loader.batches(pieces, key=key))), together[order])
    assert not torch.equal(next(loader.batches([np.arange(64)], key=key ^ 1)), together)


def test_batches_keep_their_sizes_where_blocks_hold_many_or_one(monkeypatch):
    loader = Loader(arrays(20), transform(), device=CPU)
    rows = [np.arange(3), np.arange(3, 10), np.arange(10, 11), np.arange(0), np.arange(11, 20)]
    assert BLOCK > 20 * 12 * 10 * 3
    whole = list(loader.batches(rows, key=1))
    monkeypatch.setattr("pipeline.data.transform.BLOCK", 4 * 12 * 10 * 3)
    pieces = list(loader.batches(rows, key=1))
    assert [len(batch) for batch in whole] == [len(batch) for batch in pieces] == [3, 7, 1, 0, 9]
    assert all(map(torch.equal, whole, pieces))


@pytest.mark.parametrize("policy", POLICIES)
def test_image_files_take_the_same_policies(policy, tmp_path):
    from PIL import Image

    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    files = Split(
        labels=np.zeros(8, np.int64), ids=np.arange(8), stored=FileNames(f"{i}.png" for i in range(8)).below(tmp_path)
    )
    plain, changed = (
        Loader(files, transform(policy=p, rand_n=3, cutout=c), device=CPU) for p, c in (("none", 0), (policy, 5))
    )
    (moved,) = plain.batches([np.arange(8)], key=5)
    (together,) = changed.batches([np.arange(8)], key=5)
    alone = torch.cat(list(changed.batches([np.array([i]) for i in reversed(range(8))], key=5)))
    assert torch.equal(together, alone.flip(0))
    hole = changed.transform.normalise(torch.tensor([128, 102, 76], dtype=torch.uint8).view(1, 3, 1, 1))
    assert ((together == hole).all(1).sum((1, 2)) >= 9).all()  # a corner of the square at least
    assert ((together != moved).flatten(1).float().mean(1) > 0.5).sum() >= 3


def test_what_was_made_before_keeps_its_identity():
    """A checkpoint's transform and its place in the fingerprint of stores, as they were before policies existed."""
    then = {
        "size": [12, 10],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "augment": "crop-flip",
        "crop_pct": 0.875,
        "interpolation": "bilinear",
    }
    assert transform().to_dict() == then
    assert Transform.from_dict(then) == transform()
    now = transform(policy="randaugment", rand_m=5, cutout=4)
    assert now.to_dict() == then | {"policy": "randaugment", "rand_m": 5, "cutout": 4}
    assert Transform.from_dict(now.to_dict()) == now
