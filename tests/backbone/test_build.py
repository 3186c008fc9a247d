from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.backbone.build import augmentation_facts, build_model, classifier, encode, input_transform
from pipeline.config import BackboneConfig, DataConfig
from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.transform import Loader, Transform
from pipeline.errors import ConfigError
from pipeline.results.tables import caption


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet32_is_the_papers():
    model = build_model(BackboneConfig(model="cifar_resnet32"), num_classes=100)
    assert parameters(model) == 470_004
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 31
    assert not any(m.bias is not None for m in convolutions)
    assert encode(model, torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)


def test_width_multiplies_channels():
    model = build_model(BackboneConfig(model="cifar_resnet20", width=2), num_classes=10)
    assert classifier(model).in_features == 128


def test_resnet34_keeps_the_small_image():
    model = build_model(BackboneConfig(model="cifar_resnet34"), num_classes=100)
    assert round(parameters(model) / 1e6, 1) == 21.3
    with torch.no_grad():
        assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)


@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "cifar_resnet34", "resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224"]
)
def test_encoder_and_classifier_are_the_whole_model(name):
    model = build_model(BackboneConfig(model=name), num_classes=7).eval()
    images = torch.randn(2, 3, *([224, 224] if name.startswith("vit") else [64, 64]))
    with torch.no_grad():
        features = encode(model, images)
        assert features.shape[1] == classifier(model).in_features
        torch.testing.assert_close(classifier(model)(features), model(images))


def test_initial_weights_are_a_function_of_the_seed_and_leave_others_alone():
    before = torch.get_rng_state()
    first, again, other = (
        build_model(BackboneConfig(model="cifar_resnet8", seed=s), num_classes=10) for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "resnet51"}, "did you mean resnet"),
        ({"model": "resnet18", "width": 2}, "no width multiplier"),
        ({"model": "deit_tiny_distilled_patch16_224"}, "not one nn.Linear"),
        ({"model": "cifar_resnet8", "pretrained": True}, "set backbone.pretrained=false"),
    ],
)
def test_a_model_that_will_not_do_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build_model(BackboneConfig(**settings), num_classes=5)


def test_the_input_says_which_policy_and_nothing_of_those_that_are_not_used():
    images = Split(np.zeros(2, np.int64), np.arange(2), images=np.zeros((2, 8, 8, 3), np.uint8))

    def of(**data):
        return input_transform(DataConfig(source="digits", **data), BackboneConfig(), images).to_dict()

    assert of(rand_n=5, rand_m=1) == of()
    assert of(policy="randaugment", rand_n=5, cutout=4) == of() | {"policy": "randaugment", "rand_n": 5, "cutout": 4}
    with pytest.raises(ConfigError, match=r"data\.cutout=8: would hide whole images of 8 × 8"):
        of(cutout=8)


def test_more_than_crops_and_flips_stands_beside_the_network():
    crops = Transform((8, 8), (0.5,) * 3, (0.5,) * 3, "crop-flip")
    assert augmentation_facts(BackboneConfig(), crops) == {}
    told = augmentation_facts(BackboneConfig(mixup=0.2), replace(crops, policy="randaugment", rand_m=5, cutout=4))
    assert told == {"augmentation": "crop-flip, randaugment 2 × 5, cutout 4, mixup 0.2"}
    document = {"network": {"network": "net"} | told, "selected": {"n": 1, "chosen_on": None}}
    assert caption(document).startswith("net, stage 1 with crop-flip, randaugment 2 × 5, cutout 4, mixup 0.2; ")


@pytest.mark.parametrize(("augmentation", "share"), [("crop", 1.0), ("crop-flip", 1.0), (None, 0.875), ("none", 0.875)])
def test_files_that_are_trained_on_whole_are_evaluated_whole(tmp_path, augmentation, share):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    one = np.zeros(1, np.int64)
    files = Split(labels=one, ids=one, stored=FileNames(["a.png"]).below(tmp_path))
    data = DataConfig(
        source="folder", path=tmp_path, image_size=16, augment=augmentation, mean=(0, 0, 0), std=(1, 1, 1)
    )
    transform = input_transform(data, BackboneConfig(), files)
    assert transform.crop_pct == share
    (batch,) = Loader(files, transform, device=torch.device("cpu")).batches([one])
    whole = np.array_equal((255 * batch[0]).round().byte().permute(1, 2, 0).numpy(), pixels)
    assert whole == (share == 1)
