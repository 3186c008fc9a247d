"""Which number format a training takes, and that the checkpoint decides it when training goes on."""

import pytest
import torch

from pipeline.backbone import arithmetic, checkpoint
from pipeline.backbone.build import build_model
from pipeline.backbone.train import train_backbone
from pipeline.config import BackboneConfig
from pipeline.errors import ConfigError
from tests.backbone.test_train import config

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["bfloat16 units", "no bfloat16 units"])
def native(request, monkeypatch):
    monkeypatch.setattr(arithmetic, "computes_bfloat16", lambda device: request.param)
    return request.param


def test_auto_takes_bfloat16_for_large_networks_where_the_cpu_has_units(native):
    large = arithmetic.choose_precision("auto", CPU, operations=arithmetic.SMALL_NETWORK)
    assert large == (torch.bfloat16 if native else torch.float32)
    assert arithmetic.choose_precision("auto", CPU, operations=arithmetic.SMALL_NETWORK - 1) == torch.float32
    assert arithmetic.choose_precision("auto", CPU) == torch.float32


def test_emulated_precisions_are_refused(native):
    if native:
        assert arithmetic.choose_precision("bfloat16", CPU) == torch.bfloat16
    else:
        with pytest.raises(ConfigError, match="no bfloat16 units"):
            arithmetic.choose_precision("bfloat16", CPU)
    with pytest.raises(ConfigError, match="only GPUs compute in it"):
        arithmetic.choose_precision("float16", CPU)


def test_the_cost_of_a_network_is_counted_in_operations():
    """cifar_resnet32 takes 69 million multiply-accumulations for 32 × 32 pixels (He et al., CVPR 2016)."""
    model = build_model(BackboneConfig(model="cifar_resnet32"), num_classes=10)
    assert arithmetic.forward_operations(model, (32, 32), CPU) == pytest.approx(2 * 69e6, rel=0.02)


def test_a_training_in_bfloat16_goes_on_in_it_and_not_in_another(tmp_path, monkeypatch):
    monkeypatch.setattr(
        arithmetic, "computes_bfloat16", lambda device: True
    )  # emulated, where it must be: a small network
    train_backbone(config(epochs=1, precision="bfloat16"), out=tmp_path)
    state = checkpoint.read(tmp_path / "last.pt")
    assert state["identity"]["backbone.precision"] == "bfloat16"
    assert state["provenance"]["precision"] == "bfloat16"
    assert all(tensor.dtype != torch.bfloat16 for tensor in state["model"].values())  # weights stay float32
    assert train_backbone(config(epochs=1, precision="auto"), out=tmp_path).trained_epochs == 0
    with pytest.raises(ConfigError, match=r"backbone\.precision was bfloat16, now float32"):
        train_backbone(config(epochs=1, precision="float32"), out=tmp_path)
