"""What cannot be rebalanced, through the command: exit code, cause, and what to type next, and nothing written."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import cache
from cache.store import write_chunk
from pipeline import store_from_arrays
from pipeline.cli import invoke
from pipeline.config import RebalanceConfig
from pipeline.rebalance import rebalance
from tests.conftest import digits_tree
from tests.small_run import COUNTS, made_store


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("good") / "features.zarr")


def refused(capsys, words):
    """(exit code, message) of a rebalance that must fail, having told one document on stdout and no traceback."""
    code = invoke(["rebalance", *map(str, words), "--json"])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    document = json.loads(told.out)
    assert document["exit_code"] == code
    return code, document["error"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lam", "1.5"], ["1.5", "[0, 1]"]),
        (["--lam", "-0.1"], ["-0.1", "[0, 1]"]),
        (["--lam", "0.1,nan"], ["nan", "[0, 1]"]),
        (["--lam", ""], ["nothing", "[0, 1]"]),
        (["--lam", "0:2:lin:5"], ["2", "[0, 1]"]),
        (["--set", "rebalance.lam=[]"], ["nothing", "[0, 1]"]),
        (["--set", "rebalance.lam=2"], ["2", "[0, 1]"]),
        (["--seeds", ""], ["--seeds", "0,1,2"]),
        (["--seeds", "a"], ["--seeds a", "0,1,2"]),
        (["--seeds", "-1"], ["--seeds -1", "0,1,2"]),
        (["--seeds", "0.5"], ["--seeds 0.5", "0,1,2"]),
        (["--seeds", "2,2"], ["--seeds 2,2", "different"]),
        (["--set", "rebalance.seeds=[]"], ["rebalance.seeds", "one or more"]),
        (["--set", "rebalance.seeds=[0, -3]"], ["rebalance.seeds", "0 or more"]),
        (["--method", ""], ["--method", "known: baseline"]),
        (["--set", "rebalance.method=[]"], ["no method", "known: baseline"]),
        (["--beta", "1"], ["--beta"]),
        (["--log-base", "10"], ["--log-base", "'2', 'e'"]),
        (["--direction", "up"], ["--direction", "norms-to-target"]),
        (["--kl-weight", "heavy"], ["kl_weight", "batch"]),
        (["--kl-weight", "nan"], ["kl_weight"]),
        (["--lr", "0"], ["--lr"]),
        (["--lr", "nan"], ["lr"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--set", "rebalance.hardnes=none"], ["hardnes", "did you mean hardness"]),
        (["--config", "ablations/table5"], ["ablations/table5", "did you mean ablations/table"]),
    ],
)
def test_wrong_settings(good, words, says, tmp_path, capsys):
    code, message = refused(capsys, [good, "--out", tmp_path / "out", *words])
    assert code == 2
    assert all(part in message for part in says), message
    assert not (tmp_path / "out").exists()


def test_more_lambdas_than_memory_holds_are_refused_before_any_is_made(good, tmp_path, capsys):
    started = time.perf_counter()
    code, message = refused(capsys, [good, "--lam", "0:1:lin:100000000", "--out", tmp_path / "out"])
    assert code == 2
    assert time.perf_counter() - started < 3
    assert "100,000,000 λ in 3 batch orders would take" in message
    assert "GiB" in message
    assert "λ fit, such as --lam 0.01:1:log:32" in message
    assert not (tmp_path / "out").exists()


def test_augmented_views_that_are_not_there(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr", views=1)
    code, message = refused(capsys, [store, "--views", "augmented", "--lam", "0.1"])
    assert code == 2
    assert "--views clean" in message
    assert "pipeline dump-features" in message
    assert invoke(["rebalance", str(store), "--lam", "0.1", "--epochs", "1", "--json"]) == 0
    assert "no augmentation" in json.loads(capsys.readouterr().out)["notes"][0]


def test_a_stores_own_wish_for_augmented_views_does_not_stop_it(tmp_path, capsys):
    config = {"name": "a", "data": {"source": "digits"}, "rebalance": {"views": "augmented"}}
    store = made_store(tmp_path / "features.zarr", views=1, config=config)
    assert invoke(["rebalance", str(store), "--lam", "0.1", "--epochs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["views"] == "clean"


def test_what_settings_were_taken_is_said_and_a_default_view_is_not_insisted_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text(yaml.safe_dump(digits_tree() | {"name": "mine"}))
    made_store(Path("runs/mine/features.zarr"), views=1)
    given = ["runs/mine", "--config", "pipeline.yaml"]
    for words, taken in (([], "pipeline.yaml"), (["runs/mine"], "the store's"), (given, "pipeline.yaml")):
        assert invoke(["rebalance", *words, "--lam", "0.1", "--epochs", "1"]) == 0
        told = capsys.readouterr()
        assert f"settings: {taken}; results: runs/mine/rebalance" in told.err
        assert "the store has the clean view alone" in " ".join(told.out.split()).lower()
    assert invoke(["rebalance", "--views", "augmented", "--lam", "0.1"]) == 2
    assert "take --views clean" in capsys.readouterr().err


def test_no_validation_split(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr", splits=("test",))
    for words in (["--lam", "auto"], ["--config", "ablations/table3"]):
        code, message = refused(capsys, [store, *words])
        assert code == 2
        assert "--select-on kfold" in message
    words = ["--select-on", "kfold", "--lam", "0.1,1", "--epochs", "1", "--seeds", "0"]
    assert invoke(["rebalance", str(store), *words]) == 0
    assert "stage-1 head have seen these images" in " ".join(capsys.readouterr().out.split()).lower()
    stored = json.loads((tmp_path / "rebalance/results.json").read_text())
    assert any("stage-1 head have seen these images" in note for note in stored["notes"])


def test_no_test_split(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr", splits=("val",))
    code, message = refused(capsys, [store, "--lam", "0.1"])
    assert (code, "no test split" in message) == (3, True)


def test_an_unsealed_store(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr", seal=False)
    code, message = refused(capsys, [store, "--lam", "0.1"])
    assert code == 3
    assert "pipeline dump-features" in message


@pytest.mark.parametrize("damage", ["torn metadata", "lost chunk", "flipped bit", "torn chunk"])
def test_a_damaged_store(good, damage, tmp_path, capsys):
    store = shutil.copytree(good, tmp_path / "features.zarr")
    chunk, root = store / "train/features/c/1/0/0", store / "zarr.json"
    if damage == "torn metadata":
        root.write_bytes(root.read_bytes()[:-100])
    elif damage == "lost chunk":
        chunk.unlink()
    else:
        raw = bytearray(chunk.read_bytes())
        raw[40] ^= 1
        chunk.write_bytes(raw if damage == "flipped bit" else raw[:50])
    code, message = refused(capsys, [store, "--lam", "0.1", "--epochs", "1"])
    assert code == 3
    assert "features.zarr" in message
    assert "pipeline dump-features" in message


@pytest.mark.parametrize("kind", ["file", "folder", "zarr array", "other group", "results"])
def test_a_path_that_is_something_else(kind, good, tmp_path, capsys):
    import zarr

    path = tmp_path / "thing"
    if kind == "file":
        path.write_bytes(b"PK")
    elif kind == "folder":
        path.mkdir()
    elif kind == "zarr array":
        zarr.create_array(path, shape=(3,), dtype="f4")
    elif kind == "other group":
        zarr.create_group(path)
    else:
        path = tmp_path / "results.json"
        path.write_text("{}")
    code, message = refused(capsys, [path, "--lam", "0.1"])
    assert code == 3
    assert str(path) in message
    assert "not a feature store" in message


def test_features_that_are_not_numbers(tmp_path, capsys):
    """The writer refuses them, naming the sample; put behind its back and sealed, the reader does, naming the row."""
    with store_with(tmp_path / "features.zarr", labels=np.repeat(np.arange(5), COUNTS), counts=COUNTS) as writer:
        for chunk in writer.chunks:
            rows = np.random.default_rng(0).normal(size=(chunk.rows, 8)).astype(np.float32)
            writer.write(chunk, rows)
            if (chunk.split, chunk.view) == ("train", 1):
                bad = rows.copy()
                bad[17, 3] = np.nan
                with pytest.raises(cache.CacheError, match="feature 3 of sample 17"):
                    writer.write(chunk, bad)
                array = writer.layout.features("train")
                where = slice(1, 2), slice(chunk.start, chunk.stop)
                write_chunk(writer.place, array, chunk.key, bad.astype(array.stored)[None], where)
        writer.seal()
    code, message = refused(capsys, [tmp_path / "features.zarr", "--lam", "0.1"])
    assert code == 3
    assert "train features, view 1: 1 of 257 rows hold NaN or infinity, first row 17" in message


def test_a_class_without_training_images(tmp_path, capsys):
    labels = np.repeat([0, 1, 2, 4], 6)
    with store_with(tmp_path / "features.zarr", labels=labels, counts=(6, 6, 6, 0, 6)) as writer:
        for chunk in writer.chunks:
            writer.write(chunk, np.random.default_rng(0).normal(size=(chunk.rows, 8)).astype(np.float32))
        writer.seal()
    code, message = refused(capsys, [tmp_path / "features.zarr", "--lam", "0.1"])
    assert code == 3
    assert "no training image in class 3: leave such classes out or add images" in message


def store_with(path, *, labels, counts):
    """The writer of a store with these training labels, two views of them."""
    of = {"train": (2, labels), "val": (1, np.arange(5)), "test": (1, np.arange(5))}
    return cache.create_store(
        path,
        splits={name: cache.StoreSplit(views, y, np.arange(len(y))) for name, (views, y) in of.items()},
        width=8,
        dtype="float16",
        weight=np.eye(5, 8),
        bias=np.zeros(5),
        class_names=list("abcde"),
        counts=counts,
        fingerprint={"dataset": "d"},
        provenance={},
    )


def constant_store(path, constant):
    """A store of eight features, of which so many are 1 for every sample."""
    random, arrays = np.random.default_rng(0), {}
    for split, numbers in {"train": (60, 20, 8, 4), "val": (9,) * 4, "test": (9,) * 4}.items():
        labels = np.repeat(np.arange(4), numbers)
        features = random.normal(size=(len(labels), 8)) + labels[:, None]
        features[:, :constant] = 1
        arrays |= {f"{split}_features": features, f"{split}_labels": labels}
    store_from_arrays(path, **arrays)
    return path


def test_features_that_are_all_equal_are_named_as_such(tmp_path, capsys):
    code, message = refused(capsys, [constant_store(tmp_path / "s.zarr", 8), "--out", tmp_path / "out"])
    assert code == 3
    assert "all 92 training samples have the same features" in message
    assert not (tmp_path / "out/results.json").exists()


def test_features_that_carry_nothing_are_noted(tmp_path):
    result = rebalance(constant_store(tmp_path / "s.zarr", 5), RebalanceConfig(method=("cb",)), out=tmp_path / "out")
    assert "5 of 8 features are the same number for every training image and carry nothing" in result.notes
    few = rebalance(constant_store(tmp_path / "t.zarr", 4), RebalanceConfig(method=("cb",)), out=tmp_path / "out-4")
    assert not any("carry nothing" in note for note in few.notes)
