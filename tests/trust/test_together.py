"""Class A: artefacts that do not belong together are refused by every command that uses them together."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.cli import invoke
from pipeline.errors import DATA, OK
from pipeline.report.outdated import MARK
from tests.small_run import made_run, made_store

KEPT = Path(__file__).parents[1] / "golden" / "format-0.1"
HEADS = "rebalance/heads.safetensors"


def changed_heads(run: Path, change, **facts) -> None:
    with safe_open(run / HEADS, framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, run / HEADS, metadata | {key: json.dumps(value) for key, value in facts.items()})


def changed_results(run: Path, change) -> None:
    path = run / "rebalance/results.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def set_item(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return lambda run: changed_heads(run, change)


def replaced(name, function):
    return lambda run: changed_heads(run, lambda tensors: tensors.update({name: function(tensors[name])}))


def better_rows(document):
    for row in document["results"]:
        row["all"] = min(100.0, row["all"] + 20)


def another_store(run):
    shutil.rmtree(run / "features.zarr")
    shutil.copytree(KEPT / "three/seed-1/features.zarr", run / "features.zarr")


EVERY = ("export", "report", "predict", "evaluate")
OF_RESULTS = EVERY[:3]
CASES = {  # what is changed in a run → (change, the commands that use it)
    "features made anew": (another_store, EVERY),
    "results of other features": (
        lambda run: shutil.copy(KEPT / "three/seed-1/rebalance/results.json", run / "rebalance"),
        OF_RESULTS,
    ),
    "heads of other features": (lambda run: shutil.copy(KEPT / "three/seed-1" / HEADS, run / HEADS), EVERY),
    "not a number": (set_item("weight", (3, 0, 0), np.nan), EVERY),
    "infinite": (set_item("bias", (0, 0), np.inf), EVERY),
    "a class less": (replaced("weight", lambda array: array[:, 1:].copy()), EVERY),
    "a feature more": (replaced("weight", lambda array: np.pad(array, ((0, 0), (0, 0), (0, 1)))), EVERY),
    "a flat weight": (replaced("weight", lambda array: array[0].copy()), EVERY),
    "whole numbers": (replaced("weight", lambda array: array.astype(np.int64)), EVERY),
    "a head less": (replaced("bias", lambda array: array[1:].copy()), EVERY),
    "other classes": (lambda run: changed_heads(run, lambda t: None, class_names=list("abcdefghij")), EVERY),
    "too few names": (lambda run: changed_heads(run, lambda t: None, class_names=list("abc")), EVERY),
    "classes in another order": (replaced("weight", lambda array: np.roll(array, 1, axis=1)), OF_RESULTS),
    "better numbers": (lambda run: changed_results(run, better_rows), OF_RESULTS),
    "another choice": (lambda run: changed_results(run, lambda d: d["selected"].update(lam=7.0)), OF_RESULTS[::2]),
}


def command(name: str, run: Path, out: Path) -> list[str]:
    image = Path(__file__).parents[2] / "docs/images"
    return {
        "export": ["export", str(run), "--out", str(out / "model")],
        "report": ["report", str(run), "--out", str(out / "page"), "--dry-run"],
        "predict": ["predict", str(run), str(image), "--dry-run"],
        "evaluate": ["evaluate", str(run / "features.zarr")],
    }[name]


@pytest.mark.parametrize("name", EVERY)
def test_a_run_as_it_was_made_is_taken(name, tmp_path, capfd):
    run = shutil.copytree(KEPT / "one", tmp_path / "one")
    assert invoke(command(name, run, tmp_path)) == OK


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, (_, names) in CASES.items() for name in names])
def test_what_does_not_belong_together_is_refused(case, name, tmp_path, capfd):
    run = shutil.copytree(KEPT / "one", tmp_path / "one")
    CASES[case][0](run)
    assert invoke(command(name, run, tmp_path)) == DATA
    said = capfd.readouterr().err
    assert "Error: " in said
    assert "pipeline " in said  # what to type next
    assert not (tmp_path / "model").exists()


EXPORT_CASES = {
    "class_names": ["a"],
    "counts": [1, 2, 3],
    "num_classes": 9,
    "num_features": 31,
    "weights": "../../model.pth",
    "transform": {"size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "augment": "none", "crop_pct": 0},
    "head": [],
    "architecture": 3,
}


@pytest.mark.parametrize("field", EXPORT_CASES)
def test_an_exported_folder_whose_parts_disagree_is_refused(field, tmp_path, capfd):
    model = shutil.copytree(KEPT / "exported", tmp_path / "exported")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {field: EXPORT_CASES[field]}))
    assert invoke(["predict", str(model), str(Path(__file__).parents[2] / "docs/images"), "--dry-run"]) == DATA
    assert "config.json" in capfd.readouterr().err or field == "num_features"


def test_a_page_says_on_top_that_results_are_newer_and_export_says_so_too(tmp_path, capfd):
    run = shutil.copytree(KEPT / "one", tmp_path / "one")
    assert invoke(["report", str(run)]) == OK
    assert MARK not in (run / "report.html").read_text()
    export = ["export", str(run), "--out", str(tmp_path / "model")]
    assert invoke(export) == OK
    assert "older than the results" not in capfd.readouterr().out
    assert invoke(["rebalance", str(run / "features.zarr"), "--lam", "0.3", "--seeds", "0", "--epochs", "1"]) == OK
    assert MARK in (run / "report.html").read_text()
    capfd.readouterr()
    assert invoke(export) == OK
    said = " ".join(capfd.readouterr().out.split())
    assert "iwb, λ = 0.3" in said
    assert f"pipeline report {run}" in said
    assert invoke(["report", str(run)]) == OK
    assert MARK not in (run / "report.html").read_text()


def test_heads_are_evaluated_on_new_features_of_the_same_encoder_only(tmp_path, capfd):
    run, new = made_run(tmp_path / "run"), made_store(tmp_path / "new.zarr", seed=0, counts=(150, 60, 30, 12, 6))
    heads = ["--heads", str(run / HEADS)]
    assert invoke(["evaluate", str(new), *heads]) == OK
    changed_heads(run, lambda tensors: None, encoder="another")
    assert invoke(["evaluate", str(new), *heads]) == DATA
    assert "features were made anew since" in capfd.readouterr().err


def test_heads_of_another_fit_on_the_same_features_are_refused(tmp_path, capfd):
    run = made_run(tmp_path / "run", lam="0.1", seeds=(0,), epochs=1)
    kept = shutil.copy(run / HEADS, tmp_path)
    assert invoke(["rebalance", str(run / "features.zarr"), "--lam", "0.1", "--seeds", "1", "--epochs", "1"]) == OK
    shutil.copy(kept, run / HEADS)
    assert invoke(["report", str(run)]) == DATA
    assert "not the heads that" in capfd.readouterr().err
