"""Options for the processes and hosts that a command runs on; the same command is typed on each host."""

import re
from collections.abc import Sequence
from typing import Any

import click

from pipeline.cli.options import EXECUTION, HOSTS, Option, count, device, option
from pipeline.errors import ConfigError
from pipeline.hosts import PORT, Job

RESTARTS = 3  # default on several hosts; on one host the default is 0
_META = "pipeline.cli.job"


class HostOption(Option):
    """An option of the group for several hosts; it is no parameter of the command's function, `job_of` reads it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, group=HOSTS, expose_value=False, callback=_store)


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    context.meta.setdefault(_META, {})[parameter.name] = value


class Nodes(click.ParamType):
    name = "nodes"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
        fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= fewest <= most:
            self.fail(f"{value}: expected a number of hosts such as 2, or fewest:most such as 1:4", param, ctx)
        return fewest, most


class Endpoint(click.ParamType):
    name = "endpoint"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int]:
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", str(value))
        port = int(match[2] or PORT) if match else 0
        if not match or not 0 < port < 65536:
            self.fail(f"{value}: expected HOST:PORT such as host1:{PORT} or 192.0.2.1:{PORT}", param, ctx)
        return match[1].strip("[]"), port


class RendezvousSettings(click.ParamType):
    name = "settings"
    keys = ("join_timeout", "last_call_timeout", "read_timeout", "keep_alive_interval", "keep_alive_max_attempt")

    def convert(self, value: Any, param: Any, ctx: Any) -> dict[str, int]:
        pairs = [part.partition("=")[::2] for part in str(value).split(",")]
        for name, number in pairs:
            if name not in self.keys or not re.fullmatch(r"[1-9]\d*", number):
                self.fail(f"{name}={number}: expected whole numbers for any of {', '.join(self.keys)}", param, ctx)
        return {name: int(number) for name, number in pairs}


def processes(command: Any) -> Any:
    """Add --nproc, --device and the options for several hosts, to commands that compute with them."""
    for decorator in reversed(
        (
            count("--nproc", "Processes on this host, one per GPU; torchrun starts them.", default=1, group=EXECUTION),
            device,
            option(
                "--nnodes", type=Nodes(), metavar="N|MIN:MAX", cls=HostOption,
                help="Number of hosts; between MIN and MAX, hosts may come and go.",
            ),
            option(
                "--rdzv-endpoint", type=Endpoint(), metavar="HOST:PORT", cls=HostOption,
                help="One of the hosts, where all meet.",
            ),
            option(
                "--rdzv-id", metavar="NAME", cls=HostOption, shown_default="made from the command typed",
                help="Name of the job, which keeps two jobs apart.",
            ),
            option(
                "--max-restarts", type=click.IntRange(0), cls=HostOption, shown_default=f"{RESTARTS}, on one host 0",
                help="Restarts of all processes after one is lost.", limits="0 or more",
            ),
            option(
                "--rdzv-conf", type=RendezvousSettings(), metavar="KEY=N,…", cls=HostOption,
                help="Timeouts in seconds, with torchrun's names.",
            ),
        )
    ):  # fmt: skip
        command = decorator(command)
    return command


def job_of(context: click.Context, *, nproc: int) -> Job:
    """Return the job that a command's options ask for; raise ConfigError where they do not fit together."""
    options: dict[str, Any] = context.meta.get(_META, {})
    nodes, endpoint, restarts = options.get("nnodes"), options.get("rdzv_endpoint"), options.get("max_restarts")
    fewest, most = nodes or (1, 1)
    several = most > 1
    if several and endpoint is None:
        raise ConfigError(
            f"--nnodes {_range_text(fewest, most)}: the hosts need a place to meet; type the same command on each host with "
            f"--rdzv-endpoint HOST:{PORT}, HOST being one of them"
        )
    if not several and (alone := [f"--{k}" for k in ("rdzv-endpoint", "rdzv-id", "rdzv-conf") if options.get(_key(k))]):
        raise ConfigError(f"{', '.join(alone)}: for several hosts; say how many, such as --nnodes 2")
    if restarts is None:
        restarts = RESTARTS if several else 0
    if context.params.get("overwrite") and (restarts or fewest < most):
        raise ConfigError(
            "--overwrite: processes that are started again would start anew again; type the command once with "
            f"--max-restarts 0{f' --nnodes {most}' if fewest < most else ''}, or delete what is there"
        )
    return Job(nproc, (fewest, most), endpoint, options.get("rdzv_id"), restarts, options.get("rdzv_conf") or {})


def without_job(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without the options for processes and hosts."""
    job_options = {"--nproc", "--nnodes", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--max-restarts"}
    remaining, value_follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if not value_follows and name not in job_options:
            remaining.append(word)
        value_follows = not value_follows and name in job_options and not equals
    return remaining


def _key(option: str) -> str:
    return option.replace("-", "_")


def _range_text(fewest: int, most: int) -> str:
    return f"{fewest}" if fewest == most else f"{fewest}:{most}"
