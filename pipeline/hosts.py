"""The hosts of a job, the endpoint where they meet, and the address and network interface of this host."""

import fcntl
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field

from pipeline.errors import ConfigError, PipelineError

TOLD = "PIPELINE_TOLD"  # names the file into which a worker writes the exit code of an error that it has printed
PORT = 29400  # torchrun's own default
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


@dataclass(frozen=True)
class Job:
    """The workers of a job and where its hosts meet.

    Arguments:
        nproc: workers on each host.
        nodes: (fewest, most) hosts.
        endpoint: (host, port) where they meet; None for a single host.
        name: distinguishes jobs that meet at the same endpoint.
        restarts: of all workers after one is lost.
        conf: torch's rendezvous settings, mostly in seconds.
    """

    nproc: int = 1
    nodes: tuple[int, int] = (1, 1)
    endpoint: tuple[str, int] | None = None
    name: str | None = None
    restarts: int = 0
    conf: dict[str, int] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        return self.nodes != (1, 1)

    @property
    def patience(self) -> int:
        """Seconds in which the hosts must have come together."""
        return self.conf.get("join_timeout", 600)


@dataclass(frozen=True)
class Seat:
    """This host among the others; address is where they reach it, is_endpoint is True for the host where all meet."""

    address: str
    is_endpoint: bool

    @property
    def interface(self) -> str | None:
        """The network interface that has the address; None for IPv6 and where the system does not say."""
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    request = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                    if socket.inet_ntoa(request[20:24]) == self.address:
                        return name
        return None


def meet(endpoint: tuple[str, int], *, patience: float, say: Callable[[str], None] = lambda text: None) -> Seat:
    """This host's seat, once the endpoint is this host or somebody answers there.

    PipelineError if nobody does within `patience` seconds, ConfigError where no address of this host is seen by others.
    """
    host, port = endpoint
    name, deadline, announced = f"{host}:{port}", time.monotonic() + patience, False
    while True:
        try:
            address, is_endpoint = _towards(host, port)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise PipelineError(
                    f"--rdzv-endpoint {name}: nobody answered within {patience:g} s ({error.strerror or error}); type the "
                    f"same command on {host} too (is the name right?), and let other hosts through to its port {port}"
                ) from error
            if not announced:
                say(f"waiting for {name}: the same command has to run there ({error.strerror or error})")
            announced = True
            time.sleep(min(1, patience / 4))
    if _is_loopback(address) and not _means_loopback(host):  # Debian lets a host's own name be 127.0.1.1
        address = _outward() or ""
        if not address:
            raise ConfigError(
                f"--rdzv-endpoint {name}: {host} means {socket.gethostbyname(host)} here, which no other host can reach; "
                f"give the address by which the others see it, such as 192.0.2.1:{port}"
            )
    return Seat(address, is_endpoint)


def _towards(host: str, port: int) -> tuple[str, bool]:
    """(own address on the way to host, whether host is this one); OSError while it neither is nor answers."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with closing(socket.socket(family, kind)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # not an address of this host, or another process of this job is there already
            probe.bind(address)
            return str(address[0]), True
    with closing(socket.socket(family, kind)) as probe:
        probe.settimeout(5)
        probe.connect(address)
        return str(probe.getsockname()[0]), False


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _means_loopback(host: str) -> bool:
    with suppress(ValueError):
        return _is_loopback(host)
    return host == "localhost"


def _outward() -> str | None:
    """This host's address on the network that leads out, None where there is none; nothing is sent."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # RFC 5737: nobody has this address
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if _is_loopback(address) else address


def in_worker() -> bool:
    """Return True where torchrun, of this program or of the user, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
