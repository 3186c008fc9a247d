"""Options that say where a command runs, and what they say when they cannot."""

import socket

import click
import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.cli.exit_codes import exit_code
from pipeline.cli.job import job_of, processes, without_job
from pipeline.errors import ConfigError, PipelineError
from pipeline.hosts import Job, Seat, meet


def job(*words, nproc=1):
    """What these options ask for."""
    found = []

    @click.command()
    @click.option("--overwrite", is_flag=True)
    @processes
    def command(overwrite, **others):
        found.append(job_of(click.get_current_context(), nproc=nproc))

    command.main(list(words), standalone_mode=False)
    return found[0]


def test_one_host_unless_said():
    assert job() == Job() == Job(1, (1, 1), None, None, 0, {})
    assert not job("--nnodes", "1", nproc=8).several
    assert job("--max-restarts", "2", nproc=8) == Job(8, restarts=2)


def test_several_hosts():
    words = ["--nnodes", "2", "--rdzv-endpoint", "host1"]
    assert job(*words, nproc=4) == Job(4, (2, 2), ("host1", 29400), None, 3, {})
    assert job("--nnodes", "1:4", "--rdzv-endpoint", "[2001:db8::1]:77").endpoint == ("2001:db8::1", 77)
    said = job(*words, "--rdzv-id", "a", "--max-restarts", "0", "--rdzv-conf", "join_timeout=9,last_call_timeout=2")
    assert (said.name, said.restarts, said.patience) == ("a", 0, 9)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nnodes", "2"], "--nnodes 2: the hosts need a place to meet.*--rdzv-endpoint HOST:29400"),
        (["--nnodes", "1:3"], "--nnodes 1:3: "),
        (["--nnodes", "1", "--rdzv-endpoint", "a:1"], "--rdzv-endpoint: for several hosts.*--nnodes 2"),
        (["--rdzv-id", "x", "--rdzv-conf", "join_timeout=1"], "--rdzv-id, --rdzv-conf: for several hosts"),
        (["--max-restarts", "1", "--overwrite"], "would start anew again.*--max-restarts 0"),
        (
            ["--nnodes", "1:2", "--rdzv-endpoint", "a", "--max-restarts", "0", "--overwrite"],
            "--max-restarts 0 --nnodes 2",
        ),
    ],
)
def test_options_that_do_not_fit(words, told):
    with pytest.raises(ConfigError, match=told):
        job(*words)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        *(
            ("--nnodes", value, "expected a number of hosts such as 2, or fewest:most")
            for value in ("0", "2:1", "a", "1:2:3")
        ),
        *(
            ("--rdzv-endpoint", value, "expected HOST:PORT such as host1:29400")
            for value in ("http://a:1", "a:b", "a:0", "a:70000", ":1", "a b")
        ),
        ("--rdzv-conf", "timeout", "any of join_timeout, last_call_timeout"),
        ("--rdzv-conf", "join_timeout=0", "whole numbers"),
    ],
)
def test_wrong_formats_are_usage_errors_that_show_a_right_one(option, value, told, capsys):
    assert exit_code(cli, ["train-backbone", option, value]) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")


def test_the_workers_get_the_same_command_without_where_it_runs():
    where = ["--nproc", "2", "--nnodes=1:2", "--rdzv-endpoint", "--nproc", "--rdzv-id=3", "--max-restarts", "3"]
    words = ["rebalance", "store", "--lam", "0.1", *where, "--seeds", "0", "--rdzv-conf", "join_timeout=3", "--json"]
    assert without_job(words) == ["rebalance", "store", "--lam", "0.1", "--seeds", "0", "--json"]


@pytest.mark.parametrize("command", ["run", "train-backbone", "dump-features", "rebalance"])
def test_help_has_them_in_a_group_of_their_own(command):
    shown = CliRunner().invoke(cli, [command, "--help"]).output
    options, _, hosts = shown.partition("Several hosts (")
    for option in ("--nnodes", "--rdzv-endpoint", "--rdzv-id", "--max-restarts", "--rdzv-conf"):
        assert option in hosts
        assert option not in options
    assert "--nproc" in options


def test_a_host_knows_its_seat():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        server.listen()
        assert meet(("127.0.0.1", port), patience=1) == Seat(
            "127.0.0.1", is_endpoint=False
        )  # somebody is there already
        seat = meet(("127.0.0.2", port), patience=1)
    assert seat == Seat("127.0.0.2", is_endpoint=True)
    assert Seat("127.0.0.1", is_endpoint=True).interface == "lo"
    assert Seat("203.0.113.1", is_endpoint=True).interface is None


def test_an_endpoint_where_nobody_is_says_what_to_type():
    said = []
    with pytest.raises(
        PipelineError, match=r"nowhere\.invalid:7: nobody answered within 0.2 s.*type the same command on"
    ):
        meet(("nowhere.invalid", 7), patience=0.2, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("waiting for nowhere.invalid:7: the same command has to run there")
