"""A dump killed at any moment, on any rank, goes on to the store of a dump that nobody disturbed."""

import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache import CacheError, open_cache
from pipeline.backbone.train import train_backbone
from pipeline.config import find_config, load_config
from tests import ranks

SETTINGS = ["backbone.epochs=1", "dump.views=3", "dump.batch_size=32", "data.workers=0"]
WHEN = ("before", "within", "after")
CHUNKS = 24  # five of each training view, three of validation, six of test


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = load_config(find_config("digits-lt"), SETTINGS)
    return train_backbone(config, out=tmp_path_factory.mktemp("backbone")).checkpoint


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    """The undisturbed store of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert ranks.dump(checkpoint, folder / "f.zarr", scratch=folder).codes == [0]
    return folder / "f.zarr"


def contents(store: Path) -> dict[str, bytes]:
    """Every file, leftovers included, but the root metadata, which say when and by what command they were made."""
    files = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    del files["zarr.json"]
    return files


def chunk_rows(whole: Path) -> dict[str, int]:
    """File of each chunk of features → its samples."""
    cache = open_cache(whole)
    chunks = [
        chunk for split in cache.splits for view in range(cache.views(split)) for chunk in cache.chunks(split, view)
    ]
    return {f"{chunk.array}/{chunk.key}": chunk.rows for chunk in chunks}


@dataclass(frozen=True)
class Kill:
    """When which rank of how many dies, and how many go on."""

    at: str
    rank: int
    world: int
    then: int

    def __str__(self) -> str:
        return f"{self.at}@{self.rank} of {self.world} then {self.then}"


def storm() -> list[Kill]:
    """Twenty moments, drawn once: each kind in turn, first on a rank of its own choice, then around the seal."""
    random = np.random.default_rng(2020)
    kills = []
    for n in range(17):
        world = 1 + n % 3
        rank = int(random.integers(world))
        chunk = int(random.integers(1, CHUNKS // world + 1))
        kills.append(Kill(f"{WHEN[n // 3 % 3]}:{chunk}", rank, world, int(random.integers(1, 5))))
    assert {(kill.at.partition(":")[0], kill.rank > 0) for kill in kills} == {
        (w, r) for w in WHEN for r in (False, True)
    }
    assert {(2, 1), (2, 3)} <= {(kill.world, kill.then) for kill in kills}
    return kills + [Kill(f"{when}:seal", 0, 1 + n % 2, 2 - n % 2) for n, when in enumerate(WHEN)]


@pytest.mark.slow
@pytest.mark.parametrize("kill", storm(), ids=str)
def test_a_dump_killed_at_any_moment_goes_on_to_the_same_store(kill, checkpoint, whole, tmp_path):
    store, of_chunk = tmp_path / "f.zarr", chunk_rows(whole)
    died = ranks.dump(checkpoint, store, ranks=kill.world, kill_at=f"{kill.at}@{kill.rank}", scratch=tmp_path)
    assert died.codes[kill.rank] == -(signal.SIGXFSZ if "within" in kill.at else signal.SIGKILL)
    assert all(died.codes)  # whoever is left ends too, and not well
    if kill.at == "after:seal":
        assert open_cache(store).digest == open_cache(whole).digest
    else:
        with pytest.raises(CacheError, match="did not finish"):
            open_cache(store)
    assert (store / ".lock").exists() == (kill.rank == 0)  # its owner died with it
    partly = [p.stat().st_size for p in [*store.rglob("*.partial"), *store.rglob(".zarr.json.*.tmp")]]
    assert [size > 0 for size in partly] == [True] * ("within" in kill.at)

    there = {name: (store / name).stat().st_mtime_ns for name in of_chunk if (store / name).exists()}
    assert all((store / name).read_bytes() == (whole / name).read_bytes() for name in there)  # none is there in part
    torn = sorted(there)[len(there) // 2] if there and "seal" not in kill.at else None
    if torn:  # as a file system may leave it where the machine died too
        (store / torn).write_bytes((store / torn).read_bytes()[:-9])
        del there[torn]

    after = ranks.dump(checkpoint, store, ranks=kill.then, scratch=tmp_path)
    assert after.codes == [0] * kill.then
    assert after.encoded == sum(n for name, n in of_chunk.items() if name not in there)
    assert {said["written"] for said in after.said} == {CHUNKS - len(there)}
    assert {name: (store / name).stat().st_mtime_ns for name in there} == there
    left = contents(store)
    if kill.at == "after:seal":  # there was nothing to write, and a store may be somebody else's: nothing is tidied
        assert left.pop(".lock")
    assert left == contents(whole)
    assert open_cache(store).digest == open_cache(whole).digest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_writes_the_same_bytes(world, checkpoint, whole, tmp_path):
    done = ranks.dump(checkpoint, tmp_path / "f.zarr", ranks=world, scratch=tmp_path)
    assert done.codes == [0] * world
    assert done.encoded == sum(chunk_rows(whole).values())
    assert contents(tmp_path / "f.zarr") == contents(whole)
    assert {said["digest"] for said in done.said if said["digest"]} == {open_cache(whole).digest}


def test_a_kill_within_a_chunk_of_the_second_rank(checkpoint, whole, tmp_path):
    """One of the storm for every day."""
    test_a_dump_killed_at_any_moment_goes_on_to_the_same_store(
        Kill("within:5", rank=1, world=2, then=3), checkpoint, whole, tmp_path
    )


@pytest.mark.slow
def test_killed_again_and_again_by_other_numbers_of_ranks(checkpoint, whole, tmp_path):
    store = tmp_path / "f.zarr"
    moments = ((1, "within:3"), (1, "after:2"), (2, "before:2@1"), (4, "within:1@3"), (1, "term:1"), (1, "within:seal"))
    for world, at in moments:
        assert any(ranks.dump(checkpoint, store, ranks=world, kill_at=at, scratch=tmp_path).codes)
    assert ranks.dump(checkpoint, store, ranks=2, scratch=tmp_path).codes == [0, 0]
    assert contents(store) == contents(whole)
