"""Options that say on how many hosts a command runs; the hosts are told by the same command on each."""

import re
from collections.abc import Sequence
from typing import Any

import click

from pipeline.errors import ConfigError
from pipeline.hosts import PORT, Job

RESTARTS = 3  # of a job on several hosts; one host needs to be asked
GROUP = "Several hosts (the same command on each; docs/cluster.md)"
_META = "pipeline.cli.job"


class HostOption(click.Option):
    """An option that help shows in a group of its own; kept from the command's parameters, read by `job_of`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, expose_value=False, callback=_keep)


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    context.meta.setdefault(_META, {})[parameter.name] = value


class Nodes(click.ParamType):
    name = "nodes"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
        fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= fewest <= most:
            self.fail(f"{value}: expected a number of hosts such as 2, or fewest:most such as 1:4", param, ctx)
        return fewest, most


class Endpoint(click.ParamType):
    name = "endpoint"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int]:
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", str(value))
        port = int(found[2] or PORT) if found else 0
        if not found or not 0 < port < 65536:
            self.fail(f"{value}: expected HOST:PORT such as host1:{PORT} or 192.0.2.1:{PORT}", param, ctx)
        return found[1].strip("[]"), port


class Settings(click.ParamType):
    name = "settings"
    known = ("join_timeout", "last_call_timeout", "read_timeout", "keep_alive_interval", "keep_alive_max_attempt")

    def convert(self, value: Any, param: Any, ctx: Any) -> dict[str, int]:
        pairs = [part.partition("=")[::2] for part in str(value).split(",")]
        for name, number in pairs:
            if name not in self.known or not re.fullmatch(r"[1-9]\d*", number):
                self.fail(f"{name}={number}: expected whole numbers for any of {', '.join(self.known)}", param, ctx)
        return {name: int(number) for name, number in pairs}


def job_options(command: Any) -> Any:
    """--nnodes and what belongs to it."""
    for option in (
        click.option(
            "--rdzv-conf",
            type=Settings(),
            metavar="KEY=N,…",
            cls=HostOption,
            help="Patience in seconds, as torchrun's.",
        ),
        click.option(
            "--max-restarts",
            type=click.IntRange(0),
            cls=HostOption,
            help=f"Of all processes after one is lost [default: {RESTARTS}; on one host 0].",
        ),
        click.option(
            "--rdzv-id", metavar="NAME", cls=HostOption, help="Of the job [default: made from the command typed]."
        ),
        click.option(
            "--rdzv-endpoint", type=Endpoint(), metavar="HOST:PORT", cls=HostOption, help="One of them, where all meet."
        ),
        click.option(
            "--nnodes", type=Nodes(), metavar="N|MIN:MAX", cls=HostOption, help="How many; MIN:MAX may come and go."
        ),
    ):
        command = option(command)
    return command


def job_of(context: click.Context, *, nproc: int) -> Job:
    """The job that a command's options ask for; ConfigError where they do not fit together."""
    said: dict[str, Any] = context.meta.get(_META, {})
    nodes, endpoint, restarts = said.get("nnodes"), said.get("rdzv_endpoint"), said.get("max_restarts")
    fewest, most = nodes or (1, 1)
    several = most > 1
    if several and endpoint is None:
        raise ConfigError(
            f"--nnodes {_shown(fewest, most)}: the hosts need a place to meet; type the same command on each with "
            f"--rdzv-endpoint HOST:{PORT}, HOST being one of them"
        )
    if not several and (alone := [f"--{k}" for k in ("rdzv-endpoint", "rdzv-id", "rdzv-conf") if said.get(_key(k))]):
        raise ConfigError(f"{', '.join(alone)}: for several hosts; say how many, such as --nnodes 2")
    if restarts is None:
        restarts = RESTARTS if several else 0
    if context.params.get("overwrite") and (restarts or fewest < most):
        raise ConfigError(
            "--overwrite: processes that are started again would start anew again; type the command once with "
            f"--max-restarts 0{f' --nnodes {most}' if fewest < most else ''}, or delete what is there"
        )
    return Job(nproc, (fewest, most), endpoint, said.get("rdzv_id"), restarts, said.get("rdzv_conf") or {})


def without_job(words: Sequence[str]) -> list[str]:
    """The words of a command line less the options that say where it runs."""
    ours = {"--nproc", "--nnodes", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--max-restarts"}
    kept, value_follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if not value_follows and name not in ours:
            kept.append(word)
        value_follows = not value_follows and name in ours and not equals
    return kept


def _key(option: str) -> str:
    return option.replace("-", "_")


def _shown(fewest: int, most: int) -> str:
    return f"{fewest}" if fewest == most else f"{fewest}:{most}"
