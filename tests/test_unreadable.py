"""An image that cannot be read: named at once by default, and with --on-error skip left out of everything, its row kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cache import open_cache, verify
from pipeline import info
from pipeline.backbone.build import build_model
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.backbone.train import train_backbone
from pipeline.config import Config, RebalanceConfig, make_config
from pipeline.data import load_dataset
from pipeline.deploy.export import export_model
from pipeline.deploy.inference_model import load_model
from pipeline.dump import dump_features
from pipeline.errors import DataError
from pipeline.rebalance import rebalance
from pipeline.rebalance.evaluation import evaluate
from pipeline.rebalance.load import load, open_store

SIZES = {"train": (30, 12, 5), "val": (4, 4, 4), "test": (6, 6, 6)}
TORN = ("train/1/03.png", "train/0/29.png", "test/2/00.png")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("cache.layout.CHUNK_ROWS", 16)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A folder of real digits as files: three classes in train, val and test."""
    root, digits = tmp_path_factory.mktemp("images"), load_digits()
    rows = {c: iter(np.flatnonzero(digits.target == c)) for c in range(3)}
    for split, sizes in SIZES.items():
        for c, size in enumerate(sizes):
            (root / split / str(c)).mkdir(parents=True)
            for n in range(size):
                pixels = np.round(digits.images[next(rows[c])] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / str(c) / f"{n:02}.png")
    return root


def settings(images: Path, *, augment: str = "crop", **dump) -> Config:
    return make_config(
        {
            "name": "files",
            "data": {"source": "folder", "path": str(images), "image_size": 8, "augment": augment, "workers": 0},
            "backbone": {"model": "cifar_resnet8", "width": 0.25, "epochs": 1, "batch_size": 16, "lr": 0.05},
            "dump": {"views": 2, "batch_size": 7, "dtype": "float32", **dump},
        },
        "test",
    )


@pytest.fixture(scope="module")
def checkpoint(clean, tmp_path_factory) -> Path:
    return train_backbone(settings(clean), out=tmp_path_factory.mktemp("run") / "backbone").checkpoint


