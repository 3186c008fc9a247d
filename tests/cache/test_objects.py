"""A store in a bucket of a real S3 server: the same bytes as in a folder, and every kind of trouble on the way."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import zarr

from cache import CacheError, StoreSplit, locate, objects, open_cache, open_writer, verify
from cache.lease import Lease
from cache.objects import Objects
from tests.cache.conftest import Small
from tests.s3_servers import BUSY, CARELESS, CUT, MUTE, Network

slow = pytest.mark.slow
CHUNK = "train/features/c/1/1/0"


@pytest.fixture
def remote(url) -> Small:
    return Small(url)


def names(url) -> set[str]:
    return set(locate(url).names())


def content(url) -> dict[str, bytes]:
    place = locate(url)
    return {name: place.read(name)[0] for name in place.names()}


def damage(url, name, change):
    place = locate(url)
    place.write(name, change(place.read(name)[0]))


def mend(small):
    with small.create() as writer:
        missing = writer.missing()
        small.fill(writer, missing)
        writer.seal()
    return missing


def test_a_store_in_a_bucket_is_the_same_as_one_in_a_folder(small, remote):
    assert remote.sealed() == remote.path
    small.sealed()
    assert content(remote.path) == small.files()
    cache = open_cache(remote.path)
    assert cache.path == remote.path
    assert cache.digest == open_cache(small.path).digest
    for split, view in [("train", 0), ("train", 2), ("val", 0), ("test", 0)]:
        np.testing.assert_array_equal(cache.read(split, view), open_cache(small.path).read(split, view))
    np.testing.assert_array_equal(cache.labels("train"), small.labels)
    assert verify(remote.path) == []
    with remote.create() as writer:
        assert writer.sealed
    group = zarr.open_group(locate(remote.path).zarr(), mode="r")
    np.testing.assert_array_equal(group["train/features"][1], cache.read("train", 1))


def test_several_writers_give_the_same_bytes(small, remote):
    with remote.create() as first:
        ranks = [open_writer(remote.path) for _ in range(3)]
        for rank in (2, 0, 1):
            remote.fill(ranks[rank], ranks[rank].missing(rank=rank, world=3))
        with pytest.raises(CacheError, match="only the process that created"):
            ranks[1].seal()
        first.seal()
    small.sealed()
    assert content(remote.path) == small.files()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CHUNK, lambda content: bytes([content[0] ^ 16]) + content[1:]),
        ("val/labels/c/0", lambda content: content[:-7]),
        ("train/features/zarr.json", lambda content: content + b"\0"),
    ],
    ids=["flip", "cut", "more"],
)
def test_damaged_objects_are_found_and_mended(remote, name, change):
    before = content(remote.sealed())
    damage(remote.path, name, change)
    assert [f"{d.array}/{d.chunk}" for d in verify(remote.path)] == [name]
    assert [f"{c.array}/{c.key}" for c in mend(remote)] == [name] * name.startswith(CHUNK)
    assert content(remote.path) == before


def test_deleted_and_swapped_objects_are_found_and_mended(remote):
    before = content(remote.sealed())
    place = locate(remote.path)
    place.delete(CHUNK)
    one, other = "train/features/c/0/0/0", "train/features/c/0/1/0"
    place.write(one, before[other])
    place.write(other, before[one])
    with pytest.raises(CacheError, match=rf"{CHUNK} \(view 1, rows 4–7\) is missing; repair it: run .*a b%20ü\.zarr"):
        open_cache(remote.path).read("train", 1)
    with pytest.raises(CacheError, match="holds other content than was sealed"):
        open_cache(remote.path).read("train", 0)
    assert {f"{d.array}/{d.chunk}" for d in verify(remote.path)} == {CHUNK, one, other}
    assert {f"{c.array}/{c.key}" for c in mend(remote)} == {CHUNK, one, other}
    assert content(remote.path) == before


def test_finished_chunks_are_kept_and_an_open_store_is_refused(remote):
    with remote.create() as writer:
        remote.fill(writer, writer.chunks[:3])
    for use in (open_cache, verify):
        with pytest.raises(CacheError, match="state is 'open'"):
            use(remote.path)
    with remote.create() as writer:
        assert writer.missing() == writer.chunks[3:]


def test_another_fingerprint_needs_overwriting_and_then_nothing_old_is_left(small, remote):
    remote.sealed()
    with pytest.raises(CacheError, match=r"seed is 0 there, 1 wanted.*--overwrite"):
        remote.create(fingerprint={"seed": 1})
    other = {"fingerprint": {"seed": 1}, "rows_per_chunk": 9}
    with remote.create(**other, overwrite=True) as writer:
        assert writer.missing() == writer.chunks
        remote.fill(writer)
        writer.seal()
    with small.create(**other) as writer:
        small.fill(writer)
        writer.seal()
    assert content(remote.path) == small.files()


def test_a_kill_while_a_store_is_removed_leaves_no_mixture(remote, monkeypatch):
    """What is left says that it was being removed, whatever is dumped there next."""
    remote.sealed()
    with monkeypatch.context() as patch:
        patch.setattr("cache.objects.Objects.delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remote.create(fingerprint={"seed": 1}, overwrite=True)
    locate(remote.path).delete(".lock")
    assert CHUNK in names(remote.path)
    with pytest.raises(CacheError, match="state is 'removing'"):
        open_cache(remote.path)
    with remote.create(fingerprint={"seed": 2}) as writer:
        assert writer.missing() == writer.chunks


def test_what_is_no_store_is_never_touched(remote):
    locate(remote.path).write("thesis.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(CacheError, match="not a feature store"):
            remote.create(overwrite=overwrite)
    assert names(remote.path) == {"thesis.txt"}
    with pytest.raises(CacheError, match=r"no such feature store; make it: .* --out s3://features/nothing"):
        open_cache("s3://features/nothing")


@slow
def test_a_second_writer_is_refused_while_the_first_lives(remote, caplog):
    with remote.create():
        with pytest.raises(CacheError, match=r"another process is writing it \(process \d+ on .*\); wait for it"):
            remote.create()
        assert "waiting up to 2 s to see whether process" in caplog.text
        started = time.monotonic()
        time.sleep(2)  # longer than a lease lasts: it has been renewed
        with pytest.raises(CacheError, match="another process is writing it"):
            remote.create(overwrite=True)
        assert time.monotonic() - started > 2
    assert ".lock" not in names(remote.path)


OWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tests.cache.conftest import Small
small = Small(sys.argv[2])
writer = small.create()
small.fill(writer, writer.chunks[:2])
print("writing", flush=True)
sys.stdin.readline()
small.fill(writer, writer.chunks[2:])
writer.seal()
"""


