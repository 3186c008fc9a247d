"""Names and sizes of many files: the fingerprints of old, one question to the disk each, nothing of them in a worker."""

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import load_dataset
from pipeline.data.dataset import Split
from pipeline.data.files import AT_ONCE, FileNames, _size
from pipeline.data.transform import ImageFiles, Loader, Transform, wanted
from pipeline.errors import DataError

PLAIN = Transform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "none")


@pytest.fixture
def images(tmp_path):
    """Files whose names and bytes are the same wherever they lie; one leads nowhere."""
    root = tmp_path / "images"
    for split, sizes in {"train": {"cat": 30, "dög é": 12, "z": 5}, "val": {"cat": 3, "z": 2}}.items():
        for c, n in sizes.items():
            (root / split / c / "more").mkdir(parents=True)
            for i in range(n):
                file = root / split / c / ("more" if i % 4 == 3 else "") / f"{i} ü.jpg"
                file.write_bytes(f"{split}{c}{i}".encode() * (i + 1))
    (root / "train/z/gone.png").symlink_to("nowhere")
    lines = [f"train/cat/{i} ü.jpg 0" for i in range(30) if i % 4 != 3]
    lines += [f"train/dög é/{i} ü.jpg 1" for i in range(12) if i % 4 != 3]
    lines = [lines[(7 * k) % len(lines)] for k in range(len(lines))]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


SPLIT = {"val_per_class": 20, "test_per_class": 20}  # how missing splits were held out before 0.2
LIST = {"source": "list"}
EXPONENTIAL = {"test_per_class": 0, "subset": "exponential", "max_per_class": 20, "imbalance_factor": 8}
WITHOUT = {"train": [0, 5]}


@pytest.mark.parametrize(
    ("settings", "limit", "expected"),
    [
        ({}, None, ("a2d28a62d88d7100d194171756fec41725ec11c010c79db2adff87025b54654f", "bbaa1cfb06bb9149")),
        (EXPONENTIAL, None, ("fe71d762b8b83afd8d008d95b7b154e9853a3cba187e8ad9c373aca9c64bef47", "83c7ea51dfe4e199")),
        (LIST, None, ("e8e858268323f03d45f47dfc4116422bb8ca28dd8a87fc1ce43930bed51561b9", "0414a20bff0e0d74")),
        ({}, 100, ("96c7e0b122f26b60172cdca597b2a1ea1a3612993fb92bc428fb29129324a065", "e58f54afcc4e870d")),
        (LIST, 100, ("c5f4a6c26aa1cd498863aa89738a1d8b0a19f64a55ed4b27df9816f4e6daa209", "44ef8c9a4f79b740")),
    ],
)
def test_fingerprints_stay_those_of_stores_and_checkpoints_made_before(images, monkeypatch, settings, limit, expected):
    """Computed once by the first version, which kept names in a list and asked for every size when hashing."""
    if limit:
        monkeypatch.setattr("pipeline.data.dataset.CONTENT_LIMIT", limit)
    given = {"source": "folder", "path": images, "train_list": images.parent / "list.txt", **SPLIT, **settings}
    dataset = load_dataset(DataConfig(**given))
    assert (dataset.fingerprint, dataset.fingerprint_without(WITHOUT)[:16]) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"source": "digits", "subset": "exponential", "max_per_class": 110, "imbalance_factor": 22},
            "b9db1a9a111a6b200b7476a19eb7a2fe5a0d5c6e6bd992fb7bcb8cd1456c7d30",
        ),
        ({"source": "npz"}, "4a1556b926adef2d31d900054c8e78935eecf3570b73351f7957d5a6496a2bd7"),
    ],
)
def test_so_do_those_of_arrays(tmp_path, settings, expected):
    pixels = (np.arange(60 * 4 * 4 * 3) % 251).astype(np.uint8).reshape(60, 4, 4, 3)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(60) % 3)
    assert load_dataset(DataConfig(**{"path": tmp_path / "a.npz", **SPLIT, **settings})).fingerprint == expected


@pytest.mark.parametrize("source", ["folder", "list"])
def test_opening_and_fingerprint_ask_for_each_file_once(images, monkeypatch, source):
    asked, stat = Counter(), os.stat
    monkeypatch.setattr("os.stat", lambda path, **how: asked.update([str(path)]) or stat(path, **how))
    dataset = load_dataset(DataConfig(source=source, path=images, train_list=images.parent / "list.txt"))
    assert dataset.summary()["fingerprint_covers"] == "file contents"
    assert dataset.fingerprint_without({"train": [1]})
    files = {split.name_of(i) for split in dataset.splits.values() for i in range(len(split))}
    assert {name: asked[name] + asked[str(os.fsencode(name))] for name in files} == dict.fromkeys(files, 1)


