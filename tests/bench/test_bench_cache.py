import json

import numpy as np
import pytest
import torch

from cache import open_cache
from pipeline.bench import cache as bench
from pipeline.bench import dump
from pipeline.cli import invoke
from tests.peak_memory import MIB, ROWS, measured


def test_reading_measures_the_bytes_of_the_store_and_leaves_nothing(tmp_path):
    found = list(bench.reading(tmp_path, 300, 16, "bfloat16", repeat=1, say=lambda text: None))
    assert [(m.name, m.target) for m in found] == [
        ("load over np.load, bfloat16", 0.8),
        ("verify over np.load, bfloat16", 0.5),
    ]
    assert all(m.value > 0 for m in found)
    assert list(tmp_path.iterdir()) == []


def test_generated_features_are_the_same_every_time_and_different_in_every_chunk(tmp_path):
    stores = [open_cache(bench.generated(tmp_path / n, 40, 8, "float32", chunks=4)) for n in ("a", "b")]
    assert len(stores[0].chunks("train")) == 4
    assert stores[0].digest == stores[1].digest
    assert len(np.unique(stores[0].read("train"))) == 320


def test_a_dump_is_measured_by_what_follows_its_first_chunk(tmp_path):
    """A whole dump of three views into a sealed store; its encoder sees the batches of the augmented ones."""
    config = dump.arrays(tmp_path, rows=24, size=16, views=3)
    of = dump.backbone(dump.build_model(dump.BackboneConfig(model="cifar_resnet8"), num_classes=dump.CLASSES), 16)
    measure = dump.over_halves("x", config, of, tmp_path, 1, torch.device("cpu"))
    assert measure.target == 0.95
    (taken,) = measure.figures["dump, all s"]
    assert measure.figures["dump, images/s"] == pytest.approx(48 / taken, rel=0.01)
    assert not (tmp_path / "dump.zarr").exists()


def test_writing_is_timed_without_making_the_store(tmp_path):
    measure = dump.writing(tmp_path, rows=50, width=8, dtype="float16", repeat=1)
    assert (measure.unit, measure.target) == ("rows/s", None)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_made(tmp_path, capsys):
    words = ["bench", "cache", "--rows", "1000000000", "--width", "1000000", "--folder", str(tmp_path), "--json"]
    assert invoke(words) == 1
    said = capsys.readouterr()
    assert "GB are needed; choose another place with --folder, or fewer --rows" in said.err
    assert json.loads(said.out)["exit_code"] == 1
    assert list(tmp_path.iterdir()) == []
    assert invoke(["bench", "cache", "--folder", str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_benchmark_as_a_command(tmp_path, capsys):
    """On small features."""
    out = tmp_path / "bench.json"
    words = ["bench", "cache", "--rows", "600", "--width", "64", "--repeat", "1", "--out", str(out), "--json"]
    assert invoke(words) == 0
    found = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written.pop("header")["kind"] == "bench"
    assert written == found
    by_name = {measure["name"]: measure for measure in found["measures"]}
    assert len(by_name) == 2 + 3 + 6


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """Two stores, the second of four times as many rows, and the peaks of the memory that their dumps took."""
    stores = {rows: tmp_path_factory.mktemp("memory") / f"{rows}.zarr" for rows in (ROWS, 4 * ROWS)}
    return stores, [measured("dump", str(store), str(rows))["peak"] for rows, store in stores.items()]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dump", "verify"])
def test_memory_does_not_grow_with_the_number_of_rows(job, dumps):
    """Four times as many rows are 192 MiB of features more; two chunks of difference are allowed."""
    stores, peaks = dumps
    if job == "verify":
        peaks = [measured("verify", str(store), str(rows))["peak"] for rows, store in stores.items()]
    assert peaks[1] - peaks[0] < 32 * MIB


@pytest.mark.slow
def test_a_stream_stays_within_its_budget(tmp_path):
    """Within a quarter of the store; 16 MiB beside it are for threads, the allocator and what a first call imports."""
    store = open_cache(bench.generated(tmp_path / "streamed.zarr", 100_000, 64, "float16", chunks=29))
    budget = store.rows("train") * store.width * 2 // 4
    figures = measured("stream", str(store.path), str(budget))
    assert figures["peak"] - figures["before"] - budget < 16 * MIB
