"""Every method on one small store: tuned alike, chosen on validation, told completely, readable by all commands."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import cache
from pipeline.cli import invoke
from pipeline.config import RebalanceConfig
from pipeline.deploy.export import export_model
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.info import describe
from pipeline.method_names import MEMBERS, METHODS
from pipeline.rebalance import evaluate, rebalance
from pipeline.rebalance.combine_seeds import combine
from pipeline.rebalance.methods import FREE, RIVALS, Free, add_method
from pipeline.rebalance.methods.ensemble import temperature
from pipeline.rebalance.tuning import LAMS
from pipeline.report import write_report
from pipeline.report.study import read_study
from pipeline.results.differences import read_hits
from pipeline.results.head_id import HeadId
from pipeline.results.heads import read_scorers
from tests.small_run import made_store

QUICK: dict = {"epochs": 2, "batch_size": 32, "lr": 0.02, "seeds": (0, 1), "trials": 4}
FREE_NAMES = {rule.name for rule in FREE}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    made_store(folder / "features.zarr")
    lines: list[str] = []
    result = rebalance(
        folder / "features.zarr",
        RebalanceConfig(method=("all",), **QUICK),
        out=folder / "rebalance",
        device="cpu",
        report=lines.append,
    )
    return folder, result, lines


def of(rows, **facts):
    return [row for row in rows if all(row[key] == value for key, value in facts.items())]


def test_every_method_has_its_row_once_for_each_seed(run):
    _, result, lines = run
    rows = result.to_dict()["results"]
    for method in METHODS:
        if method != "iwb":
            seeds = [None] if method in ("baseline", "ensemble") or method in FREE_NAMES else [0, 1]
            assert [r["seed"] for r in of(rows, method=method, split="test")] == seeds
    chosen = {c["method"]: c for c in result.chosen}
    assert set(chosen) == set(METHODS) - {"baseline"}
    shown = {r["lam"] for r in of(rows, method="iwb")}
    assert shown == {0, *LAMS, chosen["iwb"]["lam"]}  # the curve of λ at the best of all other settings
    assert len(lines) == len(chosen) + 1  # and the estimate


def test_trials_are_as_many_for_all_and_never_of_the_test_split(run):
    folder, result, _ = run
    assert {t["split"] for t in result.trials} == {"val"}
    for method in METHODS:
        mine = of(result.trials, method=method)
        if method == "ensemble":
            assert not mine
            continue
        if method in FREE_NAMES:
            assert len(mine) == len(RIVALS[method].grid)
        elif method != "baseline":
            assert len(mine) == 4
            assert all(t["parameters"]["lr"] for t in mine)
        (best,) = of(mine, chosen=True)
        highest = max(t["all"] for t in mine if not t["diverged"])
        assert best["all"] > highest - 12  # a standard error of some 6 points, in one batch order and in two
    with open(folder / "rebalance/trials.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(result.trials)
    assert json.loads(lines[-1]["parameters"]) == result.trials[-1]["parameters"]


def test_the_row_of_a_method_is_its_chosen_trial(run):
    _, result, _ = run
    rows = result.to_dict()["results"]
    for c in result.chosen:
        val = of(rows, method=c["method"], lam=c["lam"], split="val")
        assert np.mean([r["all"] for r in val]) == pytest.approx(c["score"])
        if c["method"] != "ensemble":
            (trial,) = of(result.trials, method=c["method"], chosen=True)
            assert (trial["parameters"], trial["lam"]) == (c["parameters"], c["lam"])
    assert result.selected["method"] == "ensemble"  # it is within one standard error of the best
    assert result.selected["chosen_on"] == "val"


def test_the_ensemble_is_the_weighted_mean_of_its_members(run):
    folder, result, _ = run
    weights = result.selected["parameters"]
    assert list(weights) == list(MEMBERS)
    assert sum(weights.values()) == pytest.approx(1, abs=0.01)
    heads = [(HeadId.from_dict(facts), head) for facts, head in read_scorers(folder / "rebalance/heads.safetensors")]
    (ensemble,) = [head for identity, head in heads if identity.method == "ensemble"]
    store = cache.open_cache(folder / "features.zarr")
    features, labels = torch.from_numpy(store.read("val").astype(np.float32)), torch.from_numpy(store.labels("val"))
    chosen = {c["method"]: (c["method"], c["loss"], c["lam"]) for c in result.chosen}
    mixed = torch.zeros(len(features), len(store.counts))
    for method, weight in weights.items():
        orders = [h.logits(features) for i, h in heads if (i.method, i.loss, i.lam) == chosen[method]]
        logits = torch.stack(orders).mean(0)
        mixed += weight / temperature(logits, labels) * logits
    ours = ensemble.logits(features)
    torch.testing.assert_close(ours - ours.mean(1, True), mixed - mixed.mean(1, True), rtol=0.02, atol=0.02)


def test_the_table_names_what_was_chosen(run):
    text = " ".join(str(run[1]).split())
    assert "Chosen for each method on validation" in text
    assert "Each trained method has at most 4 trials; a method without training tries its whole grid" in text
    assert "n = 2 batch orders of one backbone" in text
    for c in run[1].chosen:
        assert c["method"] in text


def test_other_commands_read_the_result(run, tmp_path):
    folder, result, _ = run
    again = evaluate(folder / "features.zarr", folder / "rebalance/heads.safetensors")
    rows = [r for r in result.results if r.split == "test"]
    assert len(again.results) == len(rows)
    for row in rows:
        same = [r for r in again.results if (r.method, r.lam, r.seed) == (row.method, row.lam, row.seed)]
        assert [r.all for r in same] == [pytest.approx(row.all)]
    write_report(folder, out=tmp_path)
    assert "balanced-softmax" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "crt: 4 trials" in " ".join(str(describe(folder / "rebalance/results.json")).split())  # lines are wrapped
    assert "disalign: 2" in str(describe(folder / "rebalance/heads.safetensors"))
    with pytest.raises(DataError, match=r"no checkpoint beside the store"):
        export_model(folder, out=tmp_path / "model", method="disalign")
    with pytest.raises(DataError, match=r"no head crd; it has baseline, .*; run `pipeline rebalance --method crd`"):
        export_model(folder, out=tmp_path / "model", method="crd")


def test_the_test_split_is_read_once_and_after_the_choice(tmp_path, monkeypatch):
    store = made_store(tmp_path / "features.zarr")
    read, seen = cache.Cache.read, []

    def spy(self, split, *rest):
        seen.append(split)
        assert split != "test" or (tmp_path / "out/selection.json").exists()
        return read(self, split, *rest)

    monkeypatch.setattr(cache.Cache, "read", spy)
    rebalance(store, RebalanceConfig(method=("crt", "ncm"), **QUICK), out=tmp_path / "out")
    assert seen.count("test") == 1


def test_folds_choose_where_there_is_no_validation_split(tmp_path):
    store = made_store(tmp_path / "features.zarr", splits=("test",))
    config = RebalanceConfig(method=("lws", "ncm", "disalign", "iwb"), **QUICK)
    with pytest.raises(ConfigError, match="--select-on kfold"):
        rebalance(store, config, out=tmp_path / "out")
    result = rebalance(store, config.model_copy(update={"select_on": "kfold"}), out=tmp_path / "out")
    assert {t["split"] for t in result.trials} == {"kfold"}
    assert {c["method"] for c in result.chosen} == {"cb", "lws", "ncm", "disalign", "iwb"}
    assert not any("asked for were tried" in note for note in result.notes)


def test_lambdas_that_do_not_fit_the_trials_are_told(tmp_path):
    store = made_store(tmp_path / "features.zarr")
    config = RebalanceConfig(method=("iwb",), tune=True, lam="0.1,0.2,0.3,0.4", **(QUICK | {"trials": 6}))
    result = rebalance(store, config, out=tmp_path / "out")
    assert "λ 0.2, 0.4 of the 4 asked for were tried" in " ".join(result.notes)
    assert {t["lam"] for t in of(result.trials, method="iwb")} == {0.2, 0.4}


@pytest.mark.usefixtures("methods_as_before")
def test_a_method_that_never_left_the_stage_1_head_is_named(tmp_path):
    add_method(Free("still", lambda given, samples, own: (given.weight * 2, given.bias * 2)))
    config = RebalanceConfig(method=("still", "ncm", "crt", "baseline"), **QUICK)
    notes = rebalance(made_store(tmp_path / "features.zarr"), config, out=tmp_path / "out").notes
    told = [note for note in notes if "the method has no effect" in note]
    assert [note.partition(":")[0] for note in told] == ["still"]


def test_a_diverged_trial_is_told_and_never_chosen(tmp_path):
    store = made_store(tmp_path / "features.zarr")
    config = RebalanceConfig(method=("grw", "cb"), **(QUICK | {"lr": 1e15, "momentum": 0.99, "epochs": 3}))
    with pytest.raises(PipelineError, match=r"cb: fitting diverged at every learning rate; .*--lr"):
        rebalance(store, config, out=tmp_path / "out")
    ladder = {"lr": 3e14, "trials": 12}  # up to 1e16; weights above 1e15 count as diverged
    result = rebalance(store, RebalanceConfig(method=("cb",), tune=True, **(QUICK | ladder)), out=tmp_path / "out")
    lost = of(result.trials, diverged=True)
    assert 0 < len(lost) < 12
    assert {t["all"] for t in lost} == {None}
    assert not of(lost, chosen=True)


def test_the_command_line_names_methods_and_refuses_double_balancing(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr")
    assert invoke(["rebalance", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in METHODS)
    quick = [f"--set=rebalance.{key}={value}" for key, value in QUICK.items() if key not in ("seeds", "trials")]
    common = ["rebalance", str(store), "--config", "digits-lt", "--seeds", "0", "--out", str(tmp_path / "o"), *quick]
    assert invoke([*common, "--method", "balanced-softmax", "--sampling", "class-balanced"]) == 2
    assert "--force-double-balancing" in capsys.readouterr().err
    forced = ["--method", "balanced-softmax", "--sampling", "class-balanced", "--force-double-balancing"]
    assert invoke([*common, *forced, "--trials", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [c["method"] for c in document["chosen"]] == ["cb", "balanced-softmax"]
    assert document["settings"]["sampling"] == "class-balanced"
    assert Path(tmp_path / "o/trials.csv").is_file()


def test_backbones_that_tune_differently_still_have_one_row_a_method(tmp_path):
    documents, hits = [], []
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        made_store(folder / "features.zarr", seed=seed)
        config = RebalanceConfig(method=("iwb", "ncm", "lws"), lam=str(0.2 + seed / 2), **QUICK)
        documents.append(rebalance(folder / "features.zarr", config, out=folder / "rebalance").to_dict())
        hits.append(read_hits(folder / "rebalance/test_hits.safetensors"))
    first, second = (next(c for c in d["chosen"] if c["method"] == "iwb") for d in documents)
    combined = combine(documents, hits)
    assert {(c["method"], c["lam"]) for c in combined["candidates"]} == {("iwb", None), ("ncm", None), ("lws", None)}
    tested = [
        np.mean([r["all"] for r in of(d["results"], method="iwb", lam=c["lam"], split="test")])
        for d, c in zip(documents, (first, second), strict=True)
    ]
    (row,) = of(combined["results"], method="iwb", lam=None, split="test")
    assert row["all"] == pytest.approx(np.mean(tested))
    assert row["all_std"] == pytest.approx(np.std(tested, ddof=1))
    lrs = [next(c for c in d["chosen"] if c["method"] == "lws")["parameters"]["lr"] for d in documents]
    told = next(c for c in combined["chosen"] if c["method"] == "lws")["parameters"]["lr"]
    assert told == (lrs[0] if len(set(lrs)) == 1 else f"{lrs[0]} | {lrs[1]}")
    (joint,) = of(combined["chosen"], method="iwb")
    assert (joint["lam"], joint["parameters"]["λ"]) == (None, "0.2 | 0.7")
    assert joint["score"] == pytest.approx(np.mean([first["score"], second["score"]]))
    combined["selected"] |= {"method": "iwb", "loss": "cb", "lam": None}
    (tmp_path / "results.json").write_text(json.dumps(combined), encoding="utf-8")
    study = read_study(tmp_path)
    assert [b.selected.lam for b in study.backbones] == [first["lam"], second["lam"]]
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Every method, tuned alike" in page
    assert "<tr class=chosen><th>iwb</th><td>4</td>" in page


def test_equal_norms_have_the_other_settings_of_iwb_and_one_row(tmp_path, monkeypatch):
    """The weight of the norm term counts at λ = 0 too, and λ = 0 may be among those asked for."""

    def tune(sweep, method, config, split, *, finish):
        best = {"cb": HeadId("cb", "cb", lr=0.02), "iwb": HeadId("iwb", "cb", 0.5, 0.02, (("kl_weight", 16.0),))}[
            method
        ]
        sweep.add([best])
        return [best], best

    monkeypatch.setattr("pipeline.rebalance.compare._search", tune)
    store = made_store(tmp_path / "features.zarr")
    rebalance(store, RebalanceConfig(method=("iwb",), tune=True, lam="0,0.5", **QUICK), out=tmp_path / "out")
    heads = [HeadId.from_dict(facts) for facts, _ in read_scorers(tmp_path / "out/heads.safetensors")]
    assert sorted((h.lam, h.seed) for h in heads if h.method == "iwb") == [(0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)]
