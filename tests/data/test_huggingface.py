"""Sets as HuggingFace `datasets` stores them: found by type, decoded row by row in workers, dumped exactly once."""

import io
import os
import pickle
import re
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
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.backbone.train import train_backbone
from pipeline.config import DataConfig, make_config
from pipeline.data import load_dataset
from pipeline.data.transform import ImageFiles, Loader, Transform
from pipeline.dump import dump_features
from pipeline.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

PLAIN = Transform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "none", crop_pct=1.0)
SIZES = {"train": (30, 12, 5), "validation": (4, 4, 4), "test": (6, 6, 6)}
NAMES = ["nought", "one", "two"]


@pytest.fixture(scope="module", autouse=True)
def quiet_library(tmp_path_factory):
    """Its cache is of this module alone, and it draws no bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


def encoded(pixels: np.ndarray) -> dict:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "png")
    return {"bytes": held.getvalue(), "path": None}


@pytest.fixture(scope="module")
def digits() -> dict[str, dict]:
    """Split → columns: real digits, classes mixed."""
    bunch = load_digits()
    rows = {c: iter(np.flatnonzero(bunch.target == c)) for c in range(3)}
    made = {}
    for split, sizes in SIZES.items():
        labels = np.random.default_rng(0).permutation(np.repeat(range(3), sizes))
        pixels = [np.round(bunch.images[next(rows[c])] * (255 / 16)).astype(np.uint8) for c in labels]
        made[split] = {"image": [encoded(p) for p in pixels], "label": labels.tolist()}
    return made


FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}


def stored(columns, features=FEATURES):
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(scope="module")
def disk(digits, tmp_path_factory) -> Path:
    """A `save_to_disk` folder, train in two shards."""
    path = tmp_path_factory.mktemp("disk") / "digits"
    sets = datasets.DatasetDict({split: stored(columns) for split, columns in digits.items()})
    sets.save_to_disk(path, num_shards={"train": 2, "validation": 1, "test": 1})
    return path


def config(path, **data) -> DataConfig:
    return DataConfig(source="huggingface", path=path, **data)


def as_parquet(digits, path) -> Path:
    path.mkdir()
    for split, columns in digits.items():
        stored(columns).to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


def as_parquet_file(digits, path) -> Path:
    stored(digits["train"]).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_plain_arrow(digits, path) -> Path:
    """Files with a footer and without, of columns that say nothing of images."""
    path.mkdir()
    for split, columns in digits.items():
        table = pa.table({"picture": [image["bytes"] for image in columns["image"]], "label": columns["label"]})
        kind = pa.ipc.new_file if split == "train" else pa.ipc.new_stream
        with kind(path / f"{split}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return path


def as_image_folder(digits, path) -> Path:
    for split, columns in digits.items():
        for n, (image, label) in enumerate(zip(columns["image"], columns["label"], strict=True)):
            (path / split / NAMES[label]).mkdir(parents=True, exist_ok=True)
            (path / split / NAMES[label] / f"{n:03}.png").write_bytes(image["bytes"])
    return path


@pytest.mark.parametrize("make", [as_parquet, as_parquet_file, as_plain_arrow, as_image_folder])
def test_every_kind_holds_the_same_images(make, digits, disk, tmp_path):
    whole = load_dataset(config(disk))
    found = load_dataset(config(make(digits, tmp_path / "set"), val_per_class=0, test_per_class=0))
    assert {s: len(split) for s, split in found.splits.items()} in ({"train": 47, "val": 12, "test": 18}, {"train": 47})
    assert found.class_names == (("0", "1", "2") if make is as_plain_arrow else tuple(NAMES))
    assert found.counts.tolist() == [30, 12, 5]
    for s, split in found.splits.items():
        same = whole.splits[s]
        if make is not as_image_folder:
            assert split.digest() == same.digest()
            np.testing.assert_array_equal(split.ids, np.arange(len(split)))
        pixels = [{(int(y), of.read(i).tobytes()) for i, y in enumerate(of.labels)} for of in (split, same)]
        assert pixels[0] == pixels[1]
    assert whole.fingerprint_covers == "image contents"


def test_no_image_is_decoded_to_open_and_none_copied_into_a_worker(disk, monkeypatch):
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("decoded"))
    dataset = load_dataset(config(disk, subset="exponential", max_per_class=25, imbalance_factor=5, val_per_class=2))
    assert dataset.counts.tolist() == [25, 11, 5]
    assert len(dataset.fingerprint) == 64
    assert len(dataset.val) == 12  # its own
    dataset.train.stored.reader.sizes  # noqa: B018
    assert len(pickle.dumps(ImageFiles(dataset.train, PLAIN))) < 4000


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_rows_of_every_shard_in_any_order(disk, digits, workers):
    train = load_dataset(config(disk)).train
    order = np.random.default_rng(3).permutation(len(train))
    loader = Loader(train, PLAIN, device=torch.device("cpu"), workers=workers)
    images = torch.cat(list(loader.batches(np.array_split(order, 5))))
    pixels = [np.asarray(Image.open(io.BytesIO(digits["train"]["image"][i]["bytes"]))) for i in order]
    expected = torch.from_numpy(np.stack(pixels)).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(images, expected)


def test_the_fingerprint_sees_one_byte_and_beyond_the_limit_one_size(digits, disk, tmp_path, monkeypatch):
    def fingerprint(columns, path):
        stored(columns).save_to_disk(path)
        return load_dataset(config(path)).fingerprint

    train = digits["train"]
    first = fingerprint(train, tmp_path / "a")
    moved = {name: list(reversed(column)) for name, column in train.items()}
    assert fingerprint(moved, tmp_path / "b") != first
    raw = train["image"][20]["bytes"]
    torn, short = (
        train | {"image": [*train["image"][:20], {"bytes": new, "path": None}, *train["image"][21:]]}
        for new in (raw[:-9] + b"?" + raw[-8:], raw[:-1])
    )
    assert len({first, fingerprint(torn, tmp_path / "c"), fingerprint(short, tmp_path / "d")}) == 3
    monkeypatch.setattr("pipeline.data.dataset.CONTENT_LIMIT", 100)
    datas = [load_dataset(config(tmp_path / name)) for name in "acd"]
    assert datas[0].fingerprint_covers == "image names and sizes"
    assert datas[0].fingerprint == datas[1].fingerprint != datas[2].fingerprint


@pytest.mark.parametrize("labels", [["b", "a", "c"], [1, 0, 2]])
def test_texts_and_numbers_are_labels_too(labels, digits, tmp_path):
    column = [labels[y] for y in digits["train"]["label"]]
    pq.write_table(
        pa.table({"id": range(47), "image": digits["train"]["image"], "label": column}), tmp_path / "a.parquet"
    )
    dataset = load_dataset(config(tmp_path / "a.parquet", test_per_class=0, val_per_class=0))
    assert dataset.class_names == (("a", "b", "c") if labels[0] == "b" else ("0", "1", "2"))
    assert dataset.counts.tolist() == [12, 30, 5]
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    named = load_dataset(config(tmp_path / "a.parquet", class_names=tmp_path / "names.txt"))
    assert named.class_names == (("a", "b", "c") if labels[0] == "b" else ("x", "y", "z"))


@pytest.mark.parametrize(
    ("change", "data", "error", "words"),
    [
        ({"image": None}, {}, ConfigError, ["no column of images", "label (int64)"]),
        (
            {"mask": "image"},
            {},
            ConfigError,
            ["2 columns may hold the images: image, mask", "--set data.image_column="],
        ),
        (
            {"coarse": "label"},
            {},
            ConfigError,
            ["2 columns may hold the labels: label, coarse", "data.label_column=label"],
        ),
        ({"label": None}, {}, ConfigError, ["no column of labels", "image ("]),
        ({}, {"label_column": "labels"}, ConfigError, ["data.label_column=labels", "did you mean label?"]),
        ({}, {"label_column": "image"}, ConfigError, ["data.label_column=image: holds no labels"]),
        ({}, {"train_split": "train2"}, ConfigError, ["data.train_split=train2", "has train", "did you mean train?"]),
        ({}, {"val_split": "train"}, ConfigError, ["the same images for two purposes"]),
        ({}, {"train_split": "none"}, ConfigError, ["--set data.train_split=NAME"]),
    ],
)
def test_what_a_setting_can_mend_is_said(change, data, error, words, digits, tmp_path):
    columns, features = dict(digits["train"]), dict(FEATURES)
    for name, like in change.items():
        if like is None:
            del columns[name], features[name]
        else:
            columns[name], features[name] = columns[like], features[like]
    stored(columns, features).save_to_disk(tmp_path / "set")
    with pytest.raises(error) as raised:
        load_dataset(config(tmp_path / "set", **data))
    assert all(word in str(raised.value) for word in [str(tmp_path), *words] if "purposes" not in words[0]), str(
        raised.value
    )
    assert words[-1] in str(raised.value)


def test_one_of_two_columns_is_chosen(digits, tmp_path):
    columns = digits["train"] | {"coarse": [int(y > 0) for y in digits["train"]["label"]]}
    stored(columns, FEATURES | {"coarse": datasets.ClassLabel(names=["no", "yes"])}).save_to_disk(tmp_path / "set")
    assert load_dataset(config(tmp_path / "set", label_column="coarse")).class_names == ("no", "yes")


@pytest.mark.parametrize("hidden", [-1, None])
def test_a_test_split_whose_labels_are_hidden_is_named_and_can_be_left_out(hidden, digits, tmp_path):
    sets = {split: stored(columns) for split, columns in digits.items()}
    sets["test"] = stored(digits["test"] | {"label": [0, 1] + [hidden] * 16})
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    with pytest.raises(
        DataError, match=r"set, test: 16 of 18 rows have no label, the first is row 2; .*data\.test_split=none"
    ):
        load_dataset(config(tmp_path / "set"))
    dataset = load_dataset(config(tmp_path / "set", test_split="none", test_per_class=2))
    assert len(dataset.test) == 5
    assert "no test split" in dataset.notes[0]


def test_splits_of_other_names_and_other_classes(digits, tmp_path):
    sets = datasets.DatasetDict({"learn": stored(digits["train"]), "exam": stored(digits["test"])})
    sets.save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"set has learn, exam; say with --set data\.train_split=NAME"):
        load_dataset(config(tmp_path / "set"))
    dataset = load_dataset(config(tmp_path / "set", train_split="learn", test_split="exam"))
    assert len(dataset.test) == 18
    other = datasets.ClassLabel(names=["two", "one", "nought"])
    sets["exam"] = stored(digits["test"], FEATURES | {"label": other})
    sets.save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match=r"other, exam: its label names other classes than that of train"):
        load_dataset(config(tmp_path / "other", train_split="learn", test_split="exam"))
    texts = {"image": datasets.Image(), "label": datasets.Value("string")}
    for split, labels in {"train": ["a", "b"], "test": ["a", "q"]}.items():
        stored({"image": digits["train"]["image"][:2], "label": labels}, texts).save_to_disk(tmp_path / "texts" / split)
    (tmp_path / "texts/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"texts, test, column label: row 1 is 'q', a class that train does not have"):
        load_dataset(config(tmp_path / "texts"))


def test_damaged_files_are_named(digits, disk, tmp_path):
    folder = as_parquet(digits, tmp_path / "set")
    whole = (folder / "test-00000-of-00001.parquet").read_bytes()
    (folder / "test-00000-of-00001.parquet").write_bytes(whole[:-30] + b"x" * 30)
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet: cannot be read as a data set"):
        load_dataset(config(folder))
    shutil.copytree(disk, tmp_path / "disk")
    shard = next((tmp_path / "disk/train").glob("data-00001*.arrow"))
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(DataError, match="disk"):
        load_dataset(config(tmp_path / "disk"))
    (tmp_path / "a.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(DataError, match=r"a\.arrow: damaged or no Arrow file"):
        load_dataset(config(tmp_path / "a.arrow"))
    (tmp_path / "empty").mkdir()
    for name, words in {
        "empty": "cannot be read as",
        "a.csv": "neither .parquet nor",
        "nowhere": "no such file",
    }.items():
        if name == "a.csv":
            (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=f"{name}: {words}"):
            load_dataset(config(tmp_path / name))


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'iwb-pipeline\[huggingface\]'"):
        load_dataset(config(tmp_path))


def test_the_library_is_imported_only_when_used():
    code = "import sys, pipeline.data, pipeline.data.transform; print({'datasets', 'pyarrow', 'pandas'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def settings(path: Path, **dump):
    return make_config(
        {
            "name": "rows",
            "data": {"source": "huggingface", "path": str(path), "image_size": 8, "augment": "crop", "workers": 0},
            "backbone": {"model": "cifar_resnet8", "width": 0.25, "epochs": 1, "batch_size": 16, "lr": 0.05},
            "dump": {"views": 2, "batch_size": 7, "dtype": "float32", **dump},
        },
        "test",
    )


def test_training_and_dump_resumed_repaired_and_verified(disk, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("cache.layout.CHUNK_ROWS", 16)
    backbone = load_checkpoint(train_backbone(settings(disk), out=tmp_path / "run").checkpoint)

    def stop(done, total, note):
        if done > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump_features(backbone, settings(disk), out=tmp_path / "f.zarr", report=stop)
    result = dump_features(backbone, settings(disk), out=tmp_path / "f.zarr")
    assert 0 < result.written < result.chunks
    folder = as_parquet(digits, tmp_path / "parquet")  # the same images stored otherwise are the same data
    again = dump_features(backbone, settings(folder), out=tmp_path / "f.zarr")
    assert (again.written, verify(again.store)) == (0, [])
    whole = dump_features(backbone, settings(folder), out=tmp_path / "g.zarr")
    assert whole.digest == result.digest
    store = open_cache(whole.store)
    np.testing.assert_array_equal(store.labels("train"), digits["train"]["label"])
    np.testing.assert_array_equal(store.ids("train"), np.arange(47))


def test_unreadable_rows_are_named_and_can_be_skipped(disk, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("cache.layout.CHUNK_ROWS", 16)
    images = list(digits["train"]["image"])
    images[3] = {"bytes": images[3]["bytes"][:60], "path": "three.png"}
    images[30] = {"bytes": b"", "path": None}
    images[31] = None
    sets = {s: stored(c | ({"image": images} if s == "train" else {})) for s, c in digits.items()}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    backbone = load_checkpoint(
        train_backbone(settings(tmp_path / "set", on_error="skip"), out=tmp_path / "run").checkpoint
    )
    with pytest.raises(
        DataError, match=r"set, train, row 3 \(three\.png\): unreadable image .*; or leave such images out"
    ):
        dump_features(backbone, settings(tmp_path / "set"), out=tmp_path / "f.zarr")
    result = dump_features(backbone, settings(tmp_path / "set", on_error="skip"), out=tmp_path / "f.zarr")
    rows = [f"{tmp_path / 'set'}, train, row {row}" for row in ("3 (three.png)", 30, 31)]
    assert result.skipped == {"train": rows}
    assert open_cache(result.store).skipped("train").tolist() == [3, 30, 31]
    mended = [*images[:3], digits["train"]["image"][3] | {"path": "three.png"}, *images[4:]]
    stored(digits["train"] | {"image": mended}).save_to_disk(tmp_path / "set/other")
    for file in (tmp_path / "set/other").iterdir():
        os.replace(file, tmp_path / "set/train" / file.name)
    some = dump_features(backbone, settings(tmp_path / "set", on_error="skip"), out=tmp_path / "f.zarr")
    assert some.written == 2  # its chunk in both views
    assert some.skipped == {"train": rows[1:]}


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    docs = Path(__file__).parents[2] / "docs" / "data.md"
    text = docs.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    names: dict = {}
    exec(compile(code, str(docs), "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "('cat', 'dog') [34  6] {'train': 40, 'val': 8, 'test': 8}",
        "no test split: 8 training images were held out as one",
        "pets-disk, train, row 45 (5.png)",
        "[30  3]",
    ]
