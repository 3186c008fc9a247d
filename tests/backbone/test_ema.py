"""The average of the weights: its arithmetic, and that it is what is validated and kept for use."""

import signal

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.backbone import checkpoint
from pipeline.backbone.build import build_model, class_accuracy
from pipeline.backbone.ema import WeightAverage, decay_at
from pipeline.backbone.image_classifier import ImageClassifier
from pipeline.backbone.train import train_backbone
from pipeline.config import BackboneConfig, make_config
from pipeline.data import load_dataset
from pipeline.data.transform import Loader
from pipeline.metrics import group_means
from tests import ranks
from tests.backbone.test_train import EVERYTHING, assert_same_state
from tests.conftest import digits_tree


def test_the_decay_warms_up():
    assert [decay_at(t, 0.9) for t in (0, 1, 8)] == pytest.approx([0.1, 2 / 11, 0.5])
    assert decay_at(79, 0.9) < 0.9 == decay_at(80, 0.9) == decay_at(10**6, 0.9)


def test_parameters_and_batch_statistics_are_averaged_and_counts_copied():
    classifier = ImageClassifier(build_model(BackboneConfig(model="cifar_resnet8", width=0.25), num_classes=3))
    average = WeightAverage(classifier, decay=0.5)
    optimiser = torch.optim.SGD(classifier.parameters(), lr=0.01)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    by_hand = {name: value.double().clone() for name, value in classifier.state_dict().items()}
    for step in range(12):
        optimiser.zero_grad()
        classifier(images + step).square().sum().backward()
        optimiser.step()
        average.update(classifier, step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in classifier.state_dict().items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * value.double()
    found = average.classifier.state_dict()
    for name, value in by_hand.items():
        if name.endswith("num_batches_tracked"):
            assert found[name] == 12
        else:
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7)
    assert not average.classifier.training
    assert not any(p.requires_grad for p in average.classifier.parameters())


def test_the_average_keeps_up_when_batch_normalisation_is_converted_later():
    """As training between GPUs does: parameters stay, the modules around them are made anew."""
    classifier = ImageClassifier(build_model(BackboneConfig(model="cifar_resnet8", width=0.25), num_classes=3))
    average = WeightAverage(classifier, decay=0.0)
    classifier.model = nn.SyncBatchNorm.convert_sync_batchnorm(classifier.model)
    with torch.no_grad():
        for tensor in (*classifier.parameters(), *classifier.buffers()):
            tensor.add_(1)
    average.update(classifier, step=100)
    for mine, theirs in zip(average.classifier.state_dict().values(), classifier.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("loss", ["ce", "ldam-drw"])
def test_what_is_kept_for_use_gives_the_accuracy_that_training_told(tmp_path, loss):
    config = make_config(digits_tree(epochs=4, ema=0.95, loss=loss, lr=0.3), "t")
    result = train_backbone(config, out=tmp_path)
    kept, state = checkpoint.load_checkpoint(result.checkpoint), checkpoint.read(result.checkpoint)
    live = state["learner"]["model.conv1.weight"]
    assert not torch.equal(state["model"]["conv1.weight"], live)
    assert torch.equal(state["model"]["conv1.weight"], state["average"]["model.conv1.weight"])
    dataset = load_dataset(config.data)
    labels, classes = dataset.val.labels, len(dataset.class_names)
    loader = Loader(dataset.val, kept.transform, device=torch.device("cpu"))
    with torch.inference_mode():
        (pixels,) = loader.batches([np.arange(len(labels))])
        guess = kept.model(pixels).argmax(1).numpy()
    right = np.bincount(labels[guess == labels], minlength=classes)
    accuracy = class_accuracy(right, np.bincount(labels, minlength=classes))
    assert group_means(accuracy, dataset.counts)["all"] == pytest.approx(result.last["val_accuracy"])
    best = checkpoint.read(tmp_path / "best.pt")
    assert not {"learner", "average", "optimiser"} & best.keys()
    assert ("classifier" in result.network) is (loss == "ldam-drw")


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_changes_neither_weights_nor_average(tmp_path, world):
    """With everything that is more than a plain training: between gradient and step, then after a step."""
    tree, whole, out = digits_tree(epochs=3, **EVERYTHING), tmp_path / "whole", tmp_path / "out"
    assert ranks.train(tree, whole, ranks=world, scratch=tmp_path).codes == [0] * world
    for moment in ("before:update-9", "after:step-14"):
        died = ranks.train(tree, out, ranks=world, kill_at=moment, scratch=tmp_path)
        assert died.codes[0] == -signal.SIGKILL
    assert ranks.train(tree, out, ranks=world, scratch=tmp_path).codes == [0] * world
    for name in ("last.pt", "best.pt"):
        assert_same_state(out / name, whole / name)


def test_without_an_average_a_checkpoint_holds_the_weights_once(tmp_path):
    state = checkpoint.read(train_backbone(make_config(digits_tree(epochs=1), "t"), out=tmp_path).checkpoint)
    assert not {"learner", "average"} & state.keys()
