"""Checkpoints whose names are not timm's: matched by order and shapes, and checked on images."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.backbone.build import classifier_name
from pipeline.backbone.external_checkpoint import load_external
from pipeline.backbone.match_weights import match_by_order
from pipeline.backbone.pretrained import load_encoder
from pipeline.config import make_config
from pipeline.data import load_dataset
from pipeline.errors import DataError


def loaded(tensors, file, *, model="tf_efficientnet_lite0", **data):
    """Return the backbone in a file of these tensors, for the digits or other data."""
    torch.save(tensors, file)
    tree = {"name": "t", "data": data or {"source": "digits", "image_size": 64}, "backbone": {"model": model}}
    config = make_config(tree, "t")
    return load_external(file, config, dataset=load_dataset(config.data))


@pytest.fixture(scope="module")
def foreign():
    """The state dict of EfficientNet-Lite0 as its authors' program names it."""
    encoder = load_encoder("lite0")
    return torch.load(encoder.file, map_location="cpu", weights_only=True), encoder.tensors


def test_the_packages_own_file_is_the_network_that_the_alias_is(foreign, tmp_path):
    stored, expected = foreign
    assert "_blocks.0._bn1.weight" in stored
    backbone = loaded(stored, tmp_path / "w.pth")
    for key, tensor in backbone.model.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(tensor, expected[key]), key
    notes = " ".join(backbone.external["notes"])
    assert "matched by order and shapes, such as _conv_stem.weight with conv_stem.weight" in notes
    assert "holds on 32 training images" in notes
    assert backbone.probe  # its head is of 1,000 classes


def test_tensors_of_the_same_shapes_in_other_places_are_found_on_images(foreign, tmp_path):
    stored = dict(foreign[0])
    groups = {}
    for key, tensor in stored.items():
        groups.setdefault((tensor.shape, key.rpartition(".")[2]), []).append(key)
    for first, second, *_ in (group for group in groups.values() if len(group) > 1):
        stored[first], stored[second] = stored[second], stored[first]
    with pytest.raises(DataError, match=r"the same order but not its places.*--key-map FILE"):
        loaded(stored, tmp_path / "w.pth")


def test_only_the_same_order_shapes_and_kinds_match():
    network = timm.create_model("test_resnet", num_classes=10)
    head = classifier_name(network)
    renamed = {f"module_{i}.{key.rpartition('.')[2]}": t for i, (key, t) in enumerate(network.state_dict().items())}
    matched = match_by_order(renamed, network, head)
    state = {key: t for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert list(matched) == list(state)
    assert all(matched[key] is t for key, t in zip(state, state.values(), strict=True)) or all(
        torch.equal(matched[key], t) for key, t in state.items()
    )
    without_head = dict(list(renamed.items())[:-2])
    assert match_by_order(without_head, network, head).keys() == {key for key in state if not key.startswith(head)}
    other_classes = timm.create_model("test_resnet", num_classes=7)
    assert match_by_order(renamed, other_classes, head) is not None
    items = list(renamed.items())
    assert match_by_order(dict(items[1:]), network, head) is None
    assert match_by_order(dict([items[-1], *items[:-1]]), network, head) is None
    position = next(i for i, (key, _) in enumerate(items) if key.endswith("running_mean"))
    items[position], items[position - 1] = items[position - 1], items[position]  # bias and running_mean: equal shapes
    assert match_by_order(dict(items), network, head) is None


def test_guessed_statistics_and_lost_edges_of_small_files_are_told(tmp_path):
    digits = load_digits()
    for digit in range(2):
        for split, rows in (("train", slice(0, 10)), ("test", slice(10, 14))):
            (tmp_path / split / str(digit)).mkdir(parents=True)
            for number, image in enumerate(digits.images[digits.target == digit][rows]):
                Image.fromarray((image * 15.9).astype(np.uint8)).save(tmp_path / split / str(digit) / f"{number}.png")
    tensors = timm.create_model("test_resnet", num_classes=2).state_dict()
    data = {"source": "folder", "path": str(tmp_path), "image_size": 32, "workers": 0}
    notes = " ".join(loaded(tensors, tmp_path / "w.pth", model="test_resnet", **data).external["notes"])
    assert "mean and standard deviation are a guess" in notes
    assert "small images (8 pixels) are enlarged and lose their edges: the middle 95% of a side" in notes
    assert "--encoder" in notes
    network = {"encoder": str(tmp_path / "w.pth"), "model": "test_resnet"}
    frozen = make_config({"name": "t", "data": data, "backbone": network}, "t")
    backbone = load_external(None, frozen, dataset=load_dataset(frozen.data))
    assert "lose their edges" not in " ".join(backbone.external["notes"])
