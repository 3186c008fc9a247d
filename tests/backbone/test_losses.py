"""The losses of stage 1 against values worked out by hand, against stage 2's formulas, and over ranks and parts."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.backbone.image_classifier import ImageClassifier
from pipeline.backbone.losses import SCALE, UNREADABLE, TrainingLoss
from pipeline.backbone.sampling import shares
from pipeline.config import BackboneConfig, load_config, shipped_configs
from pipeline.errors import ConfigError
from pipeline.longtail import class_balanced_weights, inverse_prior_weights, ldam_margins
from pipeline.rebalance.engine.objective import classification_loss
from pipeline.rebalance.methods import losses
from pipeline.rebalance.methods.api import Stage1

CPU = torch.device("cpu")
COUNTS = np.array([80, 15, 5])
EIGHTHS = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)  # probabilities 1/8, 2/8, 5/8
EVERY = ("ce", "focal", "cb", "grw", "ldam-drw", "balanced-softmax")


def objective(loss, **settings):
    return TrainingLoss(BackboneConfig(loss=loss, **settings), COUNTS, device=CPU)


def of(made, label, *, logits=EIGHTHS, epoch=0):
    return made.terms(logits, torch.tensor([label]), epoch=epoch).item()


def test_cross_entropy_and_its_smoothing():
    assert of(objective("ce"), 2) == pytest.approx(math.log(8 / 5))
    logs = [math.log(8), math.log(4), math.log(8 / 5)]
    assert of(objective("ce", label_smoothing=0.3), 2) == pytest.approx(0.7 * logs[2] + 0.1 * sum(logs))
    assert objective("ce").denominator(np.array([0, 0, 2]), epoch=0) == 3


def test_focal():
    assert of(objective("focal", focal_gamma=2), 2) == pytest.approx((3 / 8) ** 2 * math.log(8 / 5))
    assert of(objective("focal", focal_gamma=0.5), 0) == pytest.approx((7 / 8) ** 0.5 * math.log(8))
    sure = torch.tensor([[1000.0, 0.0, 0.0]], requires_grad=True)
    objective("focal", focal_gamma=0.5).terms(sure, torch.tensor([0]), epoch=0).sum().backward()
    assert torch.isfinite(sure.grad).all()


def test_class_balanced_weights_and_what_they_are_divided_by():
    v = [0.1 / (1 - 0.9**n) for n in COUNTS]
    made = objective("cb", cb_beta=0.9)
    labels, z = [0, 2, 2], torch.cat([EIGHTHS, EIGHTHS, EIGHTHS.flip(1)])
    found = made.terms(z, torch.tensor(labels), epoch=0).sum().item() / made.denominator(np.array(labels), epoch=0)
    logs = [math.log(8), math.log(8 / 5), math.log(8)]
    assert found == pytest.approx(sum(v[y] * x for y, x in zip(labels, logs, strict=True)) / (v[0] + 2 * v[2]))


def test_generalised_reweighting():
    made = objective("grw", grw_rho=1.2)
    assert of(made, 2) / math.log(8 / 5) / (of(made, 0) / math.log(8)) == pytest.approx(16**1.2)
    ratio = made.denominator(np.array([2]), epoch=0) / made.denominator(np.array([0]), epoch=0)
    assert ratio == pytest.approx(16**1.2)


def test_balanced_softmax():
    inside = np.array([1, 2, 5]) * COUNTS
    assert of(objective("balanced-softmax"), 1) == pytest.approx(math.log(inside.sum() / inside[1]))
    assert objective("balanced-softmax").denominator(np.array([0, 2]), epoch=0) == 2


def test_margins_and_deferred_weights():
    made = objective("ldam-drw", epochs=10, drw_start=0.75, cb_beta=0.9)
    cosines = np.array([0.6, 0.8, -0.2])
    z = torch.tensor(SCALE * cosines)[None]
    moved = SCALE * np.array([0.6 - 0.5 * 0.5, 0.8, -0.2])  # (5/80)^(1/4) = 1/2
    plain = -moved[0] + math.log(np.exp(moved).sum())
    assert of(made, 0, logits=z, epoch=7) == pytest.approx(plain)  # 7.5 epochs come to 8
    assert made.denominator(np.array([0, 2]), epoch=7) == 2
    v = [1 / (1 - 0.9**n) for n in COUNTS]
    scale = 3 / sum(v)
    assert of(made, 0, logits=z, epoch=8) == pytest.approx(scale * v[0] * plain)
    assert made.denominator(np.array([0, 2]), epoch=8) == pytest.approx(scale * (v[0] + v[2]))


@pytest.mark.parametrize("loss", EVERY)
def test_stage_2_computes_the_same(loss):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(40, 3, generator=random, dtype=torch.float64)
    z = z.clamp(-1, 1) * SCALE if loss == "ldam-drw" else z
    y = torch.randint(3, (40,), generator=random)
    made = objective(loss, drw_start=0)
    found = made.terms(z, y, epoch=0).sum() / made.denominator(y.numpy(), epoch=0)
    sizes = torch.tensor(COUNTS, dtype=torch.float64)
    given = Stage1(sizes, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    ldam = losses.ldam(z / SCALE, y, ldam_margins(given.counts, 0.5), SCALE)
    v = class_balanced_weights(sizes)[y]
    rho = inverse_prior_weights(given.counts, 1.2)[y]
    expected = {
        "ce": lambda: losses.cross_entropy(z, y).mean(),
        "focal": lambda: losses.focal(z, y, 2.0).mean(),
        "cb": lambda: classification_loss(z, y, sizes, cb="softmax", beta=0.9999),
        "grw": lambda: (rho * losses.cross_entropy(z, y)).sum() / rho.sum(),
        "ldam-drw": lambda: (v * ldam).sum() / v.sum(),
        "balanced-softmax": lambda: losses.cross_entropy(losses.with_prior(z, given, 1.0), y).mean(),
    }[loss]()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", EVERY)
def test_an_unreadable_image_has_no_loss_and_no_gradient(loss):
    z = torch.zeros(2, 3, requires_grad=True)
    terms = objective(loss, label_smoothing=0 if loss == "focal" else 0.1, drw_start=0).terms(
        z, torch.tensor([UNREADABLE, 1]), epoch=0
    )
    terms.sum().backward()
    assert terms[0] == 0
    assert terms[1] > 0
    assert z.grad[0].tolist() == [0, 0, 0]


class Tiny(nn.Module):
    """Something with the interface of a timm model."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        return self.body(x).relu()

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.fc(x)


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize(("world", "parts"), [(1, 2), (2, 1), (2, 2), (3, 4)])
def test_ranks_and_parts_give_the_gradient_of_the_whole_batch(loss, world, parts):
    """As the trainer does it: every part's terms times world / denominator, summed on a rank, averaged over ranks."""
    torch.manual_seed(0)
    made = objective(loss, drw_start=0, label_smoothing=0 if loss == "focal" else 0.1)
    learner = ImageClassifier(Tiny().double(), scale=made.scale)
    x, y = torch.randn(13, 4, dtype=torch.float64), np.random.default_rng(0).integers(0, 3, 13)
    weights = [p for p in learner.parameters() if p.requires_grad]

    def gradient(rows):
        terms = made.terms(learner(x[rows]), torch.as_tensor(y[rows]), epoch=0)
        return torch.autograd.grad(terms.sum() * (world / made.denominator(y, epoch=0)), weights)

    whole = [g / world for g in gradient(np.arange(13))]
    dealt = shares(np.arange(13), world=world, parts=parts)
    of_ranks = [[sum(g) for g in zip(*(gradient(rows) for rows in rank), strict=True)] for rank in dealt]
    for expected, found in zip(whole, zip(*of_ranks, strict=True), strict=True):
        torch.testing.assert_close(sum(found) / world, expected, rtol=1e-12, atol=1e-15)
        assert expected.abs().max() > 0


