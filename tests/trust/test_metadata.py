"""Class B: metadata is input; what it says is checked before memory, files or results depend on it."""

import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from cache import CacheError, open_cache
from cache.attributes import MOST_VIEWS
from cache.chunks import checksum
from pipeline.backbone.weights import read_key_map, rename_tensors
from pipeline.cli import invoke
from pipeline.config import load_config
from pipeline.errors import DATA, ConfigError, DataError
from pipeline.info import describe
from pipeline.results import documents
from tests.trust.crafted import KEPT, crafted_file, crafted_store

STORES = [  # attribute, value, words of the refusal
    ("layout", None, "layout"),
    ("layout", [], "layout"),
    ("layout.splits", [], "no training split"),
    ("layout.splits", "train", "layout.splits"),
    ("layout.splits.0", ["train", 2], "layout.splits.0"),
    ("layout.splits.0.0", "../train", "no name of a split"),
    ("layout.splits.1.0", "/etc", "no name of a split"),
    ("layout.splits.1.0", "..", "no name of a split"),
    ("layout.splits.1.0", "train", "no name of a split"),
    ("layout.splits.1.0", "classifier", "no name of a split"),
    ("layout.splits.0.1", 10**7, f"no whole number from 1 to {MOST_VIEWS}"),
    ("layout.splits.0.1", 0, "views"),
    ("layout.splits.0.2", -1, "rows"),
    ("layout.splits.0.2", "89", "rows"),
    ("layout.splits.0.2", 89.0, "rows"),
    ("layout.splits.0.2", True, "rows"),
    ("layout.splits.0.2", 10**12, "chunks of features"),
    ("layout.splits.0.2", 90, "counts: 89 in all"),
    ("layout.splits.1.2", 10**12, "chunks of features|chunks instead of|bytes instead of"),
    ("layout.splits.1.2", 8191, "bytes instead of|is not as it was made"),
    ("layout.width", 0, "layout.width"),
    ("layout.width", 10**12, "layout.width"),
    ("layout.classes", "10", "layout.classes"),
    ("layout.rows_per_chunk", 1, "chunks instead of"),
    ("layout.rows_per_chunk", 0, "layout.rows_per_chunk"),
    ("layout.dtype", "object", "layout.dtype"),
    ("layout.dtype", "int64", "layout.dtype"),
    ("class_names", ["a"], "class_names"),
    ("class_names.3", None, "class_names.3"),
    ("class_names.3", "a\x1b[2Jb", "class_names.3"),
    ("counts", [1, 2], "counts"),
    ("counts.0", -1, "counts.0"),
    ("counts.0", 10**9, "counts"),
    ("fingerprint", None, "fingerprint"),
    ("fingerprint", [], "fingerprint"),
    ("provenance", "me", "provenance"),
    ("state", "half", "state"),
    ("manifest", {}, "metadata: nothing of"),
    ("manifest", [], "manifest"),
    ("manifest.train/features", {}, "chunks instead of"),
    ("manifest.train/labels", {"c/9": 1}, "not in this store"),
    ("manifest.val/labels.c/0", -1, "manifest.val/labels.c/0"),
    ("metadata.../../etc/passwd", 1, "not in this store"),
    ("metadata.train", "x", "metadata.train"),
    ("skipped", {"nowhere": [1]}, "skipped"),
    ("skipped", {"train": [89]}, "skipped.train.0"),
    ("skipped", {"train": 3}, "skipped.train"),
    ("format_version", "1", "format_version"),
]


def path_of(field: str) -> tuple:
    head, _, rest = field.partition(".")
    if head in ("manifest", "metadata"):
        parts = [rest.rpartition(".")[0], rest.rpartition(".")[2]] if rest.endswith(".c/0") else [rest]
        return (head, *filter(None, parts))
    return tuple(int(part) if part.isdigit() else part for part in field.split("."))


@pytest.mark.parametrize(("field", "value", "words"), STORES, ids=[f"{f}={str(v)[:20]!a}" for f, v, _ in STORES])
def test_a_store_whose_attributes_cannot_be_is_refused_at_once_and_without_the_memory(field, value, words, tmp_path):
    store = crafted_store(tmp_path, path_of(field), value)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(CacheError, match=words):
        open_cache(store)
    assert time.monotonic() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    before = sorted(tmp_path.rglob("*"))
    assert invoke(["export", str(store), "--to", "npy", "--out", str(tmp_path / "out")]) == DATA
    assert sorted(tmp_path.rglob("*")) == before  # nothing in or beside --out


