import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from cache import CacheError, StoreSplit, create_store, export, open_cache, verify

DOCS = Path(__file__).parents[2] / "docs" / "cache.md"


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_npy_files_hold_what_the_store_holds(small, dtype):
    small.dtype = dtype
    cache, out = open_cache(small.sealed()), small.path.parent / "plain"
    made = export(cache, out)
    assert sorted(made.files) == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert made.bytes == sum((out / name).stat().st_size for name in made.files)
    for split in cache.splits:
        features = np.load(out / split / "features.npy")
        assert features.shape == (cache.views(split), cache.rows(split), 5)
        assert features.dtype == cache.read(split).dtype
        for view in range(cache.views(split)):
            np.testing.assert_array_equal(features[view], cache.read(split, view))
        np.testing.assert_array_equal(np.load(out / split / "labels.npy"), cache.labels(split))
        np.testing.assert_array_equal(np.load(out / split / "ids.npy"), cache.ids(split))
    for name, values in zip(("weight", "bias"), cache.classifier, strict=True):
        np.testing.assert_array_equal(np.load(out / "classifier" / f"{name}.npy"), values)
    facts = json.loads((out / "store.json").read_text(encoding="utf-8"))
    assert facts["class_names"] == ["ant", "bee", "çat"]
    assert (facts["digest"], facts["dtype"], facts["counts"]) == (cache.digest, dtype, [8, 8, 7])


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_safetensors_hold_what_the_store_holds(small, dtype):
    torch = pytest.importorskip("torch")
    small.dtype = dtype
    cache, out = open_cache(small.sealed()), small.path.parent / "tensors"
    export(small.path, out, format="safetensors")
    with safe_open(out / "store.safetensors", "pt") as file:
        assert file.metadata()["digest"] == cache.digest
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors.keys() == {f"{split}/{name}" for split in cache.splits for name in ("features", "labels", "ids")} | {
        "classifier/weight",
        "classifier/bias",
    }
    features = tensors["train/features"]
    assert features.dtype == getattr(torch, dtype)
    for view in range(3):
        np.testing.assert_array_equal(features[view].float().numpy(), cache.read("train", view).astype(np.float32))
    np.testing.assert_array_equal(tensors["train/ids"].numpy(), cache.ids("train"))
    if dtype != "bfloat16":
        np.testing.assert_array_equal(load_file(out / "store.safetensors")["val/features"][0], cache.read("val"))


def test_an_export_is_there_whole_or_not_at_all(small, monkeypatch):
    small.sealed()
    out = small.path.parent / "plain"
    file = small.path / "train/features/c/1/3/0"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    with pytest.raises(CacheError, match="train/features/c/1/3/0"):
        export(small.path, out)
    assert [p.name for p in small.path.parent.iterdir()] == ["f.zarr"]
    file.write_bytes(whole)
    code = "import os, sys, cache, cache.plain\n"
    code += "cache.plain.fsync_tree = lambda path: os.kill(os.getpid(), 9)\ncache.export(*sys.argv[1:])"
    assert subprocess.run([sys.executable, "-c", code, str(small.path), str(out)]).returncode == -9
    assert not out.exists()
    export(small.path, out)
    assert sorted(p.name for p in small.path.parent.iterdir()) == ["f.zarr", "plain"]
    with pytest.raises(CacheError, match=r"plain: already holds something; choose another --out"):
        export(small.path, out)
    assert verify(small.path) == []


def test_everything_but_zarr_is_read_without_zarr_and_torch(small):
    """In a process where neither can be imported."""
    small.dtype = "bfloat16"
    cache = open_cache(small.sealed())
    code = """
import sys
sys.modules["zarr"] = sys.modules["torch"] = None
from cache import export, open_cache, verify
store = open_cache(sys.argv[1])
assert verify(sys.argv[1]) == []
total = float(store.read("train", 1).sum())
blocks = list(store.stream("train", views=1, seed=0, epoch=0, memory_bytes=1 << 20))
export(store, sys.argv[2])
print(repr([total, float(sum(features.sum() for _, features in blocks)), store.labels("val").tolist()]))
"""
    command = [sys.executable, "-c", code, str(small.path), str(small.path.parent / "plain")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total = float(cache.read("train", 1).sum())
    got = eval(done.stdout)
    assert got[0] == total
    assert got[1] == pytest.approx(total, rel=1e-5)
    assert got[2] == cache.labels("val").tolist()


def test_zarr_alone_reads_the_store_in_a_process_without_this_package(small):
    cache = open_cache(small.sealed())
    code = """
import json, sys
sys.modules["cache"] = None
import zarr
group = zarr.open_group(sys.argv[1], mode="r")
print(json.dumps([group["train/features"][2].astype(float).tolist(), group["train/labels"][:].tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(small.path)], capture_output=True, text=True, check=True)
    features, labels = json.loads(done.stdout)
    np.testing.assert_array_equal(features, cache.read("train", 2))
    assert labels == cache.labels("train").tolist()


def test_the_examples_of_the_documentation_run(small, monkeypatch, capsys):
    cache = open_cache(small.sealed())
    os.rename(small.path, small.path.with_name("features.zarr"))
    monkeypatch.chdir(small.path.parent)
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S))
    names: dict = {}
    exec(compile(code, str(DOCS), "exec"), names)
    assert capsys.readouterr().out == "('train', 'val', 'test') 23 3 5 float16\n"
    np.testing.assert_array_equal(names["features"], small.features("train", 0).astype(np.float16))
    np.testing.assert_array_equal(names["few"], names["features"][[3, 1, 4]])
    np.testing.assert_array_equal(names["same"], names["features"])
    np.testing.assert_array_equal(np.load("plain/train/features.npy")[0], names["features"])
    assert Path("tensors/store.safetensors").is_file()
    assert cache.digest == names["store"].digest


PEAK = """
import sys
from cache import export

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))

before = resident("VmRSS")
export(*sys.argv[1:3], format=sys.argv[3])
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_an_export_takes_the_memory_of_a_few_chunks(tmp_path, format):
    rows, width = 65_536, 1024
    head = {"weight": np.zeros((1, width)), "bias": [0], "class_names": ["a"], "counts": [rows]}
    splits = {"train": StoreSplit(1, np.zeros(rows, int), np.arange(rows))}
    with create_store(
        tmp_path / "f.zarr", splits=splits, width=width, dtype="float16", fingerprint={}, provenance={}, **head
    ) as writer:
        for chunk in writer.missing():
            writer.write(chunk, np.full((chunk.rows, width), chunk.index, np.float32))
        writer.seal()
    command = [sys.executable, "-c", PEAK, str(tmp_path / "f.zarr"), str(tmp_path / "out"), format]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "out").is_dir()
    assert grown < 64  # MiB; the features are 128
