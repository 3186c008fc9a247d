"""Heads of other programs: matched by class names, a row of the table, a member of the ensemble."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cache import open_cache
from pipeline.cli import invoke
from pipeline.errors import DataError
from pipeline.import_features import store_from_arrays
from pipeline.rebalance.methods.external import read_external_head

NAMES = ("ant", "bee", "cat")
FAST = [word for s in ("epochs=1", "trials=2", "seeds=0") for word in ("--set", f"rebalance.{s}")]


def made_store(path: Path, names=NAMES) -> Path:
    """Return a store whose features of a class depend on its name alone, not on its number."""
    arrays = {}
    for seed, (split, counts) in enumerate({"train": (40, 20, 6), "val": (8, 8, 8), "test": (30, 30, 30)}.items()):
        random = np.random.default_rng(seed)
        kinds = np.repeat([0, 1, 2], counts)
        arrays[f"{split}_features"] = (np.eye(3, 5)[kinds] * 2 + random.normal(size=(len(kinds), 5))).astype(np.float32)
        arrays[f"{split}_labels"] = np.array([names.index(NAMES[k]) for k in kinds])
    store_from_arrays(path, class_names=list(names), **arrays)
    return path


def rebalanced(words, capsys):
    assert invoke(["rebalance", *map(str, words), *FAST, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_head_of_another_run_is_a_row_whose_accuracy_does_not_depend_on_the_order_of_classes(tmp_path, capsys):
    rebalanced([made_store(tmp_path / "a" / "features.zarr"), "--lam", "0.1"], capsys)
    heads = (tmp_path / "a" / "rebalance" / "heads.safetensors").rename(tmp_path / "other.safetensors")
    turned = made_store(tmp_path / "b" / "features.zarr", names=("cat", "ant", "bee"))
    selected = json.loads((tmp_path / "a" / "rebalance" / "results.json").read_text())["selected"]
    document = rebalanced([turned, "--head", heads, "--lam", "0.1"], capsys)
    row = next(r for r in document["results"] if r["method"] == "other" and r["split"] == "test")
    assert row["all"] == pytest.approx(selected["all"])
    assert row["all"] > 60


def test_a_good_head_counts_in_the_ensemble(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr")
    np.savez(tmp_path / "zeroshot.npz", weight=2 * np.eye(3, 5, dtype=np.float32)[::-1], class_names=NAMES[::-1])
    document = rebalanced([store, "--head", tmp_path / "zeroshot.npz"], capsys)
    ensemble = next(row for row in document["chosen"] if row["method"] == "ensemble")
    assert ensemble["parameters"]["zeroshot"] > 0.1
    assert {row["method"] for row in document["results"]} >= {"zeroshot", "ensemble", "iwb", "logistic-balanced"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, "weight is missing"),
        ({"class_names": None}, "class_names is missing"),
        (
            {"class_names": np.array(["ant", "bee", "dog"])},
            "class_names lacks 1 of the store's 3 classes, such as 'cat'",
        ),
        ({"weight": np.zeros((3, 4), np.float32)}, "weight and bias: arrays of shapes"),
        ({"weight": np.full((3, 5), np.nan, np.float32)}, "holds numbers that are none"),
        ({"bias": np.zeros(2, np.float32)}, "weight and bias: arrays of shapes"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_does_not_fit_is_named_with_its_field(tmp_path, changes, message, suffix):
    arrays = {"weight": np.eye(3, 5, dtype=np.float32), "bias": np.zeros(3, np.float32), "class_names": np.array(NAMES)}
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    file = tmp_path / f"head{suffix}"
    if suffix == ".npz":
        np.savez(file, **arrays)
    else:
        names = arrays.pop("class_names", None)
        save_file(arrays, file, {} if names is None else {"class_names": json.dumps(names.tolist())})
    with pytest.raises(DataError, match="head") as error:
        read_external_head(file, class_names=NAMES, width=5)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_a_damaged_file_and_the_name_of_a_shipped_method_are_refused(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr")
    (tmp_path / "bad.safetensors").write_bytes(b"no head")
    (tmp_path / "bad.npz").write_bytes(b"no head")
    for name in ("bad.safetensors", "bad.npz", "absent.npz"):
        assert invoke(["rebalance", str(store), "--head", str(tmp_path / name)]) == 3
        assert name in capsys.readouterr().err
    np.savez(tmp_path / "iwb.npz", weight=np.eye(3, 5, dtype=np.float32), class_names=NAMES)
    assert invoke(["rebalance", str(store), "--head", str(tmp_path / "iwb.npz")]) == 2
    assert "rename the file" in capsys.readouterr().err
    assert open_cache(store).class_names == NAMES


def test_a_file_of_another_kind_is_refused_with_the_endings_of_heads(tmp_path, capsys):
    store = made_store(tmp_path / "s.zarr")
    assert invoke(["rebalance", str(store), "--head", "README.md"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "--head README.md: expected a file that ends in .npz or .safetensors" in message