def test_labels_beyond_the_classes_are_refused(tmp_path):
    labels = np.full(200, 10**9, "<i8")
    store = crafted_store(tmp_path, ("manifest", "val/labels", "c/0"), checksum(labels))
    (store / "val/labels/c/0").write_bytes(labels.tobytes() + checksum(labels).to_bytes(4, "little"))
    with pytest.raises(CacheError, match="labels from 1000000000 to 1000000000 for 10 classes"):
        open_cache(store).labels("val")


DOCUMENTS = [  # file, field, value
    ("one/rebalance/results.json", ("selected", "all_std"), "x"),
    ("one/rebalance/results.json", ("timing", "fit_s"), ""),
    ("one/rebalance/results.json", ("network",), []),
    ("one/rebalance/results.json", ("digest",), 5),
    ("one/rebalance/results.json", ("results",), None),
    ("one/rebalance/results.json", ("selected", "method"), "iwb\x1b[2J"),
    ("one/rebalance/results.json", (), []),
    ("three/results.json", ("baseline", "few_std"), ""),
    ("one/rebalance/selection.json", ("selected", "lam"), True),
    ("ablation/ablation.json", ("rows", 0, "all_std"), "x"),
    ("ablation/ablation.json", ("timing", "fit_s"), ""),
    ("ablation/ablation.json", ("timing",), {}),
    ("ablation/ablation.json", ("network",), None),
    ("exported/config.json", ("provenance",), None),
    ("exported/config.json", ("provenance", "argv", 0), []),
    ("exported/config.json", ("counts", 0), -1),
    ("exported/config.json", ("weights",), "/etc/passwd"),
]


@pytest.mark.parametrize(("name", "field", "value"), DOCUMENTS)
def test_a_document_that_cannot_be_is_refused_by_whoever_reads_it(name, field, value, tmp_path):
    folder = shutil.copytree((KEPT / name).parent, tmp_path / "copy")
    path = crafted_file(KEPT / name, folder / Path(name).name, field, value)
    with pytest.raises(DataError, match=path.name):
        describe(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("iwb,cb,0.1,0,test,ten,1,2", "0.class"),
        ("iwb,cb,0.1,0,test,10,1,2", "line 2: not of 10 classes"),
        ("iwb,cb,0.1,0,test,1,3,2", "line 2: not of 10 classes"),
        ("iwb,cb,0.1,0,test,1,-3,2", "0.correct"),
        ("iwb,cb,nan,0,test,1,1,2", "0.lam"),
        ("iwb,cb", "0.split"),
    ],
)
def test_a_line_of_per_class_csv_that_cannot_be_is_named(line, words, tmp_path):
    path = tmp_path / "per_class.csv"
    path.write_text(f"method,loss,lam,seed,split,class,correct,total\n{line}\n")
    with pytest.raises(DataError, match=words):
        documents.read_per_class(path, classes=10)


@pytest.mark.parametrize("line", ["[]", "3", '{"epoch": "1", "loss": 1}', '{"epoch": 1, "loss": NaN}', "[" * 10**5])
def test_a_line_of_metrics_that_cannot_be_is_refused(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n" + '{"epoch": 2, "loss": 1.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        documents.read_epochs(tmp_path / "metrics.jsonl")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
YAML = {
    "aliases": BOMB,
    "date": "name: 2020-99-99",
    "whole number": "name: !!int x",
    "deep list": "[" * 50_000,
    "deep dictionary": "{a: " * 50_000,
    "itself": "a: &a [*a]",
    "itself as a key": "&a {x: *a}",
    "base 60": "a: " + ":".join(["1"] * 20_000),
    "long": "a: " + "x" * 10**6,
    "wide": "\n".join(f"k{n}: {n}" for n in range(50_000)),
    "objects": "!!python/object/apply:os.system ['true']",
    "zone": "a: 2001-12-14t21:59:43.10-99:00",
    "a list as a key": "? [a]\n: 1",
    "text": "name",
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("kind", YAML)
@pytest.mark.parametrize("reader", [load_config, read_key_map])
def test_yaml_that_grows_or_is_none_is_refused_within_a_second(kind, reader, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(YAML[kind])
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        reader(path)
    assert time.process_time() - started < 1


def test_a_pattern_that_would_take_for_ever_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.backbone.weights.PATTERN_SECONDS", 0.2)
    (tmp_path / "map.yaml").write_text("'^(a+)+$': b\n")
    started = time.monotonic()
    with pytest.raises(ConfigError, match="nested repetitions"):
        rename_tensors({"a" * 40 + "!": torch.zeros(1)}, read_key_map(tmp_path / "map.yaml"), tmp_path / "map.yaml")
    assert time.monotonic() - started < 5
