"""Stage 2 on small stores: what it writes, what it refuses, and that the test split comes last."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import cache
from cache import open_cache
from pipeline import store_from_arrays
from pipeline.config import RebalanceConfig
from pipeline.distributed import Ranks, choose_device
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.metrics import scores
from pipeline.rebalance import RebalanceResult, rebalance, run, sweep
from pipeline.rebalance.engine.features import Features, FeatureSplit
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.objective import penalty
from pipeline.rebalance.folds import CAVEAT, REFITTED
from pipeline.rebalance.load import load
from pipeline.rebalance.prepare import prepare_rebalance
from pipeline.report.study import read_heads
from pipeline.results.differences import paired_difference
from pipeline.results.recommendation import recommendation
from pipeline.results.tables import results_table
from tests.small_run import made_store

REAL = Path(__file__).parents[3] / "shared/data/features/cifar100_lt_if100_resnet32.npz"
COUNTS = np.array([120, 60, 8])
QUICK: dict = {"epochs": 2, "batch_size": 32, "lr": 0.05}


def write_store(path, *, views=3, val=True, data=None):
    """A sealed store of three classes of 120, 60 and 8 samples in 5 dimensions, with a head that favours the first."""
    random = np.random.default_rng(3)
    centres = random.normal(size=(3, 5))

    def draw(counts, count_of_views):
        labels = random.permutation(np.repeat(np.arange(3), counts))
        return (centres[labels] + 1.5 * random.normal(size=(count_of_views, len(labels), 5))).astype(np.float32), labels

    data = data or {"train": draw(COUNTS, views), "val": draw([70] * 3, 1), "test": draw([40] * 3, 1)}
    if not val:
        del data["val"]
    return write_arrays(path, data, centres, np.array([1.0, 0, -1]))


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_arrays(path, data, weight, bias, counts=COUNTS, **facts):
    splits = {name: cache.StoreSplit(len(f), labels, np.arange(len(labels))) for name, (f, labels) in data.items()}
    names = [f"class {c}" for c in range(len(weight))]
    facts = {
        "fingerprint": {"network": "tiny"},
        "provenance": {"network": {"network": "tiny", "parameters": 7}},
    } | facts
    with cache.create_store(
        path,
        splits=splits,
        width=weight.shape[1],
        dtype=str(data["train"][0].dtype),
        weight=weight,
        bias=bias,
        class_names=names,
        counts=counts,
        **facts,
    ) as writer:
        for chunk in writer.chunks:
            writer.write(chunk, data[chunk.split][0][chunk.view, chunk.start : chunk.stop])
        writer.seal()
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "features.zarr")


@pytest.fixture(scope="module")
def swept(store, tmp_path_factory) -> RebalanceResult:
    config = RebalanceConfig(lam="0.1,0.9", seeds=(0, 4), **QUICK)
    return rebalance(store, config, out=tmp_path_factory.mktemp("out"), device="cpu")


def test_the_document_has_the_promised_shape(swept, store):
    document = json.loads((Path(swept.out) / "results.json").read_text())
    header = document.pop("header")
    assert (header["kind"], header["format"]) == ("results", 2)
    assert document.pop("heads_digest") == sha256((Path(swept.out) / "heads.safetensors").read_bytes()).hexdigest()
    assert document == json.loads(json.dumps(swept.to_dict())) | {"store": document["store"], "out": "."}
    assert document["store"] == os.path.relpath(store, swept.out)
    assert document["digest"] == cache.open_cache(store).digest
    assert document["fingerprint"] == {"network": "tiny"}
    assert document["network"] == {"network": "tiny", "parameters": 7, "feature_width": 5}
    assert set(document["baseline"]) == {"all", "many", "medium", "few", "ece"}
    selected = document["selected"]
    assert (selected["method"], selected["loss"], selected["chosen_on"], selected["n"]) == ("iwb", "cb", "val", 2)
    assert selected["lam"] in (0.1, 0.9)
    assert {"all", "all_std", "many", "many_std", "medium", "few", "ece", "ece_std"} <= set(selected)
    assert {"load_s", "fit_s", "heads"} <= set(document["timing"])
    assert document["timing"]["heads"] == 8  # cb, λ 0, two λ, in two orders
    settings = document["settings"]
    assert (settings["log_base"], settings["cb"], settings["kl_weight"]) == ("2", "bce", 1.0)
    kinds = {(r["method"], r["loss"], r["lam"], r["seed"], r["split"]) for r in document["results"]}
    expected = {("baseline", None, None, None, split) for split in ("val", "test")}
    for split in ("val", "test"):
        for seed in (0, 4):
            expected |= {("cb", "cb", None, seed, split)}
            expected |= {("iwb", "cb", lam, seed, split) for lam in (0, 0.1, 0.9)}
    assert kinds == expected
    assert len(document["results"]) == len(expected)
    assert {*document["results"][0]} == {
        "method",
        "loss",
        "lam",
        "seed",
        "split",
        "all",
        "many",
        "medium",
        "few",
        "ece",
    }


def test_the_figures_are_those_of_the_heads_it_kept(swept, store):
    described, weight, bias = read_heads(Path(swept.out) / "heads.safetensors")
    opened = cache.open_cache(store)
    assert weight.shape == (9, 3, 5)
    assert bias.shape == (9, 3)
    np.testing.assert_array_equal(weight[0], opened.classifier[0])
    for split in ("val", "test"):
        features, labels = opened.read(split), opened.labels(split)
        for head, w, b in zip(described, weight, bias, strict=True):
            kind = (head["method"], head["loss"], head["lam"], head["seed"])
            row = next(r for r in swept.results if (r.method, r.loss, r.lam, r.seed) == kind and r.split == split)
            found = scores(features @ w.T + b, labels, COUNTS)
            assert row.all == pytest.approx(found.summary["all"])
            assert row.few == pytest.approx(found.summary["few"])
            assert row.ece == pytest.approx(found.ece, rel=1e-4)
    chosen = [h for h in described if h["selected"]]
    assert [(h["lam"], h["seed"]) for h in chosen] == [(swept.selected["lam"], 0), (swept.selected["lam"], 4)]


def test_selected_is_the_mean_on_test_of_what_was_best_on_val(swept):
    def mean(lam, split):
        return np.mean([r.all for r in swept.results if (r.lam, r.split) == (lam, split) and r.method == "iwb"])

    best = max((0.1, 0.9), key=lambda lam: mean(lam, "val"))
    assert mean(0.1, "val") != mean(0.9, "val")
    assert swept.selected["lam"] == best
    assert swept.selected["all"] == pytest.approx(mean(best, "test"))
    tested = [r.all for r in swept.results if (r.lam, r.split, r.method) == (best, "test", "iwb")]
    assert swept.selected["all_std"] == pytest.approx(np.std(tested, ddof=1))
    stage_1 = next(r for r in swept.results if r.method == "baseline" and r.split == "test")
    assert swept.baseline["all"] == stage_1.all
    assert {"method": "iwb", "loss": "cb", "lam": best} in swept.within_one_se


def test_the_tables_on_disk_agree(swept):
    out = Path(swept.out)
    rows = read_csv(out / "results.csv")
    assert len(rows) == len(swept.results)
    assert rows[0]["lam"] == ""
    assert float(rows[-1]["all"]) == swept.results[-1].all
    lines = read_csv(out / "per_class.csv")
    mine = [x for x in lines if x["method"] == "cb" and x["seed"] == "4" and x["split"] == "test"]
    assert [x["name"] for x in mine] == ["class 0", "class 1", "class 2"]
    assert [x["images"] for x in mine] == ["120", "60", "8"]
    row = next(r for r in swept.results if (r.method, r.seed, r.split) == ("cb", 4, "test"))
    assert np.mean([100 * int(x["correct"]) / int(x["total"]) for x in mine]) == pytest.approx(row.all)
    made = json.loads((out / "run.json").read_text())
    assert made["made_from"] == {"store": os.path.relpath(swept.store, out), "digest": swept.digest}
    assert made["config"]["lam"] == "0.1,0.9"


def test_the_choice_is_on_disk_before_the_test_split_is_read(store, tmp_path, monkeypatch):
    read, seen = cache.Cache.read, []

    def spy(self, split, *rest):
        seen.append(split)
        if split == "test":
            chosen = json.loads((tmp_path / "selection.json").read_text())
            assert chosen["selected"]["chosen_on"] == "val"
            assert not (tmp_path / "results.json").exists()
        return read(self, split, *rest)

    monkeypatch.setattr(cache.Cache, "read", spy)
    result = rebalance(store, RebalanceConfig(lam="0.1,0.3", seeds=(0,), **QUICK), out=tmp_path)
    assert seen.count("test") == 1
    assert json.loads((tmp_path / "selection.json").read_text())["selected"]["lam"] == result.selected["lam"]


def test_where_the_test_split_cannot_be_read_the_choice_is_there_and_the_run_fails(tmp_path):
    store = write_store(tmp_path / "s.zarr")
    chunk = store / "test/features/c/0/0/0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(DataError, match="test/features"):
        rebalance(store, RebalanceConfig(lam="0.1,0.3", seeds=(0,), **QUICK), out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "selection.json",
        "unfinished",
    }  # what was fitted stays
    chosen = json.loads((tmp_path / "out/selection.json").read_text())
    assert chosen["selected"]["lam"] in (0.1, 0.3)
    assert {chosen["selected"]["lam"], chosen["runner_up"]["lam"]} == {0.1, 0.3}
    assert chosen["selected"]["chosen_on"] == "val"


def test_the_differences_are_those_of_the_heads_it_kept(swept, store):
    described, weight, bias = read_heads(Path(swept.out) / "heads.safetensors")
    opened = cache.open_cache(store)
    labels = opened.labels("test")
    answers = opened.read("test") @ weight.transpose(0, 2, 1) + bias[:, None]

    def rate(method, lam):
        return np.mean(
            [
                a.argmax(1) == labels
                for a, h in zip(answers, described, strict=True)
                if (h["method"], h["lam"]) == (method, lam)
            ],
            axis=0,
        )

    rows = {row["against"]: row for row in swept.differences["rows"]}
    other = {0.1: 0.9, 0.9: 0.1}[swept.selected["lam"]]
    assert [(r["method"], r["lam"]) for r in rows.values()] == [("baseline", None), ("cb", None), ("iwb", other)]
    for row in rows.values():
        first, second = rate("iwb", swept.selected["lam"]), rate(row["method"], row["lam"])
        expected = paired_difference(first, second, labels, COUNTS)
        assert {g: row[g] for g in expected} == expected
    assert rows["baseline"]["few"]["difference"] == pytest.approx(swept.selected["few"] - swept.baseline["few"])
    assert swept.differences["samples"] == 120


def test_labels_of_the_test_split_cannot_change_the_choice(tmp_path):
    choices = []
    for flip in (False, True):
        random = np.random.default_rng(0)
        labels = {"train": np.repeat(np.arange(3), COUNTS), "val": np.arange(60) % 3, "test": np.arange(60) % 3}
        data = {k: (random.normal(size=(1, len(v), 5)).astype(np.float32), v) for k, v in labels.items()}
        if flip:
            data["test"] = (data["test"][0], (data["test"][1] + 1) % 3)
        path = write_arrays(tmp_path / f"{flip}.zarr", data, np.eye(3, 5), np.zeros(3))
        config = RebalanceConfig(lam="0:1:lin:5", seeds=(0,), **QUICK)
        choices.append(rebalance(path, config, out=tmp_path / f"out-{flip}").selected)
    assert choices[0]["lam"] == choices[1]["lam"]
    assert choices[0]["all"] != choices[1]["all"]


def test_a_single_lambda_is_not_chosen_and_needs_no_validation(tmp_path):
    store = write_store(tmp_path / "s.zarr", val=False)
    result = rebalance(store, RebalanceConfig(lam="0.2", seeds=(0,), **QUICK), out=tmp_path / "out")
    assert (result.selected["lam"], result.selected["chosen_on"], result.selected["n"]) == (0.2, None, 1)
    assert result.selected["all_std"] is None
    assert result.within_one_se == ()
    assert {r.split for r in result.results} == {"test"}


def test_results_of_other_settings_are_told_before_they_are_replaced_and_leave_no_file_behind(
    store, tmp_path, monkeypatch
):
    told: list[str] = []
    tuned = RebalanceConfig(method=("cb", "baseline"), tune=True, trials=2, seeds=(0,), **QUICK)
    first = rebalance(store, tuned, out=tmp_path, report=told.append)
    assert (tmp_path / "trials.csv").exists()
    assert not any("replaces" in line for line in told)
    fit = run.fit
    monkeypatch.setattr(run, "fit", lambda *args, **more: told.append("fits") or fit(*args, **more))
    told.clear()
    given = RebalanceConfig(lam="0.2", seeds=(0,), **QUICK)
    rebalance(store, given, out=tmp_path, report=told.append)
    heads = f"3 methods, {first.timing['heads']} heads"
    assert told == [f"replaces the results in {tmp_path} ({heads}); --out DIR keeps both", "fits"]
    assert not (tmp_path / "trials.csv").exists()
    told.clear()
    rebalance(store, given, out=tmp_path, report=told.append)
    assert told == ["fits"]  # the same settings: nothing is lost


def test_what_is_not_of_this_program_is_not_replaced(store, tmp_path):
    for content in ("z", "{}", '{"results": []}'):
        (tmp_path / "results.json").write_text(content)
        for attempt in (rebalance, prepare_rebalance):
            with pytest.raises(DataError, match=r"holds a results\.json that is not of `pipeline rebalance`"):
                attempt(store, RebalanceConfig(lam="0.2", seeds=(0,), **QUICK), out=tmp_path)
        assert (tmp_path / "results.json").read_text() == content
        assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epochs": 10}, "60 steps at a learning rate of 0.005"),
        ({"epochs": 70}, "420 steps"),
        ({"epochs": 71}, None),  # 426 × 0.005 is a quarter of 1,700 × 0.005
        ({"epochs": 8, "lr": 0.05}, None),
        ({"epochs": 1, "method": ("baseline",)}, None),
    ],
)
def test_few_steps_at_a_small_learning_rate_are_told(store, tmp_path, settings, told):
    config = RebalanceConfig(**({"lam": "0.2", "seeds": (0,), "batch_size": 32} | settings))
    notes = [note for note in rebalance(store, config, out=tmp_path).notes if "under-fitted" in note]
    assert len(notes) == (told is not None)
    assert all(told in note and "--tune" in note for note in notes)


def test_auto_goes_from_coarse_to_fine(store, tmp_path):
    result = rebalance(store, RebalanceConfig(lam="auto", seeds=(0,), **QUICK), out=tmp_path)
    lams = {r.lam for r in result.results if r.method == "iwb"}
    assert {0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0} < lams
    assert len(lams) == 9 + 7
    assert result.selected["chosen_on"] == "val"


def test_folds_choose_where_there_is_no_validation_split(tmp_path):
    store = write_store(tmp_path / "s.zarr", val=False)
    config = RebalanceConfig(lam="0.1,0.9", seeds=(0, 1), select_on="kfold", **QUICK)
    result = rebalance(store, config, out=tmp_path / "out")
    assert result.selected["chosen_on"] == "kfold"
    assert CAVEAT in result.notes
    kinds = [(r.method, r.lam, r.seed) for r in result.results if r.split == "kfold"]
    assert len(kinds) == len(set(kinds)) == 9
    lines = read_csv(tmp_path / "out/per_class.csv")
    held_out = [int(x["total"]) for x in lines if x["split"] == "kfold" and x["method"] == "cb" and x["seed"] == "1"]
    assert held_out == [120, 60, 8]
    best = max((0.1, 0.9), key=lambda v: np.mean([r.all for r in result.results if (r.lam, r.split) == (v, "kfold")]))
    assert result.selected["lam"] == best


def test_folds_of_a_probe_are_scored_by_heads_that_have_not_seen_them(tmp_path):
    """Features without a signal: a probe of 120 samples in 200 dimensions is right on all of them, and knows nothing."""
    random, labels = np.random.default_rng(0), np.repeat(np.arange(4), 30)
    arrays = {"train_features": random.normal(size=(120, 200)), "train_labels": labels}
    arrays |= {"test_features": random.normal(size=(120, 200)), "test_labels": labels}
    store_from_arrays(tmp_path / "s.zarr", **arrays)
    config = RebalanceConfig(method=("recommended",), select_on="kfold", seeds=(0,), trials=3, epochs=5, batch_size=16)
    result = rebalance(tmp_path / "s.zarr", config, out=tmp_path / "out")
    scores = {row.method: row.all for row in result.results if row.split == "kfold"}
    assert set(scores) >= {"baseline", "cb", "iwb", "logistic", "ensemble"}
    assert all(5 < score < 45 for score in scores.values()), scores
    assert REFITTED in result.notes
    head = open_cache(tmp_path / "s.zarr").classifier
    seen = (arrays["train_features"] @ head[0].T + head[1]).argmax(1) == labels
    assert seen.mean() > 0.95


def test_classes_without_a_validation_image_are_scored_by_heads_that_have_not_seen_their_training_images(tmp_path):
    """Features without a signal: heads are right on all that they were fitted on, and at chance on anything else."""
    random, labels = np.random.default_rng(0), np.repeat(np.arange(4), 30)
    arrays = {f"{split}_features": random.normal(size=(120, 200)) for split in ("train", "test")}
    arrays |= {"train_labels": labels, "test_labels": labels}
    arrays |= {"val_features": random.normal(size=(60, 200)), "val_labels": labels[:60]}
    store_from_arrays(tmp_path / "s.zarr", **arrays)
    settings = {"seeds": (0,), "trials": 3, "epochs": 5, "batch_size": 16}
    result = rebalance(tmp_path / "s.zarr", RebalanceConfig(method=("recommended",), **settings), out=tmp_path / "out")
    assert result.selection["classes_on_folds"] == ["2", "3"]
    assert not result.selection["encoder_saw_folds"]
    assert result.selection["samples"] == 120
    assert {row.split for row in result.results} == {"val", "test"}
    lines = [line for line in read_csv(tmp_path / "out/per_class.csv") if line["split"] == "val"]
    assert {line["method"] for line in lines} >= {"baseline", "cb", "ensemble"}
    assert {line["total"] for line in lines} == {"30"}
    correct = [int(line["correct"]) for line in lines if line["class"] in "23" and line["method"] != "baseline"]
    assert max(correct) < 25
    assert any(
        "2 class(es) have no validation image (2, 3)" in sentence for sentence in recommendation(result.to_dict())
    )

    one = rebalance(tmp_path / "s.zarr", RebalanceConfig(lam="0.1", **settings), out=tmp_path / "one")
    assert one.selection == {}
    totals = {line["total"] for line in read_csv(tmp_path / "one/per_class.csv") if line["split"] == "val"}
    assert totals == {"0", "30"}


@pytest.mark.parametrize(
    ("without", "on_folds"), [([], False), ([0], False), ([0, 12], False), ([0, 1], True), ([23], True)]
)
def test_the_choice_may_be_blind_to_a_tenth_of_a_group(without, on_folds):
    labels = np.repeat(np.arange(24), [150] * 11 + [30] * 11 + [5] * 2)
    x = np.zeros((len(labels), 2), np.float32)
    known = Features((x,), labels, np.bincount(labels), np.zeros((24, 2), np.float32), np.zeros(24, np.float32))
    rest = np.setdiff1d(np.arange(24), without)
    val, one = FeatureSplit(np.zeros((len(rest), 2), np.float32), rest), Ranks(0, 1, choose_device("cpu"))
    swept = sweep.Sweep(known, val, RebalanceConfig(), one, chosen_on="val")
    assert set(labels[swept.held_out_rows]) == (set(without) if on_folds else set())


def test_no_fold_is_fitted_on_what_it_is_scored_on(store, tmp_path, monkeypatch):
    fit, given = sweep.fit_heads, []

    def spy(*args, rows, **more):
        given.append(rows)
        return fit(*args, rows=rows, **more)

    monkeypatch.setattr(sweep, "fit_heads", spy)
    config = RebalanceConfig(lam="0.1,0.9", seeds=(0,), select_on="kfold", **QUICK)
    result = rebalance(store, config, out=tmp_path)
    everything, *folds = given
    assert everything is None
    held_out = [np.setdiff1d(np.arange(188), rows) for rows in folds]
    assert len(folds) == 5
    assert sorted(np.concatenate(held_out)) == list(range(188))
    assert {r.split for r in result.results} == {"val", "kfold", "test"}


@pytest.mark.parametrize(("formulation", "form"), [("paper", "cb-softmax"), ("code", "cb-bce")])
def test_reference_rows_are_the_loss_alone_and_the_formulation_decides_its_form(store, tmp_path, formulation, form):
    config = RebalanceConfig(lam="0.4", loss="ce", formulation=formulation, seeds=(3,), beta=0.99, **QUICK)
    rebalance(store, config, out=tmp_path)
    described, weight, _ = read_heads(tmp_path / "heads.safetensors")
    loaded, rule = load(store, augmented=True), penalty(formulation)
    alone = [Head("ce"), Head(form, beta=0.99), Head("ce", 0.0, rule), Head("ce", 0.4, rule)]
    kept = [("ce", None), ("cb", None), ("iwb", 0.0), ("iwb", 0.4)]
    schedule = Schedule(epochs=2, batch_size=32, lr=0.05)
    expected, _ = fit_heads(loaded.features, alone, seeds=(3,), schedule=schedule)
    for k, kind in enumerate(kept):
        at = next(i for i, h in enumerate(described) if (h["method"], h["lam"]) == kind)
        np.testing.assert_allclose(weight[at], expected[0, k], rtol=1e-5, atol=1e-6)


def test_without_validation_split_the_error_says_kfold(tmp_path):
    store = write_store(tmp_path / "s.zarr", val=False)
    with pytest.raises(ConfigError, match="--select-on kfold"):
        rebalance(store, RebalanceConfig(lam="0.1,0.2"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_methods_compete_and_unknown_ones_are_named(store, tmp_path):
    config = RebalanceConfig(method=("baseline", "cb", "ce", "iwb"), lam="0.2", loss="ce", seeds=(0,), **QUICK)
    result = rebalance(store, config, out=tmp_path)
    assert result.selected["chosen_on"] == "val"
    assert {(r.method, r.loss) for r in result.results} == {
        ("baseline", None),
        ("cb", "cb"),
        ("ce", "ce"),
        ("iwb", "ce"),
    }
    assert rebalance(store, RebalanceConfig(method=("baseline",)), out=tmp_path).selected["n"] == 1
    with pytest.raises(ConfigError, match="did you mean iwb"):
        rebalance(store, RebalanceConfig(method=("iwbb",)), out=tmp_path)


def test_one_clean_view_is_taken_unless_augmented_ones_were_asked_for(tmp_path):
    store = write_store(tmp_path / "s.zarr", views=1)
    result = rebalance(store, RebalanceConfig(lam="0.2", seeds=(0,), **QUICK), out=tmp_path / "out")
    assert result.settings["views"] == "clean"
    assert any("no augmentation" in note for note in result.notes)
    with pytest.raises(ConfigError, match="--views clean"):
        rebalance(store, RebalanceConfig(lam="0.2", views="augmented"), out=tmp_path / "out")


def test_nan_features_are_refused_when_read(store, tmp_path, monkeypatch):
    read = cache.Cache.read

    def poisoned(self, split, view=0, out=None):
        features = read(self, split, view, out)
        if (split, view) == ("train", 2):
            features[17, 3] = np.nan
        return features

    monkeypatch.setattr(cache.Cache, "read", poisoned)
    with pytest.raises(DataError, match=r"train features, view 2: 1 of 188 rows .* first row 17"):
        rebalance(store, RebalanceConfig(lam="0.2", **QUICK), out=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": np.array([3, 2, 0])}, "no training image in class 2"),
        ({"counts": np.array([2, 2, 1])}, "class 0 has 3 training labels but a count of 2"),
        ({"labels": np.array([0, 0, 0, 1, 1, 3])}, "labels reach from 0 to 3"),
        ({"views": [np.zeros((6, 3))]}, r"training features are \(6, 3\), expected \(6, 2\)"),
        ({"weight": np.full((3, 2), np.nan)}, "stage-1 class vectors: 3 of 3 rows"),
        ({"bias": np.zeros(2)}, "3 class vectors but 3 counts and 2 biases"),
    ],
)
def test_arrays_that_do_not_belong_together_are_named(change, said):
    good = {
        "views": [np.zeros((6, 2))],
        "labels": np.array([0, 0, 0, 1, 1, 2]),
        "counts": np.array([3, 2, 1]),
        "weight": np.eye(3, 2),
        "bias": np.zeros(3),
    }
    Features(**good)
    with pytest.raises(DataError, match=said):
        Features(**good | change)


def test_a_fit_that_diverges_says_so(store, tmp_path):
    with pytest.raises(PipelineError, match="--lr"):
        rebalance(store, RebalanceConfig(lam="0.2", seeds=(0,), lr=1e30, epochs=3), out=tmp_path)


def test_nothing_is_read_for_a_typing_error(tmp_path):
    with pytest.raises(ConfigError, match="--lam"):
        rebalance(tmp_path / "absent.zarr", RebalanceConfig(lam="2"), out=tmp_path)
    with pytest.raises(DataError, match=r"absent\.zarr"):
        rebalance(tmp_path / "absent.zarr", RebalanceConfig(lam="0.2"), out=tmp_path)


def test_the_table_says_what_it_is(swept):
    text = str(swept)
    for part in (
        "stage 1",
        "CB loss only",
        "equal norms (λ = 0)",
        "◀ selected",
        "tiny, 7 parameters, 5-d features",
        "2 augmented views",
        "n = 2 batch orders of one backbone",
        "selected on validation; no row was selected on the test split",
        "less other rows, in points, with 95 % intervals",
        "(runner-up)",
        "Paired bootstrap of 120 test samples within their classes, 2,000 resamples",
    ):
        assert part in " ".join(text.split()), part
    assert f"{swept.selected['all']:.1f} ± {swept.selected['all_std']:.1f}" in text
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(results_table(swept.to_dict()))
    assert "◀ selected" in narrow.file.getvalue()
    names = list(results_table(swept.to_dict()).__rich__().columns[0].cells)
    assert names[:4] == [
        "stage 1",
        "CB loss only",
        "equal norms (λ = 0)",
        f"iwb, λ = {swept.selected['lam']:g}",
    ]


@pytest.mark.skipif(not REAL.is_file(), reason=f"real features are not at {REAL}")
def test_real_features_give_the_known_table(tmp_path):
    """True ResNet-32 on CIFAR100-LT IF100: stage 1 at 65.6/34.8/3.9/36.3, class-balanced loss at 58.5/40.9/20.4/40.9
    in its softmax form, 58.6/40.5/21.7/41.2 in its bce form."""
    real = np.load(REAL)
    data = {
        "train": (real["train_views"], real["train_labels"]),
        "val": (real["val"][None], real["val_labels"]),
        "test": (real["test"][None], real["test_labels"]),
    }
    store = write_arrays(tmp_path / "s.zarr", data, real["weight"], real["bias"], counts=real["counts"])
    config = RebalanceConfig(lam="0.3", seeds=(0,), formulation="paper", detach_target=False)
    result = rebalance(store, config, out=tmp_path / "out")
    default = rebalance(store, RebalanceConfig(lam="0.3", seeds=(0,)), out=tmp_path / "default")

    def table(method, lam, result=result):
        row = next(r for r in result.results if (r.method, r.lam, r.split) == (method, lam, "test"))
        return [row.many, row.medium, row.few, row.all]

    assert [round(v, 1) for v in table("baseline", None)] == [65.6, 34.8, 3.9, 36.3]
    np.testing.assert_allclose(table("cb", None), [58.5, 40.9, 20.4, 40.9], atol=0.6)
    np.testing.assert_allclose(table("iwb", 0.3), [57.5, 41.4, 22.0, 41.2], atol=0.6)
    np.testing.assert_allclose(table("cb", None, default), [58.6, 40.5, 21.7, 41.2], atol=0.6)


def test_what_is_public():
    assert run.rebalance is rebalance


def test_a_dry_run_reads_no_features_and_loads_neither_timm_nor_torchvision(tmp_path):
    store = made_store(tmp_path / "features.zarr")
    for split in ("train", "val", "test"):
        shutil.rmtree(store / split / "features" / "c")
    code = f"""import sys
import pipeline.rebalance.selection
assert "torch" not in sys.modules
from pipeline.config import RebalanceConfig
from pipeline.rebalance.prepare import prepare_rebalance
print(prepare_rebalance({str(store)!r}, RebalanceConfig(lam="0.1,0.2")).description.numbers["heads"])
print([m for m in ("timm", "torchvision", "matplotlib", "triton") if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