def owner(url) -> subprocess.Popen:
    """Another process that holds the store's lease and has written two chunks; it goes on when told."""
    code = [sys.executable, "-c", OWNER, str(Path(__file__).parents[2]), url]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(code, text=True, **pipes)
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    return process


def test_a_killed_writer_s_lease_runs_out_and_its_chunks_are_kept(small, remote):
    with owner(remote.path) as process:
        process.kill()
    assert ".lock" in names(remote.path)
    started = time.monotonic()
    with remote.create() as writer:
        assert 1.4 < time.monotonic() - started < 6
        assert writer.missing() == writer.chunks[2:]
        remote.fill(writer)
        writer.seal()
    small.sealed()
    assert content(remote.path) == small.files()


@slow
def test_a_writer_that_slept_through_its_lease_stops_before_it_writes_or_seals(remote):
    """The sleeper is stopped as by a suspended machine, another dumps something else meanwhile, then it goes on."""
    with owner(remote.path) as process:
        process.send_signal(signal.SIGSTOP)
        with remote.create(fingerprint={"seed": 7}, overwrite=True) as writer:
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate("go on\n", 20)
            assert process.returncode == 1
            assert "another process took over writing it" in said
            assert writer.missing() == writer.chunks
            remote.fill(writer)
            writer.seal()
    assert open_cache(remote.path).fingerprint == {"seed": 7}


def test_the_seal_itself_is_refused_once_another_has_begun_the_store_anew(remote):
    """Even a writer that believes in its lease: the root is replaced on the condition that it is still its own."""
    first = remote.create()
    remote.fill(first)
    first._lock._over.set()  # as if its process were stopped
    first._lock.confirm = first._lock.renew = lambda: None
    with remote.create(fingerprint={"seed": 7}, overwrite=True) as second:
        remote.fill(second)
        with pytest.raises(CacheError, match=r"another process has written zarr\.json meanwhile"):
            first.seal()
        assert open_writer(remote.path).sealed is False


def test_of_many_that_take_a_dead_lease_one_wins(url):
    place = locate(url)
    place.write(".lock", b'{"owner": "a dead process", "seconds": 0.3}')
    leases, together, failed = [Lease(Objects(url)) for _ in range(8)], threading.Barrier(8), []

    def take(lease):
        together.wait()
        try:
            lease.take()
        except CacheError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=take, args=[lease]) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [lease for lease in leases if lease._tag]
    assert (len(held), len(failed)) == (1, 7)
    assert all("another process is writing it" in said for said in failed)
    held[0].confirm()
    for lease in leases:
        lease.release()
    assert names(url) == set()


