"""Features from elsewhere become a store that stage 2 takes, or a refusal that names the array."""

import json

import numpy as np
import pytest

import pipeline
from cache import open_cache
from pipeline.cli import invoke
from pipeline.errors import DataError
from pipeline.import_features import prepare_import, read_arrays, store_from_arrays

COUNTS = (40, 20, 8)
ONE_CLASS = {"train_labels": np.zeros(68, int)}


def made_arrays(seed=0, **changes):
    """Features (N, 6) around one centre a class in float32, ten validation and test rows a class."""
    random = np.random.default_rng(seed)
    centres, arrays = random.normal(size=(3, 6)), {}
    for split, counts in (("train", COUNTS), ("val", (10,) * 3), ("test", (10,) * 3)):
        labels = np.repeat(np.arange(3), counts)
        noise = random.normal(size=(len(labels), 6)) / 2
        arrays |= {f"{split}_features": (centres[labels] + noise).astype(np.float32), f"{split}_labels": labels}
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def test_the_store_holds_the_arrays_and_a_probe_and_stage_2_takes_it(tmp_path):
    arrays = made_arrays(train_index=np.arange(68) + 100)
    result = store_from_arrays(tmp_path / "features.zarr", class_names=["ant", "bee", "cat"], **arrays)
    store = open_cache(tmp_path / "features.zarr")
    assert (result.samples, result.width, result.classes) == ({"train": 68, "val": 30, "test": 30}, 6, 3)
    assert (store.class_names, store.counts.tolist()) == (("ant", "bee", "cat"), list(COUNTS))
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(store.read(split), arrays[f"{split}_features"].astype(np.float16))
        np.testing.assert_array_equal(store.labels(split), arrays[f"{split}_labels"])
    assert store.ids("train")[0] == 100
    weight, bias = store.classifier
    assert ((store.read("test").astype(np.float32) @ weight.T + bias).argmax(1) == store.labels("test")).mean() > 0.8
    fitted = pipeline.rebalance(tmp_path / "features.zarr", out=tmp_path / "rebalance")
    assert fitted.to_dict()["baseline"]["all"] > 80


def test_a_head_and_views_are_taken_as_they_are_and_the_same_call_finds_the_store_complete(tmp_path):
    arrays = made_arrays(weight=np.eye(3, 6), bias=np.arange(3.0))
    arrays["train_features"] = np.stack([arrays["train_features"], arrays["train_features"] + 1])
    first = store_from_arrays(tmp_path / "s.zarr", dtype="float32", **arrays)
    assert (first.views, first.head) == (2, "weight and bias of the arrays")
    store = open_cache(tmp_path / "s.zarr")
    np.testing.assert_array_equal(store.classifier[0], np.eye(3, 6, dtype=np.float32))
    np.testing.assert_array_equal(store.read("train", 1), arrays["train_features"][1])
    assert store_from_arrays(tmp_path / "s.zarr", dtype="float32", **arrays).digest == first.digest
    with pytest.raises(DataError, match="holds features made otherwise"):
        store_from_arrays(tmp_path / "s.zarr", dtype="float32", **made_arrays(1))
    assert store_from_arrays(tmp_path / "s.zarr", overwrite=True, **made_arrays(1)).digest != first.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None}, "train_labels is missing"),
        ({"val_labels": None}, "val_labels is missing beside"),
        (dict.fromkeys(("val_features", "val_labels", "test_features", "test_labels")) | ONE_CLASS, "only one class"),
        ({"train_labels": np.repeat([0, 2], 34)}, "class 1 has no training row"),
        ({"train_labels": np.zeros(68)}, "labels must be whole numbers"),
        ({"test_labels": np.full(30, 7)}, "label 7 of sample 0 is outside 0…2"),
        ({"val_features": np.zeros((30, 5), np.float32)}, r"val_features is float32 of shape \(30, 5\)"),
        ({"val_features": np.zeros((2, 30, 6), np.float32)}, "only training features may have several"),
        ({"test_features": np.full((30, 6), np.nan, np.float32)}, "test_features, row 0: a number that is not finite"),
        ({"test_features": np.full((30, 6), 1e6, np.float32)}, "65504|float16"),
        ({"train_index": np.arange(3)}, "68 features, 68 labels and 3 ids"),
        ({"weight": np.zeros((3, 5))}, r"weight \(3, 5\)"),
        ({"bias": np.zeros(3)}, "bias without weight"),
        ({"train_feature": np.zeros(3)}, "unknown array train_feature"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        store_from_arrays(tmp_path / "s.zarr", **made_arrays(**changes))


def test_the_command_takes_an_archive_or_single_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = made_arrays()
    np.savez("mine.npz", **arrays, class_names=np.array(["ant", "bee", "cat"]), other=np.zeros(3))
    assert invoke(["import-features", "mine.npz", "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    capsys.readouterr()
    assert invoke(["import-features", "mine.npz", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["store"], document["samples"]["test"]) == ("runs/mine/features.zarr", 30)
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    pairs = [word for s in ("train", "val", "test") for word in (f"--{s}", f"{s}_features.npy", f"{s}_labels.npy")]
    assert invoke(["import-features", *pairs, "--class-names", "names.txt", "--out", "two.zarr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == document["digest"]
    assert invoke(["info", "two.zarr"]) == 0


def test_wrong_calls_and_files_say_what_to_type(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "empty.npz", a=np.zeros(2))
    assert invoke(["import-features"]) == 2
    assert invoke(["import-features", str(tmp_path / "text.npz"), "--out", str(tmp_path / "s.zarr")]) == 3
    with pytest.raises(DataError, match="needs train_features and train_labels; it holds a"):
        read_arrays(tmp_path / "empty.npz")
    with pytest.raises(DataError, match=r"[Nn]o such file"):
        read_arrays(tmp_path / "none.npz")
    assert "Traceback" not in capsys.readouterr().err


def test_prepared_says_what_would_be_written(tmp_path):
    prepared = prepare_import(tmp_path / "s.zarr", **made_arrays())
    assert prepared.writes[0].bytes > 0
    assert not (tmp_path / "s.zarr").exists()