def test_a_slow_disk_is_asked_by_many_threads_and_the_answers_stay_in_order(tmp_path, monkeypatch):
    names = FileNames(f"{n}.png" for n in range(4 * AT_ONCE + 3))
    for n in (0, 5, len(names) - 1):
        (tmp_path / f"{n}.png").write_bytes(b"x" * (n + 1))
    threads, size = set(), _size
    monkeypatch.setattr("pipeline.data.files._size", lambda path: threads.add(threading.get_ident()) or size(path))
    quick = names.below(tmp_path).sizes
    assert threads == {threading.get_ident()}
    assert np.flatnonzero(quick >= 0).tolist() == [0, 5, len(names) - 1]
    assert quick[[0, 5]].tolist() == [1, 6]
    meeting = threading.Barrier(4, timeout=20)  # only four threads at a time pass it

    def wait(path):
        first = int(os.path.splitext(os.path.basename(path))[0]) % AT_ONCE == 0
        if first and threading.current_thread() is not threading.main_thread():
            meeting.wait()
        return size(path)

    monkeypatch.setattr("pipeline.data.files.SLOW", 0.0)
    monkeypatch.setattr("pipeline.data.files._size", wait)
    np.testing.assert_array_equal(names.below(tmp_path).sizes, quick)


def test_selections_share_the_names(tmp_path):
    files = FileNames(["a/ü.png", "b.png", "a/c d.png"]).below(tmp_path)
    taken = files.take(np.array([2, 0])).take(np.array([1, 0, 0]))
    assert [taken.name_of(i) for i in range(3)] == [
        str(tmp_path / name) for name in ("a/ü.png", "a/c d.png", "a/c d.png")
    ]
    assert taken.text is files.text
    assert FileNames(["/elsewhere/x.png"]).below(tmp_path)[0] == "/elsewhere/x.png"


@pytest.mark.skipif(os.name != "posix", reason="names of any bytes")
def test_a_name_that_is_no_text_is_read_and_fingerprinted(tmp_path):
    for c in "ab":
        (tmp_path / c).mkdir()
        for n in range(2):
            Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / c / f"{n}.png")
    os.rename(tmp_path / "a/0.png", os.fsencode(tmp_path / "a") + b"/\xff.png")
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path))
    assert len(dataset.fingerprint) == 64
    assert [len(b) for b in Loader(dataset.train, PLAIN, device=torch.device("cpu")).batches([np.arange(4)])] == [4]


def test_a_directory_on_a_list_is_no_file(images):
    (images / "train/cat/0 ü.jpg").unlink()
    (images / "train/cat/0 ü.jpg").mkdir()
    config = DataConfig(source="list", path=images, train_list=images.parent / "list.txt")
    with pytest.raises(
        DataError, match=r"1 of 32 files are missing under .*, the first is train/cat/0 ü\.jpg; set data"
    ):
        load_dataset(config)


def test_a_worker_gets_no_more_of_a_split_than_its_batches(tmp_path):
    names = FileNames(f"{'n' * 50}{n}.png" for n in range(50_000))
    rows = np.arange(len(names))
    split = Split(labels=rows, ids=rows, stored=names.below(tmp_path))
    assert len(pickle.dumps(ImageFiles(split, PLAIN))) < 4000
    assert len(pickle.dumps(wanted(split, rows[:2], rows[:2], key=None))) < 1000


SHARED = """
import sys
import numpy as np, torch
from pathlib import Path
from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.transform import Loader, Transform

if __name__ == "__main__":
    rows = np.arange(8)
    split = Split(labels=rows, ids=rows, stored=FileNames(["a.png"] * 8).below(Path(sys.argv[1])))
    transform = Transform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "none")
    loader = Loader(split, transform, device=torch.device("cpu"), workers=2)
    batches = loader.batches([np.array([i]) for i in rows])
    next(batches)
    for worker in loader._files._iterator._workers:
        with open(f"/proc/{worker.pid}/smaps_rollup") as file:
            facts = {line.split()[0]: int(line.split()[1]) for line in file if line.endswith("kB\\n")}
        print(facts["Pss_Anon:"] / 1024)
    list(batches)
"""


@pytest.mark.slow
def test_workers_share_what_they_have_imported(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "shared.py").write_text(SHARED)
    command = [sys.executable, str(tmp_path / "shared.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    own = [float(line) for line in done.stdout.split()]
    assert len(own) == 2
    assert max(own) < 150, done.stdout  # MiB; about 370 where each imports torch for itself
