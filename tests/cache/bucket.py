"""A real S3 server on the loopback address, in a process of its own, and a bucket in it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Bucket:
    """Where the server listens, and the environment that leads there."""

    port: int
    name: str = "features"

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def s3_server() -> Iterator[Bucket]:
    """A server with one empty bucket; it ends with its standard input."""
    import boto3

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVE], text=True, **pipes) as process:
        try:
            bucket = Bucket(int(process.stdout.readline()))
            client = boto3.client(
                "s3",
                endpoint_url=bucket.environment["AWS_ENDPOINT_URL"],
                aws_access_key_id="someone",
                aws_secret_access_key="secret",
                region_name="us-east-1",
            )
            client.create_bucket(Bucket=bucket.name)
            yield bucket
        finally:
            process.stdin.close()
            process.wait(10)
