"""Several processes that want one store at the same moment: one has it, the others are told."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cache import CacheError, open_cache, open_writer, verify
from cache.local import Local
from cache.lock import Lock
from tests.cache.conftest import Small

_context = multiprocessing.get_context("forkserver")


def contend(path: Path, overwrite: bool, start, all_tried, said) -> None:
    start.wait()
    try:
        writer = Small(path).create(overwrite=overwrite)
    except CacheError as error:
        said.put(str(error))
        all_tried.wait()
        return
    all_tried.wait()  # the winner holds it until everybody has tried
    Small(path).fill(writer)
    writer.seal()
    writer.close()
    said.put("sealed")


@pytest.mark.parametrize(
    "there", ["nothing", *(pytest.param(s, marks=pytest.mark.slow) for s in ("unfinished", "to be overwritten"))]
)
def test_of_four_that_start_at_once_one_writes(there, tmp_path):
    for n in range(2):
        path = tmp_path / f"{n}.zarr"
        if there == "unfinished":
            Small(path).create().close()
        if there == "to be overwritten":
            Small(path).sealed()
        start, all_tried, said = _context.Barrier(4), _context.Barrier(4), _context.Queue()
        arguments = (path, there == "to be overwritten", start, all_tried, said)
        processes = [_context.Process(target=contend, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        told = sorted(said.get(timeout=60) for _ in processes)
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert told.count("sealed") == 1, told
        for text in told:
            assert text == "sealed" or "another process" in text
        assert verify(path) == []
    left = [p.name for p in tmp_path.iterdir()]
    assert sorted(left) == [f"{n}.zarr" for n in range(2)]


def test_a_rank_that_outlives_its_job_writes_nothing_into_the_store_of_another(small):
    first = small.create()
    survivor = open_writer(small.path)
    chunk = survivor.chunks[3]
    first.close()  # as its death would
    rows = np.ones((chunk.rows, 5), np.float32)
    with small.create(overwrite=True, fingerprint={"seed": 1}) as other:
        with pytest.raises(CacheError, match="another process has sealed or replaced it meanwhile"):
            survivor.write(chunk, rows)
        small.fill(other)
        other.seal()
    with pytest.raises(CacheError, match="another process has sealed or replaced it meanwhile"):
        survivor.write(chunk, rows)
    assert verify(small.path) == []
    shutil.rmtree(small.path)
    with pytest.raises(CacheError, match="no such feature store"):
        survivor.write(chunk, rows)


def test_letting_go_of_a_lock_leaves_the_one_of_who_came_after(tmp_path):
    """An overwritten store is moved aside with its lock; a new one may be there before the lock is let go."""
    first = Lock(tmp_path).take()
    (tmp_path / ".lock").rename(tmp_path / "aside")
    second = Lock(tmp_path).take()
    first.release()
    with pytest.raises(CacheError, match="another process is writing it"):
        Lock(tmp_path).take()
    second.release()
    assert not (tmp_path / ".lock").exists()


def test_a_store_that_another_process_takes_away_meanwhile_is_not_called_something_else(small, monkeypatch):
    small.sealed()
    refuse = Local.refuse_removal

    def after_another(self):
        small.path.rename(small.path.with_name("aside"))
        small.path.mkdir()
        refuse(self)

    monkeypatch.setattr(Local, "refuse_removal", after_another)
    with pytest.raises(CacheError, match="another process has replaced it meanwhile"):
        small.create(overwrite=True)
    monkeypatch.undo()
    (small.path / "photo.jpg").touch()
    with pytest.raises(CacheError, match="not a feature store"):
        small.create(overwrite=True)


def test_a_file_system_without_locks_is_said_to_be_one(small, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(
        CacheError, match=r"cannot lock files \(No locks available\); mount it with locks, or dump into a"
    ) as told:
        small.create()
    assert told.value.exit_code == 1


def test_a_sealed_store_that_nobody_may_change_is_read_and_verified(small):
    """Nothing is made, touched or removed by readers, by verify, or by a dump that finds everything done."""
    before = (small.sealed(), small.files())[1]
    times = {p: p.stat().st_mtime_ns for p in [small.path, *small.path.rglob("*")]}
    cache = open_cache(small.path)
    cache.read("train", 1)
    assert verify(small.path) == []
    assert small.create().sealed
    assert small.files() == before
    assert {p: p.stat().st_mtime_ns for p in [small.path, *small.path.rglob("*")]} == times
    assert os.listdir(small.path.parent) == [small.path.name]
