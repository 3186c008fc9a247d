"""The ranks of a dump as real processes, forked from one that has everything loaded: a job takes a second, not ten."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_ROWS = 75  # divided by neither the batch size nor the number of rows
PATIENCE = 60  # seconds; a rank that takes longer hangs

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preloaded"])


@dataclass
class Job:
    """What became of the ranks: exit codes (negative: the signal), images encoded and result of those that finished."""

    codes: list[int]
    seconds: float
    said: list[dict] = field(default_factory=list)

    @property
    def encoded(self) -> int:
        return sum(said["encoded"] for said in self.said)


def dump(checkpoint: Path, out: Path | str, *settings: str, ranks: int = 1, kill_at: str = "", scratch: Path) -> Job:
    """Dumps the checkpoint's own data in that many processes, killed where PIPELINE_KILL_AT says; nobody looks after them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports = [scratch / f"rank-{rank}.json" for rank in range(ranks)]
    for report in reports:
        report.unlink(missing_ok=True)
    started = time.monotonic()
    # the process they are forked from has the environment of its own start
    to_bucket = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    arguments = [
        (checkpoint, out, settings, rank, ranks, port, {**to_bucket, "PIPELINE_KILL_AT": kill_at}, reports[rank])
        for rank in range(ranks)
    ]
    processes = [_context.Process(target=_one_rank, args=of) for of in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0, started + PATIENCE - time.monotonic()))
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, "a rank hangs"
    said = [json.loads(report.read_text()) for report in reports if report.exists()]
    return Job([process.exitcode or 0 for process in processes], time.monotonic() - started, said)


def _one_rank(
    checkpoint: Path,
    out: Path | str,
    settings: Sequence[str],
    rank: int,
    world: int,
    port: int,
    environment: dict[str, str],
    report: Path,
) -> None:
    import torch

    import cache.layout
    from pipeline import dump
    from pipeline.backbone.checkpoint import load_checkpoint
    from pipeline.config import lay_over, make_config
    from pipeline.errors import PipelineError

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    torch.set_num_threads(1)
    cache.layout.CHUNK_ROWS = CHUNK_ROWS
    backbone = load_checkpoint(checkpoint)
    tree = backbone.config.model_dump(mode="json")
    for setting in settings:
        lay_over(tree, setting)
    encode, encoded = dump.encode, 0

    def counting(model, images):
        nonlocal encoded
        encoded += len(images)
        return encode(model, images)

    dump.encode = counting
    try:
        result = dump.dump_features(backbone, make_config(tree, "test"), out=out, device="cpu")
    except PipelineError as error:
        sys.exit(error.exit_code)
    report.write_text(json.dumps({"encoded": encoded, "written": result.written, "digest": result.digest}))
