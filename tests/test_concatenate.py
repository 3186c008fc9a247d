"""Features of the same images by several encoders, side by side."""

import json

import numpy as np
import pytest

from cache import open_cache
from pipeline.cli import invoke
from pipeline.concatenate import concatenate_stores
from pipeline.errors import DataError
from pipeline.import_features import store_from_arrays

COUNTS = {"train": (30, 12), "val": (6, 6), "test": (8, 8)}


def made_store(path, width, *, scale=1.0, labels=None, seed=0, **changes):
    random = np.random.default_rng(seed)
    arrays = {}
    for split, counts in COUNTS.items():
        y = np.repeat([0, 1], counts) if labels is None else np.repeat([0, 1], counts)[::labels]
        arrays |= {
            f"{split}_labels": y,
            f"{split}_features": (scale * (y[:, None] + random.normal(size=(len(y), width)))).astype(np.float32),
        }
    store_from_arrays(path, **arrays | changes)
    return path


def test_every_feature_is_standardised_and_stands_in_the_row_of_its_image(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.layout.CHUNK_ROWS", 7)
    first = made_store(tmp_path / "a.zarr", 5, scale=100.0)
    monkeypatch.setattr("cache.layout.CHUNK_ROWS", 11)
    second = made_store(tmp_path / "b.zarr", 3, scale=0.01, seed=1)
    digest = concatenate_stores([first, second], tmp_path / "ab.zarr")
    stores = [open_cache(path) for path in (first, second)]
    joined = open_cache(tmp_path / "ab.zarr")
    assert (joined.width, joined.digest) == (8, digest)
    for split in COUNTS:
        parts = []
        for store in stores:
            train = store.read("train").astype(np.float64)
            parts.append((store.read(split) - train.mean(0)) / train.std(0))
        np.testing.assert_allclose(joined.read(split), np.concatenate(parts, 1), atol=0.01)
        np.testing.assert_array_equal(joined.labels(split), stores[0].labels(split))
        np.testing.assert_array_equal(joined.ids(split), stores[0].ids(split))
    weight, bias = joined.classifier
    assert ((joined.read("train") @ weight.T + bias).argmax(1) == joined.labels("train")).mean() > 0.9
    assert joined.provenance["probe"]["chosen_on"] == "validation"
    assert concatenate_stores([first, second], tmp_path / "ab.zarr") == digest
    with pytest.raises(DataError, match="holds features made otherwise"):
        concatenate_stores([second, first], tmp_path / "ab.zarr")


def test_stores_of_other_images_are_refused(tmp_path):
    first = made_store(tmp_path / "a.zarr", 5)
    other_labels = made_store(tmp_path / "b.zarr", 3, labels=-1)
    with pytest.raises(DataError, match=r"b\.zarr: cannot stand beside .*a\.zarr: they differ in the labels of"):
        concatenate_stores([first, other_labels], tmp_path / "x.zarr")
    other_ids = made_store(tmp_path / "c.zarr", 3, test_index=np.arange(16) + 1)
    with pytest.raises(DataError, match="they differ in the ids of test"):
        concatenate_stores([first, other_ids], tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()


def test_two_encoders_make_a_store_each_and_rebalance_puts_them_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sets = [word for s in ("data.image_size=32", "rebalance.seeds=0", "rebalance.epochs=1") for word in ("--set", s)]
    assert invoke(["dump-features", "digits-lt", "--encoder", "lite0,lite1", "--json", *sets]) == 0
    document = json.loads(capsys.readouterr().out)
    stores = [result["store"] for result in document["encoders"]]
    assert stores == ["runs/digits-lt/lite0/features.zarr", "runs/digits-lt/lite1/features.zarr"]
    accuracies = []
    for words in ([stores[0]], [stores[0], "--also", "runs/digits-lt/lite1"]):
        assert invoke(["rebalance", *words, "--lam", "0.1", "--json"]) == 0
        accuracies.append(json.loads(capsys.readouterr().out))
    assert accuracies[1]["store"] == "runs/digits-lt/lite0+lite1/features.zarr"
    assert open_cache(accuracies[1]["store"]).width == 2560
    assert accuracies[1]["baseline"]["all"] > accuracies[0]["baseline"]["all"] - 3
    assert invoke(["report", "runs/digits-lt/lite0+lite1"]) == 0
    network = open_cache(accuracies[1]["store"]).provenance["network"]["network"]
    assert network == "tf_efficientnet_lite0 + tf_efficientnet_lite1"
    assert invoke(["export", "runs/digits-lt/lite0+lite1", "--out", "model"]) in (2, 3)
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_of_two_encoders_fits_on_both_and_is_up_to_date_the_second_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["run", "digits-lt", "--encoder", "lite0,lite1", "--out", "two", "--set", "data.image_size=32"]
    words += ["--set", "rebalance.lam=0.1", "--set", "rebalance.method=[iwb]", "--set", "rebalance.epochs=1"]
    words += ["--set", "rebalance.seeds=[0]"]
    assert invoke([*words, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "lite0: dump-features" in plan
    assert "lite1: dump-features" in plan
    assert not (tmp_path / "two").exists()
    assert invoke([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["redone"] == ["lite0/dump-features", "lite1/dump-features", "rebalance", "report"]
    store = open_cache("two/features.zarr")
    assert store.width == sum(open_cache(f"two/{name}/features.zarr").width for name in ("lite0", "lite1")) == 2560
    assert first["digest"] == store.digest
    assert invoke([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["redone"] == []
    assert invoke(["info", "two"]) == 0
