import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import zarr

from cache import CacheError, StoreSplit, create_store, open_cache, open_writer, verify
from cache.numbers import decode, encode


def test_what_was_written_is_read(small):
    cache = open_cache(small.sealed())
    assert cache.splits == ("train", "val", "test")
    assert (cache.width, cache.dtype, cache.views("train"), cache.views("val")) == (5, "float16", 3, 1)
    assert cache.class_names == ("ant", "bee", "çat")
    assert cache.fingerprint == {"dataset": "abc", "seed": 0, "views": 3}
    assert cache.provenance["nested"] == {"x": [1, 2.5, None]}
    np.testing.assert_array_equal(cache.counts, [8, 8, 7])
    np.testing.assert_array_equal(cache.labels("train"), small.labels)
    np.testing.assert_array_equal(cache.ids("train"), np.arange(100, 123))
    np.testing.assert_array_equal(cache.classifier[0], np.arange(15, dtype=np.float32).reshape(3, 5))
    np.testing.assert_array_equal(cache.classifier[1], np.ones(3, np.float32))
    for split, view in [("train", 0), ("train", 2), ("val", 0), ("test", 0)]:
        got = cache.read(split, view)
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, small.features(split, view).astype(np.float16))
        parts = [cache.read_chunk(chunk) for chunk in cache.chunks(split, view)]
        np.testing.assert_array_equal(np.concatenate([got[:0], *parts]), got)
    assert verify(small.path) == []


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_reading_into_a_given_array(small, dtype):
    small.dtype = dtype
    cache = open_cache(small.sealed())
    plain = cache.read("train", 1)
    out = np.empty((23, 5), np.float64)
    assert cache.read("train", 1, out) is out
    np.testing.assert_array_equal(out, plain)
    strided = np.empty((23, 10), plain.dtype)[:, ::2]
    np.testing.assert_array_equal(cache.read("train", 1, strided), plain)
    with pytest.raises(ValueError, match="out has shape"):
        cache.read("train", 1, np.empty((22, 5)))
    with pytest.raises(CacheError, match="no view 3 of train; it has views 0 to 2"):
        cache.read("train", 3)


@pytest.mark.parametrize("piece", [7, 16, 40])
def test_chunks_larger_than_a_piece_are_read_and_checked_whole(small, monkeypatch, piece):
    monkeypatch.setattr("cache.chunks.PIECE", piece)
    cache = open_cache(small.sealed())
    np.testing.assert_array_equal(cache.read("train", 1), small.features("train", 1).astype(np.float16))
    assert verify(small.path) == []
    file = small.path / "train/features/c/1/5/0"  # of its four rows of ten bytes the last one is padding
    whole = file.read_bytes()
    for at in (0, piece, 29, 30, 39, 40):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CacheError, match=r"train/features/c/1/5/0 .* does not match its own checksum"):
            cache.read("train", 1)
        assert [damage.chunk for damage in verify(small.path)] == ["c/1/5/0"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.filterwarnings("error")
def test_a_plain_zarr_client_reads_the_store(small, dtype):
    small.dtype = dtype
    cache = open_cache(small.sealed())
    group = zarr.open_group(small.path, mode="r")
    assert group.attrs["state"] == "sealed"
    assert group.attrs["class_names"] == ["ant", "bee", "çat"]
    features = group["train/features"]
    assert features.shape == (3, 23, 5)
    assert features.chunks == (1, 4, 5)
    assert [codec.to_dict()["name"] for codec in features.metadata.codecs] == ["bytes", "crc32c"]
    np.testing.assert_array_equal(features[1], cache.read_bits("train", 1))
    np.testing.assert_array_equal(group["train/labels"][:], small.labels)
    np.testing.assert_array_equal(group["classifier/weight"][:], cache.classifier[0])
    assert group["test/features"].shape == (1, 0, 5)
    assert features.attrs.asdict() == ({"bits_of": "bfloat16"} if dtype == "bfloat16" else {})


def test_a_missing_chunk_is_not_a_number_for_a_plain_zarr_client(small):
    (small.sealed() / "train/features/c/1/2/0").unlink()
    rows = zarr.open_group(small.path, mode="r")["train/features"][1]
    assert np.isnan(rows[8:12]).all()
    assert np.isfinite(rows[:8]).all()


def test_bfloat16_rounds_as_torch_does_and_comes_back(small):
    torch = pytest.importorskip("torch")
    numbers = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * np.float32(10.0) ** np.arange(-20, 20)
    reference = torch.from_numpy(numbers).to(torch.bfloat16)
    np.testing.assert_array_equal(encode(numbers, "bfloat16"), reference.view(torch.uint16).numpy())
    np.testing.assert_array_equal(decode(encode(numbers, "bfloat16"), "bfloat16"), reference.float().numpy())
    small.dtype = "bfloat16"
    got = open_cache(small.sealed()).read("train", 1)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, small.features("train", 1), rtol=2**-8)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 65505.0, r"feature 2 of sample 105 \(train view 1\) is 65505, beyond float16's .* --dtype float32"),
        ("float16", -1e30, "--dtype bfloat16"),
        ("float16", np.nan, "is nan; no dtype holds that"),
        ("float32", np.inf, "is inf; no dtype holds that"),
        ("bfloat16", 3.4e38, "beyond bfloat16's"),
    ],
)
def test_numbers_the_store_cannot_hold_are_refused(small, dtype, value, message):
    small.dtype = dtype
    with small.create() as writer:
        chunk = next(c for c in writer.chunks if (c.split, c.view, c.index) == ("train", 1, 1))
        rows = np.zeros((4, 5), np.float32)
        rows[1, 2] = value
        with pytest.raises(CacheError, match=message):
            writer.write(chunk, rows)
        rows[1, 2] = 65504.0
        writer.write(chunk, rows)
        assert chunk not in writer.missing()


