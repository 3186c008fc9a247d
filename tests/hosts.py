"""Two hosts: network namespaces with names and addresses of their own, or two loopback addresses of this one."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Host:
    """Where commands run: behind `enter`, which puts a process into the host."""

    name: str
    address: str
    enter: tuple[str, ...] = ()

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*self.enter, *command], env=given, text=True, **pipes)


def loopback() -> list[Host]:
    """Two addresses of this host: anybody may have them."""
    return [Host("127.0.0.1", "127.0.0.1"), Host("127.0.0.2", "127.0.0.2")]


@contextmanager
def two_hosts(*, as_debian: bool = False) -> Iterator[list[Host]]:
    """Two network namespaces joined by a cable, which know each other by name; `loopback` where they are not permitted.

    as_debian: a host's own name is 127.0.1.1 to itself, as Debian's installer writes it.
    """
    names = [f"iwb{os.getpid()}{end}" for end in "ab"]
    folders = [Path("/etc/netns", name) for name in names]
    try:
        try:
            _make(names, folders, as_debian=as_debian)
        except (subprocess.CalledProcessError, OSError) as error:
            print(
                f"no network namespaces here ({getattr(error, 'stderr', None) or error}): two loopback addresses instead"
            )
            yield loopback()
            return
        yield [Host(f"host{n}", f"192.0.2.{n}", _enter(name, f"host{n}")) for n, name in enumerate(names, 1)]
    finally:
        _remove(names, folders)


def _enter(namespace: str, name: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name)


def _make(names: list[str], folders: list[Path], *, as_debian: bool) -> None:
    cables = [_cable(name) for name in names]
    for number, (name, folder) in enumerate(zip(names, folders, strict=True), 1):
        known = {f"host{n}": f"192.0.2.{n}" for n in (1, 2)} | ({f"host{number}": "127.0.1.1"} if as_debian else {})
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("".join(f"{a} {n}\n" for n, a in {"localhost": "127.0.0.1", **known}.items()))
        _ip("netns", "add", name)
    _ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
    for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
        _ip("-n", name, "address", "add", f"192.0.2.{number}/24", "dev", cable)
        for device in ("lo", cable):
            _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "route", "add", "default", "dev", cable)


def _cable(name: str) -> str:
    return f"{name}0"[-15:]


def unplug(host: Host) -> None:
    """Takes the network from a namespace: nobody there or elsewhere is told."""
    name = host.enter[3]
    _ip("-n", name, "link", "set", _cable(name), "down")


def _remove(names: list[str], folders: list[Path]) -> None:
    for name, folder in zip(names, folders, strict=True):
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def torchrun(hosts: list[Host], port: int, *command: str, **environment: str) -> list[subprocess.Popen]:
    """One agent with one worker on each host; they find each other at a port of the first."""
    started = []
    for host in hosts:
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        run += ["--rdzv-backend", "c10d", "--rdzv-id", f"job{port}", "--rdzv-endpoint", f"{hosts[0].name}:{port}"]
        run += ["--local-addr", host.address] * (host.name == host.address)
        started.append(host.start(*run, *command, **environment))
    return started


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(run: subprocess.Popen, seconds: float = 240) -> str:
    """What a process said that has to end by itself."""
    try:
        return run.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        power_off(run)
        raise


def family(pid: int) -> list[int]:
    """A process and all that came from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(status.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def power_off(process: subprocess.Popen) -> None:
    """Kills all of a host's processes as at one moment: none sees another die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in family(process.pid):
            os.kill(pid, number)
    process.communicate()
