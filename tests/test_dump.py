"""Dumping features: exactly once, the same bytes whatever the ranks, the kills and the repairs."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache import Chunk, open_cache, verify
from pipeline import dump
from pipeline.backbone.build import encode
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.backbone.train import train_backbone
from pipeline.config import find_config, load_config
from pipeline.data import load_dataset
from pipeline.data.transform import Loader
from pipeline.dump import batches_of, dump_features
from pipeline.errors import DataError, Terminated

SETTINGS = ["backbone.epochs=1", "dump.views=3", "dump.batch_size=32", "data.workers=0"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The worker processes of these tests have one thread each; equal threads give equal bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config():
    return load_config(find_config("digits-lt"), SETTINGS)


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory) -> Path:
    return train_backbone(config, out=tmp_path_factory.mktemp("backbone")).checkpoint


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 75 rows, which neither the batch size nor the number of rows divides."""
    monkeypatch.setattr("cache.layout.CHUNK_ROWS", 75)


@pytest.fixture(scope="module")
def whole(config, checkpoint, tmp_path_factory) -> Path:
    """The undisturbed store of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache.layout.CHUNK_ROWS", 75)
        return dump_features(load_checkpoint(checkpoint), config, out=tmp_path_factory.mktemp("d") / "f.zarr").store


def contents(store: Path) -> dict[str, bytes]:
    """Every file but the root metadata, which say when and by what command they were made."""
    files = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    del files["zarr.json"]
    return files


def assert_same(store: Path, whole: Path) -> None:
    assert contents(store) == contents(whole)
    assert open_cache(store).digest == open_cache(whole).digest


def in_processes(checkpoint: Path, out: Path, *, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """`pipeline dump-features` in worker processes of one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "pipeline", "dump-features", "--json"]
    command += ["--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def opened(config, checkpoint: Path, out: Path) -> Path:
    """An open store without features, its chunks small."""
    prepared = dump.prepare_dump(load_checkpoint(checkpoint), config, out=out, device="cpu")
    dump._writer(prepared).close()
    return out


@given(start=st.integers(0, 300), rows=st.integers(1, 300), batch_size=st.integers(1, 100))
def test_batches_cover_a_chunk_once_and_stay_in_it(start, rows, batch_size):
    batches = batches_of(Chunk("train", 0, 0, start, start + rows), batch_size)
    assert np.concatenate(batches).tolist() == list(range(start, start + rows))
    assert max(map(len, batches)) <= batch_size


def test_the_store_holds_what_the_classifier_sees(whole, config, checkpoint):
    """View 0 is the encoder on the plain images, and weight · features + bias are the model's own logits."""
    cache, backbone, dataset = open_cache(whole), load_checkpoint(checkpoint), load_dataset(config.data)
    assert {s: cache.rows(s) for s in cache.splits} == {s: len(split) for s, split in dataset.splits.items()}
    assert [cache.views(s) for s in cache.splits] == [3, 1, 1]
    weight, bias = cache.classifier
    for name, split in dataset.splits.items():
        np.testing.assert_array_equal(cache.labels(name), split.labels)
        np.testing.assert_array_equal(cache.ids(name), split.ids)
        (images,) = Loader(split, backbone.transform, device=torch.device("cpu")).batches([np.arange(len(split))])
        with torch.inference_mode():
            features, logits = encode(backbone.model, images).numpy(), backbone.model(images).numpy()
        np.testing.assert_allclose(cache.read(name), features, rtol=2**-10, atol=2**-12)
        np.testing.assert_allclose(features @ weight.T + bias, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cache.counts, dataset.counts)
    assert cache.provenance["config"] == config.model_dump(mode="json")
    assert cache.provenance["made_from"]["weights"] == backbone.weights_digest


def test_augmented_views_differ_and_depend_on_seed_view_and_sample_alone(whole, config, checkpoint):
    cache, backbone, train = open_cache(whole), load_checkpoint(checkpoint), load_dataset(config.data).train
    views = [cache.read("train", v) for v in range(3)]
    assert not np.array_equal(views[0], views[1])
    assert not np.array_equal(views[1], views[2])
    rows = np.array([311, 5, 140])
    loader = Loader(train, backbone.transform, device=torch.device("cpu"))
    (images,) = loader.batches([rows], dump.augmentation_key(config.dump.seed, 2))
    with torch.inference_mode():
        features = encode(backbone.model, images).numpy()
    np.testing.assert_allclose(views[2][rows], features, rtol=2**-10, atol=2**-12)


@pytest.mark.slow
def test_batch_size_and_threads_only_round_otherwise(whole, config, checkpoint, tmp_path):
    """Within what one rounding to float16 and a few of float32 can differ by."""
    exact = open_cache(whole)
    for name, size, threads in (("batch", 11, 1), ("threads", 32, 2)):
        torch.set_num_threads(threads)
        try:
            other = config.model_copy(update={"dump": config.dump.model_copy(update={"batch_size": size})})
            store = open_cache(dump_features(load_checkpoint(checkpoint), other, out=tmp_path / name).store)
        finally:
            torch.set_num_threads(1)
        assert store.fingerprint == exact.fingerprint
        for split in exact.splits:
            for view in range(exact.views(split)):
                got, expected = store.read(split, view), exact.read(split, view)
                np.testing.assert_allclose(got, expected, rtol=2**-9, atol=2**-12)


@given(missing=st.lists(st.integers(0, 99), unique=True), world=st.integers(1, 9), batch_size=st.integers(1, 50))
def test_what_is_missing_is_encoded_once_whatever_the_ranks(missing, world, batch_size):
    """The plan from missing chunks to batches of rows: each row of each missing chunk on one rank, in one batch."""
    chunks = [Chunk("train", n // 10, n % 10, 7 * (n % 10), min(7 * (n % 10) + 7, 65)) for n in sorted(missing)]
    seen = [
        (chunk.view, row)
        for rank in range(world)
        for i in dump.owned_chunks(chunks=len(chunks), rank=rank, world=world)
        for chunk in [chunks[i]]
        for batch in batches_of(chunk, batch_size)
        for row in batch.tolist()
    ]
    assert seen == [(chunk.view, row) for chunk in chunks for row in range(chunk.start, chunk.stop)]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_ranks_write_the_same_bytes(ranks, whole, config, checkpoint, tmp_path):
    store = opened(config, checkpoint, tmp_path / "f.zarr")
    done = in_processes(checkpoint, store, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_same(store, whole)


def test_a_dump_killed_after_a_chunk_goes_on_to_the_same_bytes(whole, config, checkpoint, tmp_path):
    store = opened(config, checkpoint, tmp_path / "f.zarr")
    killed = in_processes(checkpoint, store, PIPELINE_KILL_AT="after:4")
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(Exception, match="did not finish"):
        open_cache(store)
    finished = {p: p.stat().st_mtime_ns for p in store.rglob("train/features/c/*/*/0")}
    assert 4 <= len(finished) <= 6
    result = dump_features(load_checkpoint(checkpoint), config, out=store)
    assert result.written == result.chunks - len(finished)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert_same(store, whole)


def test_sigterm_keeps_the_finished_images_of_an_unfinished_chunk_too(whole, config, checkpoint, tmp_path):
    store, reports = tmp_path / "f.zarr", []

    def terminate(done, total, note):
        reports.append(done)
        if len(reports) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="the same command goes on") as stopped:
        dump_features(load_checkpoint(checkpoint), config, out=store, report=terminate)
    assert stopped.value.exit_code == 143
    assert reports == [32, 64, 75, 107, 139]  # two batches of the second chunk
    assert not (store / ".lock").exists()
    reports.clear()
    result = dump_features(load_checkpoint(checkpoint), config, out=store, report=lambda *r: reports.append(r[:2]))
    assert result.written == result.chunks - 1
    images = result.samples["train"] * 3 + result.samples["val"] + result.samples["test"]
    assert reports[0] == (75, images - 75)  # the 11 that were missing of the second chunk, 64 are there
    assert_same(store, whole)


@pytest.mark.parametrize("damage", [None, "flipped", "cut"])
def test_what_a_process_kept_before_it_died_is_not_encoded_again(
    whole, config, checkpoint, tmp_path, monkeypatch, damage
):
    monkeypatch.setattr(dump, "PART_SECONDS", 0.0)
    store, reports = tmp_path / "f.zarr", []

    def die(done, total, note):
        reports.append(done)
        if len(reports) == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        dump_features(load_checkpoint(checkpoint), config, out=store, report=die)
    (part,) = store.rglob("*.part")
    if damage == "flipped":
        content = bytearray(part.read_bytes())
        content[-100] ^= 1
        part.write_bytes(content)
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-7])
    reports.clear()
    smaller = config.model_copy(update={"dump": config.dump.model_copy(update={"batch_size": 16})})
    dump_features(load_checkpoint(checkpoint), smaller, out=store, report=lambda *r: reports.append(r[:2]))
    assert reports[0][0] == (16 if damage else 75)
    assert not list(store.rglob("*.part"))
    np.testing.assert_allclose(
        open_cache(store).read("train", 0), open_cache(whole).read("train", 0), rtol=2**-9, atol=2**-10
    )


def test_dumping_again_verifies_and_repairs_just_what_is_damaged(whole, config, checkpoint, tmp_path):
    store = tmp_path / "f.zarr"
    shutil.copytree(whole, store)
    backbone = load_checkpoint(checkpoint)
    result = dump_features(backbone, config, out=store)
    assert (result.written, result.digest) == (0, open_cache(whole).digest)
    assert "nothing was missing" in str(result)
    torn, lost = store / "train/features/c/1/2/0", store / "val/features/c/0/0/0"
    torn.write_bytes(torn.read_bytes()[:-9])
    lost.unlink()
    reports = []
    result = dump_features(backbone, config, out=store, report=lambda *seen: reports.append(seen))
    assert result.written == 2
    assert [done for done, *_ in reports] == [32, 64, 75, 107, 139, 150]
    assert reports[-1][0] == reports[-1][1] == 75 + min(75, open_cache(store).rows("val"))
    assert_same(store, whole)
    assert verify(store) == []


def test_a_store_made_otherwise_is_refused_unless_overwritten(whole, config, checkpoint, tmp_path):
    store = tmp_path / "f.zarr"
    shutil.copytree(whole, store)
    backbone = load_checkpoint(checkpoint)
    other = config.model_copy(update={"dump": config.dump.model_copy(update={"views": 1, "seed": 7})})
    with pytest.raises(DataError, match=r"seed is 0 there, 7 wanted; views is 3 there, 1 wanted.*--overwrite"):
        dump_features(backbone, other, out=store)
    assert dump_features(backbone, other, out=store, overwrite=True).views == 1
    assert open_cache(store).views("train") == 1


def test_a_smaller_batch_may_go_on_with_a_store(whole, config, checkpoint, tmp_path):
    """As after running out of GPU memory; batch size only rounds differently."""
    store = tmp_path / "f.zarr"
    shutil.copytree(whole, store)
    (store / "val/features/c/0/0/0").unlink()
    smaller = config.model_copy(update={"dump": config.dump.model_copy(update={"batch_size": 5})})
    assert dump_features(load_checkpoint(checkpoint), smaller, out=store).written == 1
    np.testing.assert_allclose(open_cache(store).read("val"), open_cache(whole).read("val"), rtol=2**-9, atol=2**-10)


def test_a_backbone_of_other_classes_is_refused(config, checkpoint, tmp_path, monkeypatch):
    backbone = load_checkpoint(checkpoint)
    object.__setattr__(backbone, "class_names", ("cat", *backbone.class_names[1:]))
    with pytest.raises(DataError, match="trained on 10 classes, the data has 10, the first that differs: 'cat'"):
        dump_features(backbone, config, out=tmp_path / "f.zarr")
    larger = config.model_copy(update={"data": config.data.model_copy(update={"image_size": 16})})
    with pytest.raises(DataError, match=r"trained on 8×8 images, train has 16×16; set data\.image_size"):
        dump_features(load_checkpoint(checkpoint), larger, out=tmp_path / "f.zarr")
    assert not (tmp_path / "f.zarr").exists()


def test_features_too_large_for_float16_name_the_sample_and_the_way_out(config, checkpoint, tmp_path):
    backbone = load_checkpoint(checkpoint)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.mul_(30)
    with pytest.raises(DataError, match=r"of sample \d+ \(train view 0\) is .* beyond float16's .* --dtype float32"):
        dump_features(backbone, config, out=tmp_path / "f.zarr")


def test_writing_waits_when_the_disk_is_slower_than_the_encoder():
    """The memory bound: never more than WAITING chunks encoded but not written, whatever their number."""
    written, release = [], threading.Semaphore(0)

    def slow(chunk, features):
        release.acquire()
        written.append(chunk)

    with dump._in_background(slow) as put:
        try:
            for n in range(8):
                if n >= dump.WAITING:
                    release.release()
                put(n, None)
                assert n + 1 - len(written) <= dump.WAITING + 1
        finally:
            release.release(8)
    assert written == list(range(8))


@pytest.mark.parametrize("chunks", [1, 100])
def test_what_fails_while_writing_fails_the_dump(chunks):
    def full(chunk, features):
        raise OSError(28, "No space left on device")

    taken = []

    def put_many():
        with dump._in_background(full) as put:
            for n in range(chunks):
                put(n, None)
                taken.append(n)

    with pytest.raises(OSError, match="No space"):
        put_many()
    assert len(taken) <= dump.WAITING + 1
