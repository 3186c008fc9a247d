"""One job on two hosts under torchrun, into one store; one host dies, and one host alone finishes the work."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest

from cache import CacheError, locate, open_cache, verify
from pipeline.backbone.train import train_backbone
from pipeline.config import find_config, load_config
from tests.hosts import Host, ended, family, free_port, loopback, power_off, torchrun, two_hosts

SETTINGS = ["backbone.epochs=1", "dump.views=60", "dump.batch_size=16", "data.workers=0"]
CHUNKS = 62  # one of each training view, of validation and of test

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = load_config(find_config("digits-lt"), SETTINGS)
    return train_backbone(config, out=tmp_path_factory.mktemp("run") / "backbone").checkpoint


def dump_command(checkpoint: Path, store) -> list[str]:
    command = ["-m", "pipeline", "dump-features", "--checkpoint", str(checkpoint), "--out", str(store)]
    return [*command, "--device", "cpu", "--json"]


def alone(checkpoint: Path, store) -> dict:
    """What a dump by this host alone says."""
    run = Host("", "").start(sys.executable, *dump_command(checkpoint, store))
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    return json.loads(said[said.index("{\n") :])


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "f.zarr"
    assert alone(checkpoint, store)["chunks"] == CHUNKS
    return store


def content(where) -> dict[str, bytes]:
    place = locate(where)
    return {name: place.read(name)[0] for name in place.names() if name != "zarr.json"}


def there(where) -> set[str]:
    """The chunks of features that are there, whole."""
    return {
        name for name in locate(where).names() if "/features/c/" in name and not name.endswith((".partial", ".part"))
    }


def test_two_hosts_write_what_one_writes(checkpoint, whole, tmp_path):
    store = tmp_path / "f.zarr"
    with two_hosts() as hosts:
        runs = torchrun(hosts, free_port(), *dump_command(checkpoint, store))
        said = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum('"digest"' in one for one in said) == 1  # rank 0 alone speaks
    assert content(store) == content(whole)
    assert open_cache(store).digest == open_cache(whole).digest


def lose_a_host(hosts, checkpoint, store, *, owner: bool) -> str:
    """Kills the host that holds the store's lock, or the other, once both are writing; what the survivor says."""
    runs = torchrun(hosts, free_port(), *dump_command(checkpoint, store))
    deadline, before = time.monotonic() + 60, CHUNKS // 2
    while True:
        with contextlib.suppress(FileNotFoundError, CacheError):  # not there yet
            views = [int(name.split("/")[3]) for name in there(store) if name.startswith("train")]
            if min(views, default=before) < before - 2 and max(views, default=0) > before:
                break
        assert time.monotonic() < deadline, [ended(run, 5) for run in runs]
    content, _ = locate(store).read(".lock")
    process = int(content.split(b"process ")[1].split()[0])
    owns = [process in family(run.pid) for run in runs]
    assert sorted(owns) == [False, True]
    victim = runs[owns.index(owner)]
    power_off(victim)
    survivor = runs[1 - runs.index(victim)]
    said = ended(survivor)
    assert survivor.returncode != 0
    return said


def go_on_alone(checkpoint, whole, store) -> None:
    """One host finishes the store; nothing that was there is computed again."""
    with pytest.raises(CacheError, match="did not finish"):
        open_cache(store)
    kept = there(store)
    assert 0 < len(kept) < CHUNKS
    assert alone(checkpoint, store)["written"] == CHUNKS - len(kept)
    left = content(store)
    assert {name for name in left if name.startswith(".")} == set()
    assert left == content(whole)
    assert open_cache(store).digest == open_cache(whole).digest
    assert verify(store) == []


@pytest.mark.parametrize("owner", [True, False])
def test_a_host_dies_and_the_other_finishes_alone(owner, checkpoint, whole, tmp_path):
    store = tmp_path / "f.zarr"
    with two_hosts() as hosts:
        said = lose_a_host(hosts, checkpoint, store, owner=owner)
    assert "another process of this job ended without a word" in said
    go_on_alone(checkpoint, whole, store)


def test_a_host_dies_that_held_the_lease_of_a_bucket(checkpoint, whole, moto_bucket, monkeypatch):
    for name, value in moto_bucket.environment.items():
        monkeypatch.setenv(name, value)
    store = moto_bucket.url("hosts/f.zarr")
    lose_a_host(loopback(), checkpoint, store, owner=True)
    go_on_alone(checkpoint, whole, store)