def test_a_chunk_of_nothing_but_the_fill_value_is_written_too(small):
    ids = np.full(23, -1)
    with small.create(splits={"train": StoreSplit(1, small.labels, ids), "test": StoreSplit(1, [], [])}) as writer:
        small.fill(writer)
        writer.seal()
    np.testing.assert_array_equal(open_cache(small.path).ids("train"), ids)


def test_the_wrong_number_of_rows_is_refused(small):
    with small.create() as writer, pytest.raises(ValueError, match="expected"):
        writer.write(writer.chunks[0], np.zeros((3, 5), np.float32))


def test_several_writers_give_the_same_bytes(small, tmp_path):
    small.sealed()
    other = type(small)(tmp_path / "g.zarr")
    with other.create() as first:
        ranks = [open_writer(other.path) for _ in range(3)]
        for rank in (2, 0, 1):
            other.fill(ranks[rank], ranks[rank].missing(rank=rank, world=3))
        with pytest.raises(CacheError, match="only the process that created"):
            ranks[1].seal()
        first.seal()
    assert other.files() == small.files()
    assert open_cache(other.path).digest == open_cache(small.path).digest


def test_the_digest_is_of_the_content_alone(small, tmp_path):
    digests = set()
    changes = [{}, {"provenance": {}}, {"fingerprint": {}}, {"class_names": ["a", "b", "c"]}, {"bias": [0, 0, 1]}]
    for n, other in enumerate(changes):
        store = type(small)(tmp_path / f"{n}.zarr")
        with store.create(**other) as writer:
            store.fill(writer)
            digests.add(writer.seal())
        assert open_cache(store.path).digest in digests
    assert len(digests) == 4


def test_another_fingerprint_is_refused_naming_the_fields(small):
    small.sealed()
    with pytest.raises(CacheError, match=r'seed is 0 there, 1 wanted; dataset is "abc" there, null wanted.*--over'):
        small.create(fingerprint={"seed": 1, "views": 3})
    small.dtype = "float32"
    with pytest.raises(CacheError, match='dtype is "float16" there, "float32" wanted'):
        small.create()
    small.dtype = "float16"
    with pytest.raises(CacheError, match="classifier/bias"):
        small.create(bias=[0, 0, 0])
    assert verify(small.path) == []
    with small.create(fingerprint={"seed": 1}, overwrite=True) as writer:
        small.fill(writer)
        writer.seal()
    assert open_cache(small.path).fingerprint == {"seed": 1}
    assert [p.name for p in small.path.parent.iterdir()] == ["f.zarr"]


def test_what_is_no_store_is_never_touched(small, tmp_path):
    small.path.mkdir()
    (small.path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CacheError, match="not a feature store"):
            small.create(overwrite=overwrite)
    assert [p.name for p in small.path.iterdir()] == ["thesis.txt"]
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(CacheError, match="not a feature store: a zarr group without format_version"):
        open_cache(tmp_path / "other.zarr")