@pytest.mark.parametrize(
    ("trouble", "every"),
    [(CUT, 5), *(pytest.param(trouble, 2, marks=slow) for trouble in (CUT, MUTE, BUSY))],
)
def test_a_network_that_breaks_some_requests_changes_nothing(small, remote, bucket, monkeypatch, trouble, every):
    """Every so many PUTs one is cut after some bytes, loses its answer, or is refused for now: it is sent again."""
    network = Network(bucket, lambda method, name, before: trouble if method == "PUT" and before % every == 0 else None)
    with network.open() as broken:
        monkeypatch.setenv("AWS_ENDPOINT_URL", broken.environment["AWS_ENDPOINT_URL"])
        remote.sealed()
    assert sum(what == trouble for _, _, what in network.log) >= 8
    small.sealed()
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.environment["AWS_ENDPOINT_URL"])
    assert content(remote.path) == small.files()


@slow
@pytest.mark.parametrize("after", [0, 20, 43])
def test_a_chunk_that_never_gets_through_is_an_error_and_is_all_that_is_missing(remote, bucket, monkeypatch, after):
    """Cut after n of 44 bytes, again and again: the store is not sealed, and the rest is kept.

    SeaweedFS takes a request whose body never came for an empty object: the seal has to find that.
    """
    found = "(is missing|has 0 bytes instead of 44)"
    impatient = {**objects._RETRIES, "max_retries": 2}
    monkeypatch.setattr(objects, "_RETRIES", impatient)
    chunk = quote(f"/{CHUNK}")
    network = Network(bucket, lambda method, name, _: CUT if method == "PUT" and name.endswith(chunk) else None, after)
    with network.open() as broken:
        monkeypatch.setenv("AWS_ENDPOINT_URL", broken.environment["AWS_ENDPOINT_URL"])
        with remote.create() as writer:
            for one in writer.chunks:
                if f"{one.array}/{one.key}" != CHUNK:
                    remote.fill(writer, [one])
                    continue
                with pytest.raises(CacheError, match=r"no answer from http://127.* run the same command again"):
                    remote.fill(writer, [one])
            with pytest.raises(CacheError, match=rf"cannot be sealed: {CHUNK} .* {found}"):
                writer.seal()
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.environment["AWS_ENDPOINT_URL"])
    assert [f"{chunk.array}/{chunk.key}" for chunk in mend(remote)] == [CHUNK]


def test_a_seal_whose_answer_is_lost_is_a_seal(remote, bucket, monkeypatch):
    """The PUT of the root is sent again and refused, since it is there already: that is no other writer's."""
    puts = []

    def mute_first(method, name, _):
        if method == "PUT" and name.endswith(".zarr/zarr.json"):
            puts.append(name)
            return MUTE if len(puts) == 1 else None
        return None

    with remote.create() as writer:
        remote.fill(writer)
    with Network(bucket, mute_first).open() as broken, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", broken.environment["AWS_ENDPOINT_URL"])
        with remote.create() as writer:
            writer.seal()
    assert len(puts) == 2
    assert verify(remote.path) == []


def test_a_large_chunk_is_one_request(moto_bucket, monkeypatch):
    """Not an upload in parts, whose leftovers a kill would hide in the bucket."""
    network, rows = Network(moto_bucket), np.zeros((3300, 1024), np.float32)
    with network.open() as watched:
        for name, value in watched.environment.items():
            monkeypatch.setenv(name, value)
        split = StoreSplit(1, np.zeros(3300, int), np.arange(3300))
        given = {"splits": {"train": split}, "width": 1024, "weight": np.zeros((3, 1024)), "counts": [3300, 0, 0]}
        with Small(moto_bucket.url("large")).create(**given, rows_per_chunk=9999) as writer:
            (chunk,) = writer.missing()
            writer.write(chunk, rows)
    assert [(m, n) for m, n, _ in network.log if "/features/c/" in n and m != "GET"] == [
        ("PUT", f"/features/large/{chunk.array}/{chunk.key}")
    ]


def test_a_server_that_ignores_conditions_is_refused(moto_bucket, monkeypatch):
    remote = Small(moto_bucket.url("careless"))
    with Network(moto_bucket, lambda *_: CARELESS).open() as careless:
        for name, value in careless.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(CacheError, match=r"ignores conditional PUTs .*If-None-Match.* kept apart"):
            remote.create()
        assert names(remote.path) == set()
