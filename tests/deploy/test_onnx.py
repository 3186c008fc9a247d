"""The ONNX graph computes what PyTorch does, from pixels on, in onnxruntime."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from cache import open_cache
from pipeline.backbone.build import encode
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.cli import invoke
from pipeline.data import load_dataset
from pipeline.deploy import onnx as export_onnx
from pipeline.deploy.export import as_linear, export_model
from pipeline.deploy.inference_model import load_model
from pipeline.deploy.predict import predict
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.report.study import read_study
from pipeline.results.head_id import HeadId
from pipeline.results.heads import Gated, Linear
from tests.small_run import digits_run


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    """Digits with heads of several methods, one of them no linear layer."""
    copy = tmp_path_factory.mktemp("onnx") / "run"
    shutil.copytree(tiny_backbone.parent, copy / "backbone")
    return digits_run(copy / "backbone" / "last.pt", method=("iwb", "iwb-la", "disalign", "tau-norm"), trials=2)


@pytest.fixture(scope="module")
def exported(run):
    return export_model(run, to="onnx", out=run.parent / "model")


@pytest.fixture(scope="module")
def digits(run):
    """200 real test images of all classes, uint8 (200, 3, 8, 8)."""
    images = load_dataset(load_checkpoint(run / "backbone" / "last.pt").config.data).test.images[::2]
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def expected_of(run, kind, digits):
    """Logits by encoder and head, normalised by hand."""
    checkpoint = load_checkpoint(run / "backbone" / "last.pt")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (checkpoint.transform.mean, checkpoint.transform.std))
    with torch.no_grad():
        features = encode(checkpoint.model, (torch.from_numpy(digits) / 255 - mean) / std)
        return read_study(run).first.head(kind)[1].logits(features).numpy(), features.numpy()


def test_200_real_images_get_the_answers_of_pytorch(run, exported, digits):
    session = onnxruntime.InferenceSession(exported.weights)
    logits, features = session.run(None, {"images": digits})
    expected, before = expected_of(run, read_study(run).first.selected, digits)
    print(
        f"largest difference of logits {np.abs(logits - expected).max():.1e}, largest logit {np.abs(expected).max():.1f}"
    )
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features, before, rtol=1e-4, atol=1e-4)
    assert len(digits) == 200
    assert len(set(expected.argmax(1))) > 1
    alone = np.concatenate([session.run(["logits"], {"images": digits[i : i + 1]})[0] for i in range(3)])
    np.testing.assert_allclose(alone, logits[:3], rtol=1e-4, atol=1e-4)


def test_the_file_tells_what_it_takes_and_nothing_of_this_machine(exported):
    session = onnxruntime.InferenceSession(exported.weights)
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, 8, 8])
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("logits", ["batch", 10]),
        ("features", ["batch", 16]),
    ]
    inside = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    config = json.loads((exported.out / "config.json").read_text())
    assert (inside["header"]["kind"], inside["header"]["summary"]) == ("graph", {"network": exported.network})
    assert inside["class_names"] == [str(i) for i in range(10)]
    assert (inside["transform"], inside["head"]) == (config["transform"], exported.head)
    assert config["onnx"]["input"] == {
        "name": "images", "type": "uint8", "shape": ["batch", 3, 8, 8], "channels": "RGB", "range": [0, 255]
    }  # fmt: skip
    assert config["onnx"]["normalisation"] == "inside the graph"
    content = exported.weights.read_bytes()
    for local in (str(Path.cwd()), "site-packages", "stack_trace", "model.py"):
        assert local.encode() not in content
    with pytest.raises(Exception, match="Unexpected input data type"):
        session.run(None, {"images": np.zeros((1, 3, 8, 8), np.float32)})


def test_predict_says_the_same_from_graph_checkpoint_and_run(run, exported, digits, tmp_path):
    for i, image in enumerate(digits[:20]):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{i:02}.png")
    other = export_model(run, to="safetensors", out=tmp_path / "model").out
    first, *others = (predict(m, [tmp_path / "*.png"], compare=True, batch_size=8) for m in (exported.out, other, run))
    assert first.compared.images == 20
    for found in others:
        assert found.compared == first.compared
        for a, b in zip(first, found, strict=True):
            assert [g.name for g in a.guesses + a.stage1] == [g.name for g in b.guesses + b.stage1]
            assert [g.probability for g in a.guesses + a.stage1] == pytest.approx(
                [g.probability for g in b.guesses + b.stage1], abs=1e-5
            )


def test_a_head_that_is_no_layer_goes_whole_into_a_graph_and_into_nothing_else(run, digits, tmp_path):
    out = tmp_path / "model"
    for to in ("timm", "safetensors"):
        with pytest.raises(DataError, match=r"disalign: is no linear layer .* --to onnx carries it whole"):
            export_model(run, to=to, out=out, method="disalign")
    assert not out.exists()
    exported = export_model(run, to="onnx", out=out, method="disalign")
    kind = HeadId("disalign")
    assert isinstance(read_study(run).first.head(kind)[1], Gated)
    (logits,) = onnxruntime.InferenceSession(exported.weights).run(["logits"], {"images": digits})
    np.testing.assert_allclose(logits, expected_of(run, kind, digits)[0], rtol=1e-4, atol=1e-4)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "its gated head re-balanced with disalign" in card
    assert "The method was given, not chosen." in card


def test_a_network_without_a_bias_carries_only_heads_without_one(run):
    checkpoint = load_checkpoint(run / "backbone" / "last.pt")
    checkpoint.model.fc = nn.Linear(16, 10, bias=False)
    head = Linear(np.ones((10, 16), np.float32), np.zeros(10, np.float32))
    kind = HeadId("tau-norm")
    assert as_linear(head, checkpoint, kind) is head
    with pytest.raises(
        DataError, match="has no bias, so it cannot carry the rebalanced one; --to onnx carries it whole"
    ):
        as_linear(replace(head, bias=np.ones(10, np.float32)), checkpoint, kind)


def test_a_method_with_several_lambdas_gives_the_one_validation_prefers(run, tmp_path):
    own = read_study(run).first
    for method in ("iwb", "iwb-la"):
        tuned = own.tuned_lam(method)
        found = export_model(run, out=tmp_path / "model", method=method)
        assert (found.head["method"], found.head["lam"]) == (method, tuned)
        assert tuned is not None
        assert "λ was chosen on validation." in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"no head iwb-la, λ = 0.123; it has λ = [0-9.]+; run"):
        export_model(run, out=tmp_path / "model", method="iwb-la", lam=0.123)
    with pytest.raises(ConfigError, match=r"--lam 0.1: tau-norm has no λ; leave it out"):
        export_model(run, out=tmp_path / "model", method="tau-norm", lam=0.1)


def test_without_its_packages_it_says_what_to_install(run, exported, tmp_path, monkeypatch, capsys):
    known = export_onnx.importlib.util.find_spec
    monkeypatch.setattr(
        export_onnx.importlib.util, "find_spec", lambda name: None if name.startswith("onnxr") else known(name)
    )
    assert invoke(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "x")]) == 2
    assert "--to onnx needs onnxruntime: pip install 'iwb-pipeline[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match=r"an ONNX model needs onnxruntime: pip install 'iwb-pipeline\[onnx\]'"):
        load_model(exported.out)


def test_weights_beyond_what_one_file_holds_lie_in_a_second(run, exported, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "ONE_FILE", 1000)
    large = export_model(run, to="onnx", out=tmp_path / "model")
    assert (large.out / "model.onnx.data").is_file()
    assert large.weights.stat().st_size < exported.weights.stat().st_size
    for a, b in zip(load_model(large.out).run(torch.from_numpy(digits)),
                    load_model(exported.out).run(torch.from_numpy(digits)), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    export_model(run, to="timm", out=large.out)
    assert sorted(p.name for p in large.out.iterdir()) == [
        "README.md", "config.json", "model.pth", "stage1_head.safetensors"
    ]  # fmt: skip


def test_a_graph_that_computes_something_else_is_refused(run, tmp_path, monkeypatch):
    right = export_onnx.runner
    monkeypatch.setattr(export_onnx, "runner", lambda *a: lambda images: tuple(t + 0.1 for t in right(*a)(images)))
    with pytest.raises(PipelineError, match=r"onnxruntime computes something else than PyTorch, 0.1 apart"):
        export_model(run, to="onnx", out=tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_damaged_graph_is_named(exported, tmp_path):
    copy = shutil.copytree(exported.out, tmp_path / "model")
    (copy / "model.onnx").write_bytes(exported.weights.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"not a readable model of `pipeline export` .*; export it again"):
        load_model(copy)


def test_features_of_the_store_are_those_of_the_graph(run, exported, digits):
    stored = open_cache(run / "features.zarr").read("test")[::2].astype(np.float32)
    _, features = load_model(exported.out).run(torch.from_numpy(digits))
    np.testing.assert_allclose(features.numpy(), stored, rtol=2e-3, atol=2e-3)  # stored as float16
