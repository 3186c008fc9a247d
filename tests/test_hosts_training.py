"""Training on two hosts: the numbers of one host, whatever dies, by a network that does not know its own names."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.backbone import checkpoint
from tests.conftest import digits_tree
from tests.hosts import Host, ended, family, free_port, power_off, two_hosts, unplug

PATIENCE = "join_timeout=120,last_call_timeout=2,keep_alive_interval=1"
IMPATIENT = """
import os
from pipeline import launch
from pipeline.cli import main
launch.SILENCE = int(os.environ["SILENCE"])
main()
"""
KILLED = {"PIPELINE_KILL_AT": "after:step-21@any"}  # in the fourth epoch of six, each of six steps

CONTINUED = re.compile("continuing after epoch [123]/6")  # not every short epoch is saved

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Digits and a network without batch normalisation, which sees the share of a rank."""
    tree = digits_tree(model="test_convnext", width=1, epochs=6, lr=0.01, batch_size=64)
    tree["data"] |= {"image_size": 32, "workers": 0}
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(host: Host, config: Path, out: Path, *words: str, **environment: str):
    program = ["-c", IMPATIENT] if "SILENCE" in environment else ["-m", "pipeline"]
    command = [*program, "train-backbone", str(config), "--out", str(out), "--device", "cpu", *words]
    return host.start(sys.executable, *command, **environment)


def on_both(hosts, config, out, *words: str, nodes: str = "2", second: dict[str, str] | None = None, **environment):
    """The same command on both hosts; second: what the environment of the second has besides."""
    meet = ["--nnodes", nodes, "--rdzv-endpoint", f"{hosts[0].name}:{free_port()}", "--rdzv-conf", PATIENCE, *words]
    return [
        train(host, config, out, *meet, **environment, **more)
        for host, more in zip(hosts, ({}, second or {}), strict=True)
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(out / "last.pt")["model"]


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Path:
    """Trained by two ranks of one host."""
    out = tmp_path_factory.mktemp("one") / "backbone"
    run = train(Host("", ""), config, out, "--nproc", "2")
    said = ended(run)
    assert run.returncode == 0, said
    return out


def assert_same(out: Path, undisturbed: Path, *, other_ranks: bool = False) -> None:
    """The same parameters; up to rounding where the number of ranks was another for a while."""
    epochs = [line.split(",")[0] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [f'{{"epoch": {n}' for n in range(1, 7)]
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if other_ranks else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights(out), weights(undisturbed), **tolerance)


def test_two_hosts_train_as_one(config, undisturbed, tmp_path):
    with two_hosts(as_debian=True) as hosts:
        runs = on_both(hosts, config, tmp_path / "b")
        said = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum("2 rank(s)" in one for one in said) == 1  # rank 0 alone speaks
    assert_same(tmp_path / "b", undisturbed)


def test_a_killed_worker_is_started_again_and_all_go_on(config, undisturbed, tmp_path):
    with two_hosts(as_debian=True) as hosts:
        runs = on_both(hosts, config, tmp_path / "b", second=KILLED)
        said = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum(bool(CONTINUED.search(one)) for one in said) == 1, said
    assert_same(tmp_path / "b", undisturbed)


def test_without_restarts_a_kill_ends_both_and_one_host_finishes_alone(config, undisturbed, tmp_path):
    with two_hosts(as_debian=True) as hosts:
        runs = on_both(hosts, config, tmp_path / "b", "--max-restarts", "0", second=KILLED)
        said = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [1, 1], said
    assert [one.count("Error") for one in said] == [1, 1], said
    assert "of this job was killed (SIGKILL" in said[1]
    assert "the same command goes on" in said[0]
    alone = train(Host("", ""), config, tmp_path / "b")
    assert CONTINUED.search(ended(alone))
    assert_same(tmp_path / "b", undisturbed, other_ranks=True)


def lose(hosts, config, out, *, lost: int):
    """Takes the network from one of two hosts that train; the other's process, ended, and what it said."""
    if not hosts[0].enter:
        pytest.fail("network namespaces are not permitted here: run this as root, or leave it out with --deselect")
    soon = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"} | ({} if lost else {"SILENCE": "5"})
    runs = on_both(hosts, config, out, nodes="1:2", **soon)
    deadline = time.monotonic() + 240
    while not (out / "last.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for pid in family(runs[lost].pid):
        os.kill(pid, signal.SIGSTOP)
    unplug(hosts[lost])
    said = ended(runs[1 - lost])
    power_off(runs[lost])
    return runs[1 - lost], said


def test_a_host_that_loses_its_network_is_noticed_and_the_other_goes_on(config, undisturbed, tmp_path):
    with two_hosts(as_debian=True) as hosts:
        run, said = lose(hosts, config, tmp_path / "b", lost=1)
    assert run.returncode == 0, said
    assert "all start again" in said
    assert "1 rank(s)" in said
    assert_same(tmp_path / "b", undisturbed, other_ranks=True)


def test_the_others_end_when_the_place_where_all_meet_is_gone(config, tmp_path):
    with two_hosts(as_debian=True) as hosts:
        run, said = lose(hosts, config, tmp_path / "b", lost=0)
    assert run.returncode == 1, said
    assert said.count("Error") == 1
    assert "where the hosts meet, does not answer" in said


def test_hosts_that_do_not_share_the_folder_are_refused(config, undisturbed, tmp_path):
    """As ranks that somebody else has started: the second host has no checkpoint."""
    soon = "from pipeline.backbone import training_dir; from pipeline.cli import main; training_dir.VISIBLE_WITHIN = 0.5; main()"
    command = ["-c", soon, "train-backbone", str(config), "--device", "cpu", "--out"]
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outs = [undisturbed, tmp_path / "other"]
    runs = [Host("", "").start(sys.executable, *command, str(o), **ranks, RANK=str(n)) for n, o in enumerate(outs)]
    said = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [2, 2], said
    assert "last.pt is not the same file on all hosts: rank 1 on" in said[0]
    assert "--out on a file system that they share" in said[0]
    assert "Error" not in said[1]
    assert not (tmp_path / "other").exists()