def test_a_cosine_classifier_decides_alike_where_it_is_used():
    torch.manual_seed(0)
    learner = ImageClassifier(Tiny().double(), scale=SCALE)
    x = torch.randn(500, 4, dtype=torch.float64)
    assert learner.model.fc.bias.tolist() == [0, 0, 0]
    for _ in range(200):  # as in training, so that the mean length is known
        logits = learner(x)
    features = learner.model.forward_features(x)
    used = Tiny().double()
    used.load_state_dict(learner.model_state())
    linear = used.forward_head(features)
    unit = learner.model.fc.weight / learner.model.fc.weight.norm(dim=1, keepdim=True)
    cosines = features @ unit.T / features.norm(dim=1).clamp_min(1e-9)[:, None]
    torch.testing.assert_close(logits, SCALE * cosines)
    assert torch.equal(linear.argmax(1), logits.argmax(1))
    # a feature of mean length has the logits of training
    torch.testing.assert_close(linear, logits * (features.norm(dim=1) / features.norm(dim=1).mean())[:, None])
    assert learner.model_state()["fc.weight"].data_ptr() != learner.model.fc.weight.data_ptr()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("backbone.loss=cb backbone.sampler=class-balanced", "class weights and class-balanced sampling together"),
        ("backbone.loss=grw backbone.sampler=square-root", "class weights and square-root sampling"),
        ("backbone.loss=balanced-softmax backbone.sampler=class-balanced", "the class prior in it and class-balanced"),
        ("backbone.loss=ldam-drw backbone.sampler=class-balanced", "backbone.force_double_balancing=true"),
        ("backbone.loss=focal backbone.label_smoothing=0.1", "not defined for loss focal"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    path = shipped_configs()["digits-lt"]
    with pytest.raises(ConfigError, match=words):
        load_config(path, settings.split())
    if "sampler" in settings:
        load_config(path, [*settings.split(), "backbone.force_double_balancing=true"])
