"""The real command in trouble: a lost rank, SIGTERM, a full disk, a second writer; then the same command goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache import open_cache, open_writer
from tests import ranks
from tests.test_dump_kills import checkpoint, contents, whole  # noqa: F401

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(checkpoint, tmp_path) -> Path:  # noqa: F811
    """An open store of small chunks, none of them written."""
    return empty(checkpoint, tmp_path / "f.zarr", tmp_path)


def empty(checkpoint: Path, store: Path, scratch: Path) -> Path:  # noqa: F811
    assert ranks.dump(checkpoint, store, kill_at="before:1", scratch=scratch).codes == [-9]
    return store


def command(checkpoint: Path, store: Path, *words: str, kill_at: str = "", limit: str = ""):  # noqa: F811
    """`pipeline dump-features --json`: (exit code, document, what it said, seconds); limit: a shell command before it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PIPELINE_KILL_AT": kill_at}
    line = [sys.executable, "-m", "pipeline", "dump-features", "--checkpoint", str(checkpoint), "--out", str(store)]
    line += ["--device", "cpu", "--json", *words]
    if limit:
        line = ["bash", "-c", f'{limit}; exec "$0" "$@"', *line]
    started = time.monotonic()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    document = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return done.returncode, document, done.stderr, time.monotonic() - started


def chunks_there(store: Path) -> int:
    return len(list(store.rglob("features/c/*/*/0")))


def test_a_lost_rank_ends_the_job_soon_and_another_number_of_ranks_goes_on(checkpoint, whole, store):  # noqa: F811
    code, _, said, seconds = command(checkpoint, store, "--nproc", "2", kill_at="within:3@1")
    assert code == 1
    assert "Traceback" not in said
    assert seconds < 60  # start included; nobody waits for the dead
    there = chunks_there(store)
    assert 2 <= there < 24
    code, document, said, _ = command(checkpoint, store, "--nproc", "3")
    assert code == 0, said
    assert document["written"] == 24 - there
    assert contents(store) == contents(whole)


@pytest.mark.parametrize("words", [(), ("--nproc", "2")], ids=str)
def test_sigterm_finishes_the_chunk_that_is_being_written(words, checkpoint, whole, store):  # noqa: F811
    code, document, said, _ = command(checkpoint, store, *words, kill_at="term:3")
    assert code == 143, said
    assert "Traceback" not in said
    if not words:
        assert document == {
            "error": f"stopped; the finished images are in {store}: the same command goes on",
            "exit_code": 143,
        }
    there = chunks_there(store)
    assert there >= 3
    assert not [p for p in store.rglob("*") if p.suffix in (".partial", ".tmp") or p.name == ".lock"]
    writer = open_writer(store)
    assert writer.chunks.index(writer.missing()[0]) >= 3  # the third was being written
    code, document, said, _ = command(checkpoint, store)
    assert (code, document.get("written")) == (0, 24 - there), said
    assert contents(store) == contents(whole)


def test_a_full_disk_is_named_and_leaves_the_finished_chunks(checkpoint, whole, tmp_path):  # noqa: F811
    """On a file system of its own, which is then made larger; without the right to mount one, by a limit on file sizes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        store = empty(checkpoint, disk / "f.zarr", tmp_path)
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        if mounted:  # room for about ten chunks
            (disk / "ballast").write_bytes(bytes(room - 80 * 1024))
        code, document, said, _ = command(checkpoint, store, limit="" if mounted else "ulimit -f 4")
        assert code == 1
        assert "Traceback" not in said
        assert document["error"].startswith(f"{store}: cannot be written: ")
        assert ("No space left on device" if mounted else "File too large") in document["error"]
        assert "finished chunks stay good" in document["error"]
        assert "same pipeline dump-features command again" in document["error"]
        there = chunks_there(store)
        assert not mounted or 0 < there < 24
        if mounted:
            (disk / "ballast").unlink()
        code, document, said, _ = command(checkpoint, store)
        assert (code, document.get("written")) == (0, 24 - there), said
        assert contents(store) == contents(whole)
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_second_dump_into_the_same_store_is_refused_while_the_first_lives(checkpoint, store, tmp_path):  # noqa: F811
    from pipeline.backbone.checkpoint import load_checkpoint
    from pipeline.dump import dump_features

    seen = []

    def meanwhile(done, total, note):
        if not seen:
            seen.append(command(checkpoint, store))

    assert (store / ".lock").exists()  # of a process that was killed: it keeps nobody out
    backbone = load_checkpoint(checkpoint)
    dump_features(backbone, backbone.config, out=store, device="cpu", report=meanwhile)
    ((code, document, said, _),) = seen
    assert code == 3
    assert document["error"].startswith(f"{store}: another process is writing it (process {os.getpid()} on ")
    assert "wait for it or stop it" in said
    assert open_cache(store).digest
