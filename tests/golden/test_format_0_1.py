"""Artefacts of version 0.1, made before the code was rebuilt: every later reader reads them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.deploy.export import export_model
from pipeline.deploy.predict import predict
from pipeline.deploy.run_head import rebalanced_head
from pipeline.info import describe
from pipeline.rebalance.evaluation import evaluate
from pipeline.report.html import write_report
from pipeline.report.study import read_study

KEPT = Path(__file__).parent / "format-0.1"
SEEDS = [f"three/seed-{seed}" for seed in (0, 1, 2)]
STORES = [f"{run}/features.zarr" for run in ("one", *SEEDS)]
RESULTS = ["one/rebalance", *(f"{run}/rebalance" for run in SEEDS), "methods"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "format-0.1"
    shutil.copytree(KEPT, folder)
    return folder


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        ("one", "run", ["feature store", "rebalanced heads", "chosen on validation"]),
        ("three", "run of 3 backbones", ["seed-2/features.zarr", "mean over 3 backbones"]),
        ("one/backbone/last.pt", "stage-1 checkpoint", ["parameters"]),
        ("one/backbone", "stage-1 checkpoint", ["parameters"]),
        ("one/backbone/run.json", "record of pipeline train-backbone", ["torch"]),
        ("ab.yaml", "settings of stage 2", ["variants"]),
        ("ablation", "ablation", ["variants"]),
        ("ablation/selection.json", "choice before the test split was read", ["iwb, λ = "]),
        ("exported", "exported model", ["iwb"]),
        ("exported/stage1_head.safetensors", "head before rebalancing", ["classes"]),
        ("three/results.json", "rebalancing results", ["3 backbones"]),
        *((store, "feature store", ["sealed", "digest"]) for store in STORES),
        *((folder, "rebalancing results", ["stage 1"]) for folder in RESULTS),
        *((f"{folder}/selection.json", "choice before the test split was read", ["selected"]) for folder in RESULTS),
        *((f"{folder}/heads.safetensors", "rebalanced heads", ["classes"]) for folder in RESULTS),
        *(
            (f"{folder}/test_hits.safetensors", "which test images each head got right", ["heads"])
            for folder in RESULTS
        ),
    ],
)
def test_info_reads_it(kept, part, kind, words):
    artefact = describe(kept / part)
    assert artefact.kind == kind
    text = " ".join(str(artefact).split())
    assert [word for word in words if word not in text] == []


def test_the_method_that_was_called_best_is_read_by_its_name_of_today(kept):
    old = json.loads((kept / "methods" / "results.json").read_text())
    assert "best" in {row["method"] for row in old["results"]}
    heads = " ".join(describe(kept / "methods" / "heads.safetensors").facts["kinds"])
    assert "iwb-la, λ = " in heads
    assert "best" not in heads
    study = read_study(kept / "methods")
    (tuned,) = {c["lam"] for c in old["chosen"] if c["method"] == "best"}
    assert study.first.tuned_lam("iwb-la") == tuned
    assert rebalanced_head(kept / "methods", method="iwb-la").weight.shape == study.first.store.classifier[0].shape


@pytest.mark.parametrize("run", ["one", "three", "ablation", "methods"])
def test_a_report_is_made_of_it(kept, run, tmp_path):
    report = write_report(kept / run, out=tmp_path)
    page = report.path.read_text(encoding="utf-8")
    assert "</html>" in page
    if run == "one":
        document = json.loads((kept / "one" / "rebalance" / "results.json").read_text())
        selected, chosen = document["selected"], report.rows[-1]
        assert [chosen[m] for m in ("all", "many", "few", "ece")] == pytest.approx(
            [selected[m] for m in ("all", "many", "few", "ece")]
        )


@pytest.mark.parametrize("folder", ["one/rebalance", "methods"])
def test_its_heads_are_evaluated_to_the_numbers_of_then(kept, folder):
    result = evaluate(kept / "one" / "features.zarr", kept / folder / "heads.safetensors")
    then = json.loads((kept / folder / "results.json").read_text())["results"]
    tested = {(r["method"], r["lam"], r["seed"]): r["all"] for r in then if r["split"] == "test"}
    now = {("best" if r.method == "iwb-la" else r.method, r.lam, r.seed): r.all for r in result.results}
    assert now.keys() <= tested.keys()
    assert now == pytest.approx({key: tested[key] for key in now}, abs=1e-6)


def test_it_is_exported_and_predicts_as_the_export_of_then(kept, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(images / f"{number}.png")
    export_model(kept / "one", out=tmp_path / "model")
    now = predict(tmp_path / "model", [images])
    then = predict(kept / "exported", [images])
    tops = [[row["top"][0]["name"] for row in result.to_dict()["predictions"]] for result in (now, then)]
    assert tops[0] == tops[1]
