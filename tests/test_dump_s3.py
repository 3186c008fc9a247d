"""Dumping into a bucket and working from it: the same store, the same heads, and errors that say what to check."""

import json
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from cache import CacheError, locate, objects, open_cache, verify
from pipeline.backbone.train import train_backbone
from pipeline.cli import invoke
from pipeline.config import find_config, load_config
from tests import ranks
from tests.markdown import blocks, command_lines, pipeline_words
from tests.s3_servers import CUT, Network

SETTINGS = ["backbone.epochs=1", "dump.views=3", "dump.batch_size=32", "data.workers=0"]
SETTINGS += ["rebalance.epochs=1", "rebalance.lam=0.05"]
CHUNKS, IMAGES = 24, 3 * 363 + 200 + 400  # as tests/ranks.py cuts the digits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = load_config(find_config("digits-lt"), SETTINGS)
    return train_backbone(config, out=tmp_path_factory.mktemp("run") / "backbone").checkpoint


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    """The undisturbed store of one process, in a folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert ranks.dump(checkpoint, folder / "features.zarr", scratch=folder).codes == [0]
    return folder / "features.zarr"


def content(where) -> dict[str, bytes]:
    """Every object but the root metadata, which say when and by what command they were made."""
    place = locate(where)
    return {name: place.read(name)[0] for name in place.names() if name != "zarr.json"}


def chunk_rows(cache) -> dict[str, int]:
    chunks = [c for split in cache.splits for view in range(cache.views(split)) for c in cache.chunks(split, view)]
    return {f"{chunk.array}/{chunk.key}": chunk.rows for chunk in chunks}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "world", "then"),
    [("after:3", 1, 2), ("before:2@1", 2, 1), ("before:1", 2, 2), ("before:seal", 1, 1), ("after:seal", 1, 2)],
)
def test_a_killed_dump_into_a_bucket_goes_on_to_the_same_store(checkpoint, whole, url, tmp_path, kill_at, world, then):
    died = ranks.dump(checkpoint, url, ranks=world, kill_at=kill_at, scratch=tmp_path)
    assert -signal.SIGKILL in died.codes
    assert all(died.codes)
    if kill_at == "after:seal":
        assert open_cache(url).digest == open_cache(whole).digest
    else:
        with pytest.raises(CacheError, match="did not finish"):
            open_cache(url)
    of_chunk = chunk_rows(open_cache(whole))
    there = {name for name in of_chunk if name in set(locate(url).names())}
    after = ranks.dump(checkpoint, url, ranks=then, scratch=tmp_path)
    assert after.codes == [0] * then
    assert after.encoded == sum(rows for name, rows in of_chunk.items() if name not in there)
    left = content(url)
    left.pop(".lock", None)
    assert left == content(whole)
    assert open_cache(url).digest == open_cache(whole).digest


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_any_number_of_ranks_writes_the_same_objects_through_a_bad_network(
    checkpoint, whole, url, bucket, tmp_path, monkeypatch, world
):
    network = Network(bucket, lambda method, _, before: CUT if method == "PUT" and before % 7 == 3 else None, after=900)
    with network.open() as broken, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", broken.environment["AWS_ENDPOINT_URL"])
        assert ranks.dump(checkpoint, url, ranks=world, scratch=tmp_path).codes == [0] * world
    assert sum(trouble == CUT for _, _, trouble in network.log) > 4
    assert content(url) == content(whole)
    assert open_cache(url).digest == open_cache(whole).digest


@pytest.fixture
def dumped(checkpoint, url, capsys) -> str:
    """A store that the command line has made in a bucket."""
    assert invoke(["dump-features", "--checkpoint", str(checkpoint), "--out", url, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["store"] == url
    assert said["written"] == said["chunks"]
    return url


def test_commands_work_from_a_bucket_as_from_a_folder(checkpoint, dumped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["dump-features", "--checkpoint", str(checkpoint), "--json"]) == 0  # to the run, in a folder
    local = checkpoint.parent.parent / "features.zarr"
    assert json.loads(capsys.readouterr().out)["digest"] == open_cache(dumped).digest
    for store in (dumped, str(local)):
        assert invoke(["rebalance", store, "--out", "remote" if store == dumped else "local", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["store"] == store
    heads, wanted = load_file("remote/heads.safetensors"), load_file("local/heads.safetensors")
    assert all((heads[name] == wanted[name]).all() for name in wanted)
    assert invoke(["evaluate", dumped, "--heads", "remote/heads.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"] == dumped
    assert invoke(["info", dumped]) == 0
    assert f"{dumped}: feature store" in capsys.readouterr().out.replace("\n", "")


def test_damaged_objects_are_named_and_made_again(checkpoint, dumped, capsys):
    place, name = locate(dumped), "train/features/c/1/0/0"
    place.write(name, b"\0" + place.read(name)[0][1:])
    assert invoke(["verify", dumped]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} (view 1, rows 0–362) does not match its own checksum" in said
    assert invoke(["rebalance", dumped, "--views", "augmented", "--out", "nowhere"]) == 3
    assert "repair it: run the pipeline dump-features" in " ".join(capsys.readouterr().err.split())
    assert invoke(["dump-features", "--checkpoint", str(checkpoint), "--out", dumped, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 1
    assert invoke(["verify", dumped]) == 0
    assert verify(dumped) == []


@pytest.mark.slow
def test_a_run_may_keep_its_features_in_a_bucket(url, tmp_path, capsys):
    command = ["run", "digits-lt", "--out", str(tmp_path / "run"), "--store", url, "--seeds", "0,1"]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    assert invoke(command) == 0
    assert not list((tmp_path / "run").rglob("*.zarr"))
    assert [verify(f"{url}/seed-{seed}") for seed in (0, 1)] == [[], []]
    assert invoke(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    capsys.readouterr()
    assert invoke([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["redone"] == []
    assert invoke(["report", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_the_documentation_s_commands_run(moto_bucket, tmp_path, monkeypatch):
    (block,) = [b for b in blocks("docs/storage.md") if "s3://" in b.text]
    commands = [words for line in command_lines(block.text) if (words := pipeline_words(line))]
    assert {words[0] for words in commands} >= {"dump-features", "verify", "rebalance", "run"}
    for name, value in moto_bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    for words in commands:
        quick = ["--set", "backbone.epochs=1"] if words[0] in ("train-backbone", "run") else []
        assert invoke([*words, *quick]) == 0, words


def fails(arguments, capsys) -> str:
    """What a command says that ends with exit code 3 and no traceback."""
    assert invoke(arguments) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said


def both(where, checkpoint):
    return [["verify", where], ["dump-features", "--checkpoint", str(checkpoint), "--out", where]]


def test_a_bucket_that_is_not_there(checkpoint, moto_bucket, monkeypatch, capsys):
    for name, value in moto_bucket.environment.items():
        monkeypatch.setenv(name, value)
    for command in both("s3://elsewhere/f.zarr", checkpoint):
        assert "s3://elsewhere/f.zarr: there is no bucket elsewhere at http://127" in fails(command, capsys)
    assert "no such feature store" in fails(["verify", moto_bucket.url("none")], capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", r"refuses the credentials (InvalidAccessKeyId); check AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "refuses the credentials (SignatureDoesNotMatch); check AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials(checkpoint, seaweedfs_bucket, monkeypatch, capsys, variable, value, reason):
    for name, given in seaweedfs_bucket.environment.items():
        monkeypatch.setenv(name, given)
    monkeypatch.setenv(variable, value)
    for command in both(seaweedfs_bucket.url("f.zarr"), checkpoint):
        assert reason in fails(command, capsys)


@pytest.mark.slow
def test_a_reader_may_read_but_not_write(checkpoint, whole, seaweedfs_bucket, monkeypatch, capsys):
    for name, given in seaweedfs_bucket.environment.items():
        monkeypatch.setenv(name, given)
    where = seaweedfs_bucket.url("readers.zarr")
    assert invoke(["dump-features", "--checkpoint", str(checkpoint), "--out", where]) == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    assert invoke(["verify", where]) == 0
    capsys.readouterr()
    write = ["dump-features", "--checkpoint", str(checkpoint), "--out", seaweedfs_bucket.url("new.zarr")]
    assert "gives no permission for this (AccessDenied)" in fails(write, capsys)


def test_an_endpoint_where_nobody_listens(checkpoint, monkeypatch, capsys):
    """Tried again for 20 s: here less, so that nobody waits for it."""
    monkeypatch.setitem(objects._RETRIES, "retry_timeout", timedelta(seconds=1))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        for command in both("s3://features/f.zarr", checkpoint):
            started = time.monotonic()
            assert "s3://features/f.zarr: no answer from http://127.0.0.1" in fails(command, capsys)
            assert time.monotonic() - started < 10


def test_a_run_looks_for_its_bucket_before_it_trains(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(objects._RETRIES, "retry_timeout", timedelta(seconds=1))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        run = ["run", "digits-lt", "--out", str(tmp_path / "run"), "--store", "s3://features/f.zarr"]
        assert "s3://features/f.zarr: no answer from http://127.0.0.1" in fails(run, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_endpoint_that_takes_calls_and_never_answers(monkeypatch, capsys):
    """Bounded by the time for an answer, 30 s: here less, so that nobody waits for it."""
    monkeypatch.setitem(objects._TIMEOUTS, "read_timeout", "4s")
    monkeypatch.setitem(objects._RETRIES, "retry_timeout", timedelta(seconds=2))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "no answer from http://127.0.0.1" in fails(["verify", "s3://features/f.zarr"], capsys)
        assert 3 < time.monotonic() - started < 15


def test_without_obstore_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert "pip install 'iwb-pipeline[s3]'" in fails(["verify", "s3://features/f.zarr"], capsys)


@pytest.mark.parametrize("where", ["s3:///f.zarr", "s3://", "ftp://host/f.zarr", "s3://bucket/../f.zarr"])
def test_a_url_that_is_none_is_a_usage_error(where, capsys):
    assert invoke(["verify", where]) == 2
    assert where.rstrip("/") in capsys.readouterr().err


def test_only_stores_may_be_urls(capsys):
    assert invoke(["rebalance", "--out", "s3://features/results"]) == 2
    assert "expected a path on this machine; only feature stores may be URLs" in capsys.readouterr().err
