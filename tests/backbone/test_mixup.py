import json
from itertools import chain

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.backbone.mixup import Mixture, Mixup
from pipeline.backbone.sampling import shares
from pipeline.backbone.train import train_backbone
from pipeline.config import BackboneConfig, make_config
from pipeline.errors import ConfigError
from tests.conftest import digits_tree

CPU = torch.device("cpu")


def mixup(alpha=1.0, group=4):
    return Mixup(alpha, group=group, seed=3, device=CPU)


def test_images_and_losses_are_mixed_by_hand():
    mixture = Mixture(0.75, torch.tensor([1, 0]))
    images = torch.tensor([0.0, 8.0]).view(2, 1, 1, 1)
    assert mixture.images(images).flatten().tolist() == [2.0, 6.0]
    logits, labels = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
    terms = mixture.terms(lambda y: F.cross_entropy(logits, y, reduction="none"), labels)
    soft = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    torch.testing.assert_close(terms, -(soft * logits.log_softmax(1)).sum(1))


def test_without_alpha_nothing_is_touched():
    off = mixup(0.0)
    mixture = off.mixture(np.arange(3), torch.arange(3), epoch=0, step=0)
    images = torch.rand(3, 3, 2, 2)
    assert mixture.images(images) is images
    assert mixture.terms(lambda y: y * 2, torch.arange(3)).tolist() == [0, 2, 4]
    assert off.group == 1


def test_nobody_is_mixed_with_an_image_that_could_not_be_read():
    labels = torch.tensor([0, -100, 1, 2] * 8)
    mixture = mixup(group=32).mixture(np.arange(32), labels, epoch=0, step=0)
    assert (labels[mixture.partner] >= 0)[labels >= 0].all()
    terms = mixture.terms(lambda y: F.cross_entropy(torch.zeros(32, 3), y, reduction="none", ignore_index=-100), labels)
    torch.testing.assert_close(terms[labels >= 0], torch.full((24,), float(np.log(3))))


def test_lambda_is_beta_and_another_in_every_step():
    labels = torch.zeros(2, dtype=torch.int64)
    lams = [mixup(0.4).mixture(np.arange(2), labels, epoch=e, step=s).lam for e in range(40) for s in range(50)]
    assert len(set(lams)) == 2000
    assert np.mean(lams) == pytest.approx(0.5, abs=0.03)
    assert np.var(lams) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (1, 3), (2, 2)])
def test_ranks_and_parts_change_no_partner(world, parts):
    batch = np.random.default_rng(0).permutation(90)[:30]

    def pairs(pieces):
        found = {}
        for rows in pieces:
            mixture = mixup().mixture(rows, torch.zeros(len(rows), dtype=torch.int64), epoch=1, step=2)
            found |= dict(zip(rows.tolist(), rows[mixture.partner.numpy()].tolist(), strict=True))
            lams.add(mixture.lam)
        return found

    lams: set[float] = set()
    alone = pairs([batch])
    assert sum(a != b for a, b in alone.items()) > 15
    assert sorted(alone.values()) == sorted(batch)
    assert pairs(chain(*shares(batch, world=world, parts=parts, group=4))) == alone
    assert len(lams) == 1


def test_a_network_learns_from_mixtures(tmp_path):
    """And its loss is that of the mixtures: it cannot come near 0, as without mixing."""
    tree = digits_tree(width=0.5, epochs=10, mixup=1.0)
    last = train_backbone(make_config(tree, "t"), out=tmp_path / "mixed").last
    assert last["val_accuracy"] > 40
    lines = [json.loads(line) for line in (tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert 0.6 < lines[-1]["loss"] < lines[0]["loss"]
    with pytest.raises(ConfigError, match=r"backbone\.mixup was 1\.0, now 0"):
        train_backbone(make_config(digits_tree(width=0.5, epochs=10), "t"), out=tmp_path / "mixed")


def test_mixing_twice_is_refused():
    with pytest.raises(ValueError, match="both mix images of a batch"):
        BackboneConfig.model_validate({"mixup": 0.2, "weaken": {"strength": 0.5}})