@pytest.fixture(scope="module")
def whole(clean, checkpoint, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache.layout.CHUNK_ROWS", 16)
        out = tmp_path_factory.mktemp("whole") / "f.zarr"
        return dump_features(load_checkpoint(checkpoint), settings(clean), out=out).store


@pytest.fixture
def torn(clean, tmp_path) -> Path:
    """The images, three of them damaged: cut short, no image at all, a link to nothing."""
    root = tmp_path / "images"
    shutil.copytree(clean, root)
    first, second, third = (root / name for name in TORN)
    first.write_bytes(first.read_bytes()[:60])
    second.write_text("<html>404 Not Found</html>")
    third.unlink()
    third.symlink_to("away.png")
    return root


def dump(checkpoint, config, out):
    return dump_features(load_checkpoint(checkpoint), config, out=out)


def skipped_rows(store: Path, root: Path) -> dict[str, list[str]]:
    cache, dataset = open_cache(store), load_dataset(settings(root).data)
    found = {s: [split.stored.relative(r) for r in cache.skipped(s)] for s, split in dataset.splits.items()}
    return {split: names for split, names in found.items() if names}


def test_by_default_the_first_such_image_ends_the_dump_and_is_named(torn, checkpoint, tmp_path):
    with pytest.raises(
        DataError, match=r"train/0/29\.png: unreadable image .*; or leave such images out: --on-error s"
    ):
        dump(checkpoint, settings(torn), tmp_path / "f.zarr")


def test_skipped_images_keep_their_rows_and_every_other_row_is_what_it_was(torn, checkpoint, whole, tmp_path):
    result = dump(checkpoint, settings(torn, on_error="skip"), tmp_path / "f.zarr")
    assert {s: sorted(str(Path(p).relative_to(torn)) for p in of) for s, of in result.skipped.items()} == {
        "train": sorted(TORN[:2]),
        "test": [TORN[2]],
    }
    assert "3 image(s) could not be read (2 train, 1 test) and are left out of all that follows: " in str(result)
    assert str(torn / TORN[0]) in str(result)
    assert json.loads(json.dumps(result.to_dict()))["skipped"]["test"] == [str(torn / TORN[2])]
    assert skipped_rows(result.store, torn) == {"train": [TORN[1], TORN[0]], "test": [TORN[2]]}
    cache, clean = open_cache(result.store), open_cache(whole)
    for split in cache.splits:
        np.testing.assert_array_equal(cache.ids(split), clean.ids(split))
        np.testing.assert_array_equal(cache.labels(split), clean.labels(split))
        for view in range(cache.views(split)):
            got, valid = cache.read(split, view), cache.valid(split)
            np.testing.assert_array_equal(got[valid], clean.read(split, view)[valid])
            assert np.isnan(got[~valid]).all()
    assert cache.counts.tolist() == [29, 11, 5]


def test_stage_2_leaves_them_out_and_says_so(torn, checkpoint, tmp_path):
    store = dump(checkpoint, settings(torn, on_error="skip"), tmp_path / "f.zarr").store
    loaded = load(store, augmented=True)
    assert loaded.features.counts.tolist() == [29, 11, 5]
    assert [len(loaded.features.views[v]) for v in range(2)] == [45, 45]
    assert len(loaded.test().labels) == 17
    said = "left out, because their images could not be read: 2 of 47 train, 1 of 18 test samples"
    assert open_store(store)[1] == (said,)
    result = rebalance(store, RebalanceConfig(lam="0.1,0.2", epochs=1, seeds=(0,)), out=tmp_path / "out", device="cpu")
    assert said in result.notes
    assert np.isfinite(result.baseline["all"])
    evaluated = evaluate(store, tmp_path / "out/heads.safetensors")
    assert evaluated.left_out == 1
    assert evaluated.results[0].all == pytest.approx(result.baseline["all"])
    assert "2 unreadable image(s)" in info.describe(store).facts["skipped train"]
    assert info.verify(store).to_dict()["skipped"] == {"train": [29, 33], "test": [12]}
    assert "skipped test: 1 unreadable image(s), left out wherever features are used: sample 12" in str(
        info.verify(store)
    )


def test_an_exported_model_counts_usable_images_and_names_a_class_without_test_images(torn, checkpoint, tmp_path):
    run, out = tmp_path / "run", tmp_path / "model"
    shutil.copytree(checkpoint.parent, run / "backbone")
    for file in (*sorted((torn / "train/0").iterdir())[:10], *(torn / "test/2").iterdir()):
        file.unlink()
        file.write_bytes(b"")
    store = dump(run / "backbone/last.pt", settings(torn, on_error="skip"), run / "features.zarr").store
    result = rebalance(store, RebalanceConfig(lam="0.1", epochs=1), out=run / "rebalance", device="cpu")
    export_model(run, out=out)
    assert json.loads((out / "config.json").read_text())["counts"] == [19, 11, 5]
    assert info.describe(out).facts["training images"] == "35 (19 11 5)"
    groups = dict.fromkeys("012", "few")  # class 0 is medium by the files that are listed
    assert load_model(out, device="cpu").groups == load_model(run, device="cpu").groups == groups
    card, note = (out / "README.md").read_text(encoding="utf-8"), "1 class(es) without a test image"
    assert "(35 images, 19 … 5 a class)" in card
    assert "classes with test images: 0 many (> 100), 0 medium (20–100), 2 few (< 20) training images.\n" in card
    assert f"{note}, left out of balanced test accuracy: 2" in card
    assert f"{note}, left out of balanced test accuracy: 2" in result.to_dict()["notes"]


def test_a_class_without_any_readable_image_is_an_error_that_names_it(torn, checkpoint, tmp_path):
    for file in (torn / "train/2").iterdir():
        file.write_bytes(b"")
    store = dump(checkpoint, settings(torn, on_error="skip"), tmp_path / "f.zarr").store
    with pytest.raises(
        DataError, match=r"f\.zarr: not one training image of 1 class\(es\) could be read: 2; mend some"
    ):
        load(store, augmented=False)


def test_a_split_without_any_readable_image_is_an_error(torn, checkpoint, tmp_path):
    for file in (torn / "test").rglob("*.png"):
        file.unlink()
        file.write_bytes(b"")
    store = dump(checkpoint, settings(torn, on_error="skip"), tmp_path / "f.zarr").store
    with pytest.raises(DataError, match="the test split is empty: not one of its images could be read"):
        load(store, augmented=False).test()


def test_what_is_mended_is_dumped_again_and_nothing_else(torn, clean, checkpoint, whole, tmp_path):
    config = settings(torn, on_error="skip")
    store = dump(checkpoint, config, tmp_path / "f.zarr").store
    again = dump(checkpoint, config, store)
    assert (again.written, sum(map(len, again.skipped.values()))) == (0, 3)
    shutil.copyfile(clean / TORN[0], torn / TORN[0])
    before = {p: p.stat().st_mtime_ns for p in store.rglob("c/*/*/0")}
    some = dump(checkpoint, config, store)
    assert some.written == 2  # one chunk in each view
    changed = {str(p.relative_to(store)) for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert changed == {"train/features/c/0/2/0", "train/features/c/1/2/0"}
    assert skipped_rows(store, torn) == {"train": [TORN[1]], "test": [TORN[2]]}
    shutil.copyfile(clean / TORN[1], torn / TORN[1])
    shutil.copyfile(clean / TORN[2], torn / "test/2/away.png")
    (torn / TORN[2]).unlink()
    (torn / "test/2/away.png").rename(torn / TORN[2])
    last = dump(checkpoint, settings(torn), store)  # no leave to skip is needed any more
    assert (last.written, last.skipped) == (3, {})
    assert verify(store) == []
    assert last.digest == open_cache(whole).digest


def test_a_dump_that_may_not_skip_leaves_the_store_as_it_was(torn, checkpoint, tmp_path):
    store = dump(checkpoint, settings(torn, on_error="skip"), tmp_path / "f.zarr").store
    digest = open_cache(store).digest
    with pytest.raises(
        DataError, match=r"f\.zarr: was made without .*29\.png: unreadable .*\(and 2 more\); or keep lea"
    ):
        dump(checkpoint, settings(torn), store)
    assert open_cache(store).digest == digest


def test_another_image_that_changed_is_still_another_data_set(torn, clean, checkpoint, tmp_path):
    store = dump(checkpoint, settings(torn, on_error="skip"), tmp_path / "f.zarr").store
    shutil.copyfile(clean / "train/0/01.png", torn / "train/0/02.png")
    with pytest.raises(DataError, match=r"dataset is .* there, .* wanted"):
        dump(checkpoint, settings(torn, on_error="skip"), store)


def test_an_unfinished_dump_that_skipped_goes_on_without_leave_to_skip_only_with_all_images(
    torn, clean, checkpoint, tmp_path
):
    store = tmp_path / "f.zarr"

    def stop(done, total, note):
        if done > 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump_features(load_checkpoint(checkpoint), settings(torn, on_error="skip"), out=store, report=stop)
    with pytest.raises(DataError, match=r"29\.png: unreadable"):
        dump(checkpoint, settings(torn), store)
    result = dump(checkpoint, settings(torn, on_error="skip"), store)
    assert 0 < result.written < result.chunks - 3
    assert sum(map(len, result.skipped.values())) == 3


def test_a_nan_of_the_encoder_on_a_readable_image_still_ends_the_dump(torn, checkpoint, tmp_path):
    backbone = load_checkpoint(checkpoint)
    with torch.no_grad():
        next(backbone.model.parameters()).fill_(float("nan"))
    with pytest.raises(
        DataError, match=r"of sample 0, .*train/0/00\.png, \(train view 0\) is nan; no dtype holds that"
    ):
        dump_features(backbone, settings(torn, on_error="skip"), out=tmp_path / "f.zarr")


def test_training_leaves_them_out_when_it_may(torn, tmp_path):
    with pytest.raises(DataError, match=r"unreadable image .*--on-error skip"):
        train_backbone(settings(torn), out=tmp_path / "a")
    result = train_backbone(settings(torn, on_error="skip"), out=tmp_path / "b")
    assert result.last["left_out"] == 2
    assert "2 training image(s) could not be read and were left out" in str(result)
    told = info.describe(result.checkpoint).facts["training images"]
    assert told.startswith("45 of 47, the others could not be read; by class, with them: ")


def test_an_unreadable_image_adds_nothing_to_loss_and_accuracy(clean, tmp_path, monkeypatch):
    """A network that never changes has, over a black placeholder and the others, the loss of the others alone."""

    def frozen(*arguments, **how):
        torch.manual_seed(0)
        model = build_model(*arguments, **how).eval()
        model.train = lambda mode=True: model
        return model

    monkeypatch.setattr("pipeline.backbone.train.learning_rate", lambda *_, **__: 0.0)
    monkeypatch.setattr("pipeline.backbone.train.build_model", frozen)
    images = tmp_path / "images"
    shutil.copytree(clean, images)
    (images / TORN[0]).write_bytes(b"")
    ours = train_backbone(settings(images, augment="none", on_error="skip"), out=tmp_path / "a").last
    (images / TORN[0]).unlink()
    without = train_backbone(settings(images, augment="none"), out=tmp_path / "b").last
    assert ours["left_out"] == 1
    assert ours["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert ours["train_accuracy"] == pytest.approx(without["train_accuracy"])


@pytest.mark.slow
def test_the_commands_skip_with_several_ranks(torn, checkpoint, tmp_path):
    import yaml

    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings(torn).model_dump(mode="json")))

    def pipeline(*words):
        command = [sys.executable, "-m", "pipeline", *words, "--json"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    failed = pipeline("run")
    assert failed.returncode == 3
    assert "unreadable image" in json.loads(failed.stdout)["error"]
    done = pipeline("run", "--on-error", "skip", "--set", "rebalance.lam=0.1")
    assert done.returncode == 0, done.stderr
    one = tmp_path / "runs/files/features.zarr"
    shutil.copytree(one, tmp_path / "one.zarr")
    for nproc in ("2", "3"):
        shutil.rmtree(one)
        done = pipeline("dump-features", "--on-error", "skip", "--nproc", nproc)
        assert done.returncode == 0, done.stderr
        assert sum(map(len, json.loads(done.stdout)["skipped"].values())) == 3
        assert open_cache(one).digest == open_cache(tmp_path / "one.zarr").digest