def test_counts_must_be_those_of_the_labels(small):
    with pytest.raises(CacheError, match="counts do not agree"):
        small.create(counts=[8, 7, 8])


def test_a_second_writer_is_refused_while_the_first_lives(small):
    first = small.create()
    code = f"import sys; sys.path.insert(0, {str(small.path.parent)!r}); from tests.cache.conftest import Small\n"
    code += f"from pathlib import Path; Small(Path({str(small.path)!r})).create(); import os, signal\n"
    code += "os.kill(os.getpid(), signal.SIGKILL)"
    run = [sys.executable, "-c", code]
    refused = subprocess.run(run, capture_output=True, text=True)
    assert "another process is writing it (process " in refused.stderr
    with pytest.raises(CacheError, match="another process is writing it"):
        small.create(overwrite=True)
    first.close()
    assert subprocess.run(run, capture_output=True).returncode == -9
    assert (small.path / ".lock").exists()
    small.sealed()
    assert not (small.path / ".lock").exists()


def test_a_killed_writer_s_children_do_not_keep_its_lock(small):
    code = "import os, signal, sys; from pathlib import Path; from tests.cache.conftest import Small\n"
    code += f"Small(Path({str(small.path)!r})).create()\n"
    code += "os.kill(os.getpid(), signal.SIGKILL) if os.fork() else print('child', flush=True) or sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == b"child\n"
        assert process.wait() == -9
        assert (small.path / ".lock").exists()
        small.create().close()  # while the child still lives
        process.stdin.close()


def test_importing_cache_loads_neither_torch_nor_zarr_nor_obstore():
    heavy = {"torch", "zarr", "obstore", "pipeline"}
    code = f"import sys, cache; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_full_disk_is_an_error_that_says_what_to_do(small, monkeypatch):
    with small.create() as writer:
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CacheError, match="No space left on device; finished chunks stay good"):
            small.fill(writer)
        monkeypatch.undo()
        assert len(writer.missing()) == len(writer.chunks)
    assert not list(small.path.rglob("*.tmp"))


def test_a_folder_nobody_may_write_is_an_error(small, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(CacheError, match="Permission denied"):
        small.create()


def test_what_the_disk_refuses_to_zarr_is_an_error_and_leaves_no_file(small):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with small.create() as writer:
        before = small.files().keys()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
            with pytest.raises(CacheError, match="File too large; finished chunks stay good"):
                small.fill(writer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert small.files().keys() == before
        small.fill(writer)
        writer.seal()


def test_create_store_is_what_the_package_exports():
    assert create_store.__module__ == "cache.create"


def test_everything_is_on_the_disk_before_its_name_and_before_the_seal(small, monkeypatch):
    """A new store before it gets its name, each chunk when `write` returns, and all before the root says sealed."""
    synced, rename, replace = set(), os.rename, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: synced.add(os.readlink(f"/proc/self/fd/{fd}")))

    def whole(path) -> bool:
        return {str(path), *map(str, path.rglob("*"))} - {str(small.path / ".lock")} <= synced

    def naming(old, new):
        named.append((whole(old), rename(old, new)))

    named = []
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", naming)
        writer = small.create()
    assert named == [(True, None)]
    assert str(small.path.parent) in synced
    for chunk in writer.chunks:
        synced.clear()
        small.fill(writer, [chunk])
        file = small.path / chunk.array / chunk.key
        assert {str(file), str(file.parent)} <= synced

    def sealing(old, new):
        sealed.append((str(new), whole(small.path), str(old) in synced))
        synced.clear()
        replace(old, new)

    synced.clear()
    sealed = []
    monkeypatch.setattr("os.replace", sealing)
    with writer:
        writer.seal()
    assert sealed == [(str(small.path / "zarr.json"), True, True)]
    assert synced == {str(small.path)}


def test_a_kill_while_a_store_is_made_leaves_nothing_under_its_name(small):
    code = "import os; from pathlib import Path; from tests.cache.conftest import Small; import cache.local\n"
    code += "cache.local.fsync_tree = lambda path: os.kill(os.getpid(), 9)\n"
    code += f"Small(Path({str(small.path)!r})).create()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [p.suffix for p in small.path.parent.iterdir()] == [".building"]
    small.sealed()
    assert [p.name for p in small.path.parent.iterdir()] == ["f.zarr"]
