"""Major feature weakening: the rule of docs/weakening.md, a reconstruction from an abstract, by hand and by property."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.backbone import checkpoint
from pipeline.backbone.image_classifier import ImageClassifier, Parallel
from pipeline.backbone.sampling import shares
from pipeline.backbone.train import train_backbone
from pipeline.backbone.weakening import Weakening, check_place, keep_share, mix, partners, weakening_strength
from pipeline.config import BackboneConfig, WeakenConfig, make_config
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError
from tests.conftest import digits_tree
from tests.ranks import _context

CPU = torch.device("cpu")
some_counts = st.lists(st.integers(1, 5000), min_size=2, max_size=30).map(np.array)


class TinyNet(nn.Module):
    """Two linear layers in timm's terms, float64, no batch normalisation: ranks may differ in nothing."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, classes)
        self.unused = nn.Linear(2, 2)
        random = np.random.default_rng(3)
        for parameter in self.parameters():
            parameter.data = torch.from_numpy(random.normal(size=parameter.shape))

    def forward_features(self, x):
        return torch.tanh(self.body(torch.tanh(self.stem(x))))

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.head


def problem(settings, *, rows=23):
    """(weakening, images, labels) of one batch with 12, 7 and 4 images of three classes, shuffled."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([0, 1, 2], [12, 7, 4]))[:rows]
    weakening = Weakening(settings, labels, np.array([12, 7, 4]), seed=5, device=CPU)
    return weakening, torch.from_numpy(random.normal(size=(rows, 6))), torch.from_numpy(labels)


def test_reach_by_hand():
    assert weakening_strength(np.array([110, 60, 10])).tolist() == [1, 0.5, 0]
    assert weakening_strength(np.array([110, 60, 10]), gamma=2).tolist() == [1, 0.25, 0]
    assert weakening_strength(np.array([7, 7, 7])).tolist() == [0, 0, 0]


@given(some_counts, st.floats(0.01, 1), st.floats(0.1, 4), st.integers(0, 2**62))
def test_large_classes_keep_no_more_and_the_smallest_keeps_all(counts, strength, gamma, seed):
    r = weakening_strength(counts, gamma=gamma)
    means = 1 - strength * r / 2
    order = np.argsort(counts, kind="stable")
    assert (np.diff(means[order]) <= 0).all()  # E[l_c] does not grow with N_c
    draws = np.random.default_rng(seed % 1000).random(len(counts))
    l_i = keep_share(draws, r, strength=strength)
    assert ((l_i >= 1 - strength * r) & (l_i <= 1)).all()
    assert (l_i[counts == counts.min()] == 1).all()


def test_the_share_is_uniform_with_the_stated_mean():
    l_i = keep_share(np.random.default_rng(0).random(200_000), np.full(200_000, 0.8), strength=0.5)
    assert l_i.mean() == pytest.approx(1 - 0.5 * 0.8 / 2, abs=1e-3)
    assert np.histogram(l_i, 4, (0.6, 1))[0] / 50_000 == pytest.approx(np.ones(4), abs=0.02)


@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**32))
def test_partners_permute_every_group_and_never_leave_it(rows, group, seed):
    j = partners(np.random.default_rng(seed).random(rows), group=group)
    assert sorted(j) == list(range(rows))
    assert (j // group == np.arange(rows) // group).all()


def test_every_permutation_of_a_group_is_as_likely():
    j = partners(np.random.default_rng(1).random(60_000), group=3).reshape(-1, 3) % 3
    _, often = np.unique(j, axis=0, return_counts=True)
    assert often / 20_000 == pytest.approx(np.full(6, 1 / 6), abs=0.01)


@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 3), st.integers(1, 40))
def test_shares_keep_groups_whole_and_lose_nothing(rows, world, parts, group):
    batch = np.arange(rows) + 1000
    cut = shares(batch, world=world, parts=parts, group=group)
    assert [len(of_rank) for of_rank in cut] == [parts] * world
    flat = [part for of_rank in cut for part in of_rank]
    np.testing.assert_array_equal(np.concatenate(flat), batch)
    assert all((part[0] - 1000) % group == 0 for part in flat if len(part))
    sizes = [-(-len(part) // group) for part in flat]
    assert max(sizes) - min(sizes) <= 1
    if group == 1:
        for part, known in zip(flat, np.array_split(batch, world * parts), strict=True):
            np.testing.assert_array_equal(part, known)


def test_ranks_and_parts_see_the_mixture_of_the_whole_batch():
    weakening, _, labels = problem(WeakenConfig(strength=0.7, group=4))
    batch = np.arange(23)
    keep, partner = weakening.inputs(batch, labels, epoch=1, step=2)
    for world, parts in ((1, 2), (2, 1), (3, 2)):
        cut = [part for of in shares(batch, world=world, parts=parts, group=4) for part in of]
        got = [weakening.inputs(rows, labels[rows], epoch=1, step=2) for rows in cut]
        assert torch.equal(torch.cat([k for k, _ in got]), keep)
        assert [int(rows[i]) for rows, (_, j) in zip(cut, got, strict=True) for i in j] == partner.tolist()


def test_every_epoch_step_seed_and_sample_draws_anew():
    weakening, _, labels = problem(WeakenConfig(strength=1, group=23))
    rows = np.arange(23)
    first, again, step, epoch = (
        weakening.inputs(rows, labels, epoch=e, step=s)[0] for e, s in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, step)
    assert not torch.equal(first, epoch)
    assert not torch.equal(step, epoch)
    other = Weakening(WeakenConfig(strength=1, group=23), labels.numpy(), np.array([12, 7, 4]), seed=6, device=CPU)
    assert not torch.equal(first, other.inputs(rows, labels, epoch=0, step=0)[0])


def test_nothing_is_drawn_for_balanced_classes_or_strength_0():
    labels = np.repeat([0, 1], 5)
    for settings, counts in ((WeakenConfig(strength=1), [5, 5]), (WeakenConfig(), [9, 1])):
        weakening = Weakening(settings, labels, np.array(counts), seed=0, device=CPU)
        assert weakening.inputs(np.arange(10), torch.from_numpy(labels), epoch=0, step=0) == ()
        assert weakening.group == 1


def test_the_smallest_class_and_lone_rows_are_untouched_to_the_bit():
    weakening, z, labels = problem(WeakenConfig(strength=1, group=11))
    keep, partner = weakening.inputs(np.arange(23), labels, epoch=0, step=0)
    mixed = mix(z.float(), keep, partner)
    alone = (labels == 2) | (partner == torch.arange(23))
    assert partner[22] == 22  # the last group has one row
    assert torch.equal(mixed[labels == 2], z.float()[labels == 2])
    torch.testing.assert_close(mixed[alone], z.float()[alone], rtol=1e-6, atol=1e-7)
    changed = (mixed != z.float()).any(1)
    assert changed[~alone].all()
    one = mix(z[:1], keep[:1], torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(one, z[:1], rtol=1e-7, atol=0)


def test_nobody_is_mixed_with_an_image_that_could_not_be_read():
    weakening, _, labels = problem(WeakenConfig(strength=1, group=23))
    _, partner = weakening.inputs(np.arange(23), labels, epoch=0, step=0)
    labels[4] = -100
    keep, same = weakening.inputs(np.arange(23), labels, epoch=0, step=0)
    assert torch.equal(partner, same)
    assert keep[partner == 4] == 1


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("at", ["features", "body"])
def test_gradients_are_those_of_the_rule_written_out(at, detach):
    """The same loss row by row, without hooks or index arithmetic."""
    settings = WeakenConfig(strength=0.9, group=8, at=at, detach_partner=detach)
    weakening, images, labels = problem(settings)
    keep, partner = weakening.inputs(np.arange(23), labels, epoch=0, step=0)
    learner, by_hand = ImageClassifier(TinyNet(), settings), TinyNet()
    logits = learner(images, keep.double(), partner)
    nn.functional.cross_entropy(logits, labels).backward()
    inner = torch.tanh(by_hand.stem(images))
    z = inner if at == "body" else torch.tanh(by_hand.body(inner))
    mixed = []
    for i in range(23):
        l_i, other = float(keep[i]), z[int(partner[i])]
        mixed.append(l_i * z[i] + (1 - l_i) * (other.detach() if detach else other))
    mixed = torch.stack(mixed)
    scores = by_hand.head(torch.tanh(by_hand.body(mixed)) if at == "body" else mixed)
    loss = -sum(torch.log_softmax(scores[i], 0)[labels[i]] for i in range(23)) / 23  # labels kept
    loss.backward()
    for (name, a), b in zip(learner.model.named_parameters(), by_hand.parameters(), strict=True):
        if name.startswith("unused"):
            continue
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_evaluation_never_mixes():
    settings = WeakenConfig(strength=1, at="body")
    learner, images = ImageClassifier(TinyNet(), settings), torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(learner.eval()(images), TinyNet()(images))


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("layer.1", r"no such module; did you mean layers\.1\?; known here: features, conv1, bn1, layers, layers\.0,"),
        ("fc.weight", "no such module"),
        ("drop", "no such module"),
    ],
)
def test_a_wrong_place_names_the_right_ones(at, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        train_backbone(make_config(digits_tree(weaken={"strength": 0.5, "at": at}), "t"), out=tmp_path)


def test_a_module_that_does_not_get_the_batch_once_is_refused():
    import timm

    with pytest.raises(ConfigError, match=r"at=unused: this module is applied 0 times"):
        check_place(Flat(), "unused", size=(1, 2), device=CPU)
    check_place(Flat(), "body", size=(1, 2), device=CPU)
    check_place(timm.create_model("resnet18", num_classes=2), "layer3", size=(64, 64), device=CPU)
    with pytest.raises(ConfigError, match="applied 2 times"):
        check_place(Twice(), "act", size=(4, 4), device=CPU)


class Flat(TinyNet):
    def forward(self, x):
        return super().forward(x.double().flatten(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.act(x))


def test_balanced_classes_train_as_with_cross_entropy(tmp_path):
    tree = digits_tree(epochs=1)
    tree["data"] |= {"imbalance_factor": 1, "max_per_class": 15}
    digests = []
    for strength in (0, 1):
        tree["backbone"]["weaken"] = {"strength": strength}
        done = train_backbone(make_config(tree, "t"), out=tmp_path / str(strength))
        digests.append(checkpoint.load_checkpoint(done.checkpoint).weights_digest)
    assert digests[0] == digests[1]


def test_weakened_training_is_another_one_and_goes_on_exactly(tmp_path):
    from pipeline.backbone.events import Step
    from pipeline.errors import Terminated

    setting = {"weaken": {"strength": 0.5, "group": 16, "at": "layers.2"}, "epochs": 2, "accumulate": 2}
    whole = train_backbone(make_config(digits_tree(**setting), "t"), out=tmp_path / "whole").checkpoint
    plain = train_backbone(make_config(digits_tree(epochs=2, accumulate=2), "t"), out=tmp_path / "plain").checkpoint

    def stop(event):
        if isinstance(event, Step) and (event.epoch, event.step) == (0, 3):
            os.kill(os.getpid(), 15)

    with pytest.raises(Terminated):
        train_backbone(make_config(digits_tree(**setting), "t"), out=tmp_path / "pieces", report=stop)
    other = setting | {"weaken": setting["weaken"] | {"strength": 0.6}}
    with pytest.raises(ConfigError, match=r"backbone\.weaken\.strength was 0\.5, now 0\.6"):
        train_backbone(make_config(digits_tree(**other), "t"), out=tmp_path / "pieces")
    pieces = train_backbone(make_config(digits_tree(**setting), "t"), out=tmp_path / "pieces").checkpoint
    digest = [checkpoint.load_checkpoint(path).weights_digest for path in (whole, pieces, plain)]
    assert digest[0] == digest[1] != digest[2]


def test_a_checkpoint_from_before_weakening_goes_on(tmp_path):
    path = train_backbone(make_config(digits_tree(epochs=1), "t"), out=tmp_path).checkpoint
    state = checkpoint.read(path)
    state["identity"] = {k: v for k, v in state["identity"].items() if ".weaken." not in k}
    for key in ("weaken", "diagnose_every", "diagnose_per_class"):
        state["config"]["backbone"].pop(key)
    state.pop("format")
    checkpoint.save(path, state)
    assert train_backbone(make_config(digits_tree(epochs=1), "t"), out=tmp_path).trained_epochs == 0


def test_too_few_groups_for_the_parts_of_a_batch(tmp_path):
    tree = digits_tree(accumulate=4, weaken={"strength": 0.5, "group": 32})
    with pytest.raises(
        ConfigError, match=r"whole groups of 32 images.* take batches of 128 or more, backbone\.weaken\.group=15"
    ):
        train_backbone(make_config(tree, "t"), out=tmp_path)


def test_training_cuts_batches_between_groups(tmp_path, monkeypatch):
    cut, real = [], Weakening.inputs
    monkeypatch.setattr(
        Weakening, "inputs", lambda self, rows, *a, **k: cut.append(len(rows)) or real(self, rows, *a, **k)
    )
    setting = {"epochs": 1, "accumulate": 2, "weaken": {"strength": 0.5, "group": 16}}
    train_backbone(make_config(digits_tree(**setting), "t"), out=tmp_path)
    assert cut[::2] == [32] * 6  # of batches of 60 or 61
    assert sum(cut) == 363


def _one_rank(rank, world, port, out):
    """Two steps of SGD on this rank's share of a weakened batch; parameters to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo")
    settings = WeakenConfig(strength=0.8, group=8)
    weakening, images, labels = problem(settings)
    net = TinyNet()
    del net.unused
    parallel = Parallel(ImageClassifier(net, settings), Ranks(rank, world, CPU))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    (rows,) = shares(np.arange(23), world=world, group=weakening.group)[rank]
    for step in range(2):
        keep, partner = weakening.inputs(rows, labels[rows], epoch=0, step=step)
        logits = parallel(images[rows], keep.double(), partner)
        optimiser.zero_grad()
        (nn.functional.cross_entropy(logits, labels[rows], reduction="sum") * world / 23).backward()
        optimiser.step()
    if rank == 0:
        out.write_text(json.dumps([p.tolist() for p in net.parameters()]))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _one_rank(0, 1, port, tmp_path / "one")
    both = [_context.Process(target=_one_rank, args=(rank, 2, port, tmp_path / "two")) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_the_command_trains_on_two_ranks_as_on_one(tmp_path):
    """A network without batch normalisation, weakened and diagnosed; only the order of sums differs."""
    setting = {"model": "vit_tiny_patch16_224", "width": 1, "epochs": 1, "batch_size": 20, "lr": 0.001}
    setting["precision"] = "float32"  # in bfloat16 the two sums differ by more than their order
    tree = digits_tree(**setting, weaken={"strength": 0.8, "group": 5}, diagnose_every=1, diagnose_per_class=2)
    tree["data"] |= {"image_size": 224, "max_per_class": 6, "imbalance_factor": 6, "val_per_class": 0}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    for nproc in ("1", "2"):
        words = [sys.executable, "-m", "pipeline", "train-backbone", "small.yaml", "--out", nproc, "--nproc", nproc]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint.read(tmp_path / nproc / "last.pt")["model"] for nproc in ("1", "2"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6, msg=name)
    seen = [np.genfromtxt(tmp_path / nproc / "diagnostics.csv", delimiter=",", skip_header=1) for nproc in ("1", "2")]
    np.testing.assert_allclose(*seen, rtol=1e-4)


def test_settings_outside_their_range_are_refused():
    for wrong in ({"strength": 1.1}, {"strength": -0.1}, {"gamma": 0}, {"group": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make_config(digits_tree(weaken=wrong), "t")
    with pytest.raises(ConfigError, match=r"unknown key backbone\.weaken\.strenght; did you mean strength"):
        make_config(digits_tree(weaken={"strenght": 1}), "t")
    assert BackboneConfig().weaken.strength == 0
