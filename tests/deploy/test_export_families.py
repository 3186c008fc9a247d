"""Families of networks: timm loads each export strictly, by file, folder and hub; onnxruntime computes the same."""

import json
import os
import shutil

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from torch import nn

from pipeline.backbone.build import encode
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.cli import invoke
from pipeline.data import load_dataset
from pipeline.data.transform import Loader, Transform
from pipeline.deploy.export import export_model
from pipeline.deploy.inference_model import input_facts
from pipeline.report.study import read_study

pytestmark = pytest.mark.slow

FAMILIES = {
    "test_resnet": {},
    "mobilenetv3_small_050": {},
    "test_vit": {"img_size": 32},
    "test_convnext": {},
    "test_efficientnet": {},
    "vgg11": {"mlp_ratio": 0.02},
}


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """A run on digits, 32 × 32, with a timm network of random weights and batch statistics, and its rebalanced heads."""
    name, args, run = request.param, FAMILIES[request.param], tmp_path_factory.mktemp("family") / "run"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **args)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.2, 1.0)
    nn.init.normal_(model.get_classifier().weight, std=0.1)
    torch.save(model.state_dict(), run.parent / "weights.pth")
    sets = [f"backbone.model={name}", "data.image_size=32", "data.workers=0", "dump.views=1"]
    sets += [f"backbone.model_args.{key}={value}" for key, value in args.items()]
    words = ["--checkpoint", str(run.parent / "weights.pth"), "--out", str(run / "features.zarr"), "--device", "cpu"]
    words += [word for setting in sets for word in ("--set", setting)]
    assert invoke(["dump-features", "digits-lt", *words]) == 0
    assert invoke(["rebalance", str(run), "--lam", "0.1", "--epochs", "1"]) == 0
    return run


def inputs_and_logits(run):
    """(uint8 images, what the network sees, logits by encoder and head, their rounding) of three real images.

    Another order of the sums moves a logit by some roundings of the sum of its terms' sizes, Σ|w||x|.
    """
    checkpoint = load_checkpoint(run / "backbone" / "last.pt")
    transform = Transform.from_dict(input_facts(checkpoint))
    test = load_dataset(checkpoint.config.data).test
    (seen,) = Loader(test, transform, device=torch.device("cpu")).batches([np.array([0, 150, 300])])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transform.mean, transform.std))
    own = read_study(run).first
    with torch.no_grad():
        head, features = own.head(own.selected)[1], encode(checkpoint.model, seen)
        logits = head.logits(features)
    terms = features.abs() @ torch.from_numpy(head.arrays[0]).abs().T
    rounding = max(1e-5, 8 * torch.finfo(torch.float32).eps * float(terms.max()))
    return ((seen * std + mean) * 255).round().to(torch.uint8), seen, logits, rounding


def test_timm_loads_it_strictly_and_gives_the_logits(run, tmp_path, monkeypatch):
    _, seen, expected, rounding = inputs_and_logits(run)
    for to in ("timm", "safetensors"):
        exported = export_model(run, to=to, out=tmp_path / to)
        args = {"num_classes": exported.classes, **exported.model_args}
        by_file = timm.create_model(exported.network, checkpoint_path=str(exported.weights), **args)
        by_folder = timm.create_model(f"local-dir:{exported.out}", pretrained=True)
        for model in (by_file.eval(), by_folder.eval()):
            with torch.no_grad():
                torch.testing.assert_close(model(seen), expected, atol=rounding, rtol=1e-5)
                torch.testing.assert_close(model(seen[1:2]), expected[1:2], atol=rounding, rtol=1e-5)
    state = torch.load(tmp_path / "timm" / "model.pth", weights_only=True)
    state.pop(next(key for key in state if key.endswith("weight")))
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(exported.network, checkpoint_path=str(tmp_path / "short.pth"), **args)
    card = ModelCard.load(exported.out / "README.md")
    assert card.data.library_name == "timm"
    assert "from the hub `hf-hub:NAME/OF-IT`" in card.text
    in_hub(exported.out, tmp_path / "cache", monkeypatch)
    with torch.no_grad():
        from_hub = timm.create_model(
            "hf-hub:somebody/digits", pretrained=True, cache_dir=str(tmp_path / "cache")
        ).eval()
        torch.testing.assert_close(from_hub(seen), expected, atol=1e-5, rtol=1e-5)
    assert from_hub.pretrained_cfg["label_names"] == [str(i) for i in range(10)]


def in_hub(folder, cache, monkeypatch):
    """The folder as the hub's client keeps one it has downloaded, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision = "0" * 40
    kept = cache / "models--somebody--digits"
    shutil.copytree(folder, kept / "snapshots" / revision)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(revision)


def test_onnxruntime_computes_the_same_for_one_image_and_for_three(run, tmp_path):
    pixels, _, expected, _ = inputs_and_logits(run)
    exported = export_model(run, to="onnx", out=tmp_path / "model")
    session = onnxruntime.InferenceSession(os.fspath(exported.weights))
    for rows in (slice(1, 2), slice(0, 3)):
        (logits,) = session.run(["logits"], {"images": pixels[rows].numpy()})
        np.testing.assert_allclose(logits, expected[rows].numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(logits.argmax(1), expected[rows].argmax(1).numpy())
    facts = json.loads((tmp_path / "model" / "config.json").read_text())["onnx"]
    print(f"{exported.network}: largest difference {facts['checked']['largest_difference']:.1e}")
    assert facts["checked"]["largest_difference"] < 1e-3 * max(1, facts["checked"]["largest_logit"])
