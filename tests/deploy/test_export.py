"""The exported folder gives the logits that were measured, in timm and in words."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from cache import open_cache
from pipeline.backbone.build import encode
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.cli import invoke
from pipeline.config import RebalanceConfig
from pipeline.deploy.export import export_model
from pipeline.deploy.run_head import rebalanced_head, requested_head
from pipeline.errors import ConfigError, DataError
from pipeline.rebalance import rebalance
from pipeline.report import write_report
from pipeline.report.study import read_heads, read_study
from pipeline.results.documents import read_results
from pipeline.results.head_id import HeadId
from tests.small_run import COUNTS, digits_run, made_store


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    copy = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(tiny_backbone.parent, copy / "backbone")
    return digits_run(copy / "backbone" / "last.pt")


def head_of(run, lam, seed=0):
    facts, weight, bias = read_heads(run / "rebalance" / "heads.safetensors")
    i = next(i for i, f in enumerate(facts) if (f["method"], f["lam"], f["seed"]) == ("iwb", lam, seed))
    return torch.from_numpy(weight[i]), torch.from_numpy(bias[i])


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_timm_loads_the_file_and_gives_the_logits_of_encoder_and_head(run, tmp_path, to):
    exported = export_model(run, to=to, out=tmp_path / "model")
    model = timm.create_model(
        exported.network, num_classes=exported.classes, checkpoint_path=str(exported.weights), **exported.model_args
    ).eval()
    images = torch.linspace(-2, 2, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
    weight, bias = head_of(run, read_results(run / "rebalance" / "results.json")["selected"]["lam"])
    with torch.no_grad():
        expected = encode(load_checkpoint(run / "backbone" / "last.pt").model, images) @ weight.T + bias
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_config_says_what_feeds_the_network_and_names_its_classes(run, tmp_path):
    exported = export_model(run, out=tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    checkpoint = load_checkpoint(run / "backbone" / "last.pt")
    assert config["class_names"] == [str(i) for i in range(10)]
    assert config["counts"] == checkpoint.counts.tolist()
    assert config["model_args"] == {"width": 0.25}
    assert config["transform"] == checkpoint.transform.to_dict() | {"crop_pct": 1.0}  # whole digits were trained on
    assert config["provenance"]["made_from"]["checkpoint"] == checkpoint.weights_digest
    assert json.loads(json.dumps(exported.to_dict()))["head"]["lam"] == config["head"]["lam"]


def test_another_lambda_is_taken_and_not_called_chosen(run, tmp_path):
    lams = {0.05, 0.2} - {read_results(run / "rebalance" / "results.json")["selected"]["lam"]}
    lam = lams.pop()
    exported = export_model(run, out=tmp_path / "model", lam=lam)
    found = torch.load(exported.weights, weights_only=True)
    assert any(torch.equal(tensor, head_of(run, lam)[0]) for tensor in found.values())
    assert exported.head["chosen_on"] is None
    assert f"| iwb, λ = {lam:g} (given) |" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"it has λ = 0, 0.05, 0.2; run `pipeline rebalance --lam 0.7`"):
        export_model(run, out=tmp_path / "model", lam=0.7)


def test_of_a_method_that_was_not_tuned_validation_prefers_a_lambda(run):
    study = read_study(run)
    other = replace(study, backbones=[replace(study.first, selected=HeadId("cb", "cb"))])
    val = {lam: study.spread(HeadId("iwb", "cb", lam), "val", "all").mean for lam in (0.05, 0.2)}
    assert requested_head(other, lam=None, method="iwb") == HeadId("iwb", "cb", max(val, key=val.get))
    assert requested_head(other, lam=0.05000001, method=None) == HeadId("iwb", "cb", 0.05)  # as tables show it
    assert requested_head(other, lam=None, method=None) == HeadId("cb", "cb")
    low = min(val, key=val.get)
    for backbone in other.backbones:  # whatever the two really scored, the higher one is taken
        for row in backbone.rows:
            if row["method"] == "iwb" and row["lam"] == low:
                row["all"] = 100.0
    assert requested_head(other, lam=None, method="iwb").lam == low


def test_another_programs_folder_with_a_config_is_left_alone(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    with pytest.raises(ConfigError, match="holds no exported model; take another --out"):
        export_model(run, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_exporting_again_replaces_but_never_another_folders_content(run, tmp_path):
    export_model(run, out=tmp_path / "model")
    export_model(run, out=tmp_path / "model", to="safetensors")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["weights"] == "model.safetensors"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="take another --out"):
        export_model(run, out=tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_the_store_was_not_made_from_is_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    state = torch.load(copy / "backbone" / "last.pt", weights_only=True)
    next(iter(state["model"].values())).add_(1)
    torch.save(state, copy / "backbone" / "last.pt")
    (copy / "backbone" / "best.pt").unlink()
    with pytest.raises(DataError, match=r"pipeline dump-features --checkpoint .* and `pipeline rebalance` again"):
        export_model(copy, out=tmp_path / "model")
    shutil.rmtree(copy / "backbone")
    with pytest.raises(DataError, match="no checkpoint beside the store"):
        export_model(copy, out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_features_of_ones_own_have_a_report_and_a_head_but_no_model(tmp_path, capsys):
    store = made_store(tmp_path / "mine.zarr", own=True)
    result = rebalance(store, RebalanceConfig(lam="0.1,1", epochs=1, seeds=(0,)), out=tmp_path / "mine-rebalance")
    assert f"{sum(COUNTS)} training images" in write_report(tmp_path / "mine-rebalance").path.read_text()
    with pytest.raises(DataError, match=r"there is only the head: pipeline\.rebalanced_head\('.*mine-rebalance'\)"):
        export_model(tmp_path / "mine-rebalance", out=tmp_path / "model")
    opened = open_cache(store)
    features, labels = opened.read_rows("test", np.arange(opened.rows("test"))), opened.labels("test")
    for lam in (None, 0.1, 1.0):
        head = rebalanced_head(tmp_path / "mine-rebalance", lam=lam)
        right = head.array_logits(features.astype(np.float32)).argmax(1) == labels
        wanted = result.selected["lam"] if lam is None else lam
        (row,) = (r for r in result.results if r.split == "test" and r.method == "iwb" and r.lam == wanted)
        assert 100 * right.mean() == pytest.approx(row.all)
    assert invoke(["report", str(store)]) == 3
    assert f"such as {tmp_path / 'mine-rebalance'}" in capsys.readouterr().err


def test_of_several_backbones_the_first_is_exported_and_named(run, tmp_path):
    for seed in (0, 1):
        shutil.copytree(run, tmp_path / "all" / f"seed-{seed}")
    exported = export_model(tmp_path / "all", out=tmp_path / "model")
    assert exported.head["backbone"] == "seed-0"
    assert "backbone seed-0" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("to", "file"), [([], "train/features.npy"), (["--to", "safetensors"], "store.safetensors")])
def test_a_feature_store_is_exported_as_plain_files(run, tmp_path, capsys, to, file):
    store, out = str(run / "features.zarr"), tmp_path / "plain"
    assert invoke(["export", store, *to, "--out", str(out), "--json"]) == 0
    assert file in json.loads(capsys.readouterr().out)["files"]
    assert (out / file).is_file()
    assert invoke(["export", store, "--out", str(out)]) == 3
    assert "already holds something" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["features.zarr", "--to", "timm"], "is a feature store: it goes --to npy or safetensors"),
        (["features.zarr", "--lam", "0.05"], "without --lam"),
        (["", "--to", "npy"], "npy is of a feature store, such as"),
    ],
)
def test_a_model_and_a_store_are_not_confused(run, tmp_path, capsys, words, message):
    assert invoke(["export", str(run / words[0]), *words[1:], "--out", str(tmp_path / "x")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()
