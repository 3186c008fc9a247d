"""Pretrained encoders by name: the packaged weights are the networks they claim to be, and no hub costs no patience."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from cache import open_cache
from pipeline.backbone import pretrained
from pipeline.backbone.aliases import ALIASES, installed_aliases
from pipeline.backbone.arithmetic import Arithmetic
from pipeline.backbone.build import build_model, encode, input_transform
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.backbone.encoder import encode_in_parts
from pipeline.backbone.pretrained import load_encoder, tensors_by_order
from pipeline.cli import invoke
from pipeline.config import BackboneConfig, DataConfig, find_config, load_config, make_config
from pipeline.data import load_dataset
from pipeline.data.dataset import Split
from pipeline.data.transform import Loader
from pipeline.errors import ConfigError

SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}
SMALL = ["data.image_size=64", "data.workers=0", "rebalance.epochs=1", "rebalance.lam=0.1", "rebalance.seeds=0"]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Nothing answers where the hub should be, and every cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def words(command: str, *more: str, sets=()) -> list[str]:
    return [command, "digits-lt", *more, *(word for setting in [*SMALL, *sets] for word in ("--set", setting))]


@pytest.mark.parametrize("alias", ALIASES)
def test_packaged_weights_give_the_logits_of_their_own_implementation(alias):
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    encoder = load_encoder(alias)
    network = timm.create_model(encoder.model).eval()
    network.load_state_dict(encoder.tensors)
    other = reference.EfficientNet.from_pretrained(f"efficientnet-{alias}", weights_path=str(encoder.file)).eval()
    size = SIZES[alias]  # its padding is made for this size alone
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network(images), other(images), rtol=0, atol=1e-4)
    assert encoder.input["input_size"][1] == SIZES[alias]
    assert (*encoder.input["mean"], *encoder.input["std"]) == (0.5,) * 6


def test_tensors_are_matched_by_order_only_where_every_shape_agrees():
    network = timm.create_model("test_resnet", num_classes=10)
    renamed = {f"layer {i}": tensor for i, tensor in enumerate(network.state_dict().values())}
    matched = tensors_by_order(renamed, network)
    assert matched is not None
    assert all(torch.equal(matched[key], tensor) for key, tensor in network.state_dict().items())
    assert tensors_by_order(renamed, timm.create_model("test_resnet", num_classes=11)) is None
    assert tensors_by_order(dict(list(renamed.items())[1:]), network) is None


def test_a_run_with_an_encoder_trains_nothing_and_stores_what_the_network_computes(tmp_path, capsys):
    out = tmp_path / "run"
    assert invoke(words("run", "--encoder", "lite0", "--out", str(out), "--json", sets=["dump.precision=float32"])) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["baseline"]["all"] > 50  # digits on a network that never saw one, by a linear probe
    assert not (out / "backbone" / "metrics.jsonl").exists()
    config = load_config(find_config("digits-lt"), [*SMALL, "backbone.encoder=lite0"])
    kept, store = load_checkpoint(out / "backbone" / "last.pt"), open_cache(out / "features.zarr")
    assert (kept.external["encoder"], kept.transform.size, kept.transform.crop_pct) == ("lite0", (64, 64), 1.0)
    split = load_dataset(config.data, resize=False).test
    network = build_model(kept.config.backbone, num_classes=10)
    network.load_state_dict(kept.model.state_dict())
    weights = load_encoder("lite0").tensors
    assert all(torch.equal(weights[k], t) for k, t in network.state_dict().items() if not k.startswith("classifier"))
    with torch.no_grad():
        (images,) = Loader(split, kept.transform, device=torch.device("cpu")).batches([np.arange(16)])
        features = encode(network.eval(), images).numpy()
    np.testing.assert_allclose(store.read_rows("test", np.arange(16)), features, atol=0.01, rtol=0.005)
    assert invoke(words("run", "--encoder", "lite0", "--out", str(out), sets=["dump.precision=float32"])) == 0
    assert "up to date" in capsys.readouterr().err


def test_an_encoder_means_one_view_and_the_networks_own_size():
    data = {"source": "digits"}
    config = make_config({"name": "x", "data": data, "backbone": {"encoder": "lite0"}}, "here")
    assert (config.backbone.frozen, config.dump.views) == (True, 1)
    assert (
        make_config({"name": "x", "data": data, "backbone": {"encoder": "lite0"}, "dump": {"views": 3}}, "").dump.views
        == 3
    )
    assert make_config({"name": "x", "data": data}, "here").dump.views == 11
    for wrong in ({"frozen": True}, {"frozen": False, "encoder": "lite0"}):
        with pytest.raises(ConfigError, match="encoder"):
            make_config({"name": "x", "data": data, "backbone": wrong}, "here")


def test_without_a_hub_the_answer_comes_soon_and_names_what_is_installed(no_hub, capsys, tmp_path):
    started = time.perf_counter()
    for name in ("resnet18", "hf-hub:timm/resnet18.a1_in1k"):
        with pytest.raises(
            ConfigError, match=r"does not answer.*--encoder lite0 works without a hub \(installed: lite0"
        ):
            load_encoder(name)
    with pytest.raises(ConfigError, match="no pretrained weights to be had"):
        build_model(BackboneConfig(model="resnet18", pretrained=True), num_classes=10)
    assert time.perf_counter() - started < 5
    assert invoke(words("dump-features", "--encoder", "resnet18", "--out", str(tmp_path / "f.zarr"))) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(pretrained, "PROBE_SECONDS", 0.2)

    def wait_and_fail(*_, **__):
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr("urllib.request.urlopen", wait_and_fail)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="does not answer"):
        pretrained._refuse_unreachable("resnet18", "https://hub.invalid")
    assert time.perf_counter() - started < 0.9


def test_names_that_will_not_do_are_refused_with_what_would(monkeypatch):
    for name, message in {
        "lite9": "did you mean lite",
        "resnet5O": "did you mean resnet50",
        "test_resnetx": "unknown",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_encoder(name)
    with pytest.raises(ConfigError, match="no pretrained weights of it"):
        load_encoder("cifar_resnet32")
    monkeypatch.setitem(ALIASES, "lite0", ALIASES["lite0"]._replace(package="no_such_package"))
    assert "lite0" not in installed_aliases()
    with pytest.raises(ConfigError, match=r"not installed; pip install 'iwb-pipeline\[lite\]'"):
        load_encoder("lite0")


def test_a_folder_and_a_file_are_encoders_too(tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    for number, name in enumerate((f"local-dir:{tmp_path / 'folder'}", str(tmp_path / "folder" / "model.safetensors"))):
        out = tmp_path / f"{number}" / "features.zarr"
        assert invoke(words("dump-features", "--encoder", name, "--out", str(out), sets=["dump.views=1"])) == 0
        assert open_cache(out).width == model.num_features
    assert "the data 10: a linear probe is fitted" in " ".join(capsys.readouterr().err.split())


def test_training_a_frozen_network_and_naming_two_are_refused(tmp_path, capsys):
    assert invoke(words("train-backbone", "--out", str(tmp_path), sets=["backbone.encoder=lite0"])) == 2
    assert "taken as it is" in capsys.readouterr().err
    assert invoke(words("run", "--encoder", "lite0", "--checkpoint", "x.pt", "--out", str(tmp_path))) == 2
    assert "both name a network" in " ".join(capsys.readouterr().err.split())
    assert invoke(words("run", "--encoder", "lite0", "--dry-run", "--out", str(tmp_path / "dry"))) == 0
    assert not (tmp_path / "dry").exists()


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar100_test.medz").is_file(), reason="CIFAR-100 is not beside the checkout")
def test_real_photographs_get_the_features_and_labels_that_another_program_gave_them():
    """300 test images of CIFAR-100 at 160 px, against features and a linear probe of an independent implementation."""
    spec = importlib.util.spec_from_file_location("unpack_cifar100", SHARED / "unpack_cifar100.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    rows = np.arange(0, 10_000, 33)[:300]
    with np.load(SHARED / "features" / "cifar100_lt_if100_effnet_lite0.npz") as archive:
        features, labels = archive["test_features"][rows].astype(np.float32), archive["test_labels"][rows]
        weight, bias = archive["weight"], archive["bias"]
    images = unpack.decode(SHARED / "cifar100_test.medz")[rows]
    encoder = load_encoder("lite0")
    network = timm.create_model(encoder.model).eval()
    network.load_state_dict(encoder.tensors)
    split = Split(labels=labels.astype(np.int64), ids=rows, images=images)
    settings = BackboneConfig(encoder="lite0", model=encoder.model)
    transform = input_transform(DataConfig(source="digits", image_size=160), settings, split, input_facts=encoder.input)
    transform = replace(transform, interpolation="bilinear")  # as the other program resized
    batches = Loader(split, transform, device=torch.device("cpu")).batches(np.array_split(np.arange(300), 20))
    arithmetic = Arithmetic(torch.float32, "channels_last")
    ours = torch.cat([encode_in_parts(network, batch, arithmetic) for batch in batches]).numpy()
    cosine = (ours * features).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(features, axis=1)
    accuracy = [((x @ weight.T + bias).argmax(1) == labels).mean() for x in (ours, features)]
    assert cosine.min() > 0.9999
    assert abs(accuracy[0] - accuracy[1]) < 0.01
    assert accuracy[0] > 0.4
