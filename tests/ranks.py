"""The ranks of a dump or a training as real processes, forked from one that has everything loaded: a second, not ten."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_ROWS = 75  # divided by neither the batch size nor the number of rows
PATIENCE = 120  # seconds; a rank that takes longer hangs

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preloaded"])


@dataclass
class Job:
    """What became of the ranks: exit codes (negative: the signal), and what those said that ended by themselves."""

    codes: list[int]
    seconds: float
    said: list[dict] = field(default_factory=list)

    @property
    def encoded(self) -> int:
        return sum(said.get("encoded", 0) for said in self.said)


def dump(checkpoint: Path, out: Path | str, *settings: str, ranks: int = 1, kill_at: str = "", scratch: Path) -> Job:
    """Dumps the checkpoint's own data in that many processes, killed where PIPELINE_KILL_AT says; nobody looks after them."""
    return _job(_dump, (checkpoint, out, settings), ranks=ranks, kill_at=kill_at, scratch=scratch)


def train(
    tree: dict, out: Path, *, ranks: int = 1, kill_at: str = "", scratch: Path, hosts: Sequence[Path] = ()
) -> Job:
    """Trains a configuration into a folder likewise; what each rank said is its error, or how many epochs it trained.

    hosts: the folder of each rank, where they share none.
    """
    return _job(_train, (tree, hosts or [out] * ranks), ranks=ranks, kill_at=kill_at, scratch=scratch)


def _job(work: Callable, arguments: tuple, *, ranks: int, kill_at: str, scratch: Path) -> Job:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports = [scratch / f"rank-{rank}.json" for rank in range(ranks)]
    for report in reports:
        report.unlink(missing_ok=True)
    started = time.monotonic()
    # the process they are forked from has the environment of its own start
    to_bucket = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment = {**to_bucket, "PIPELINE_KILL_AT": kill_at, "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    processes = [
        _context.Process(target=_one_rank, args=(work, arguments, rank, environment, report))
        for rank, report in enumerate(reports)
    ]
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


def _one_rank(work: Callable, arguments: tuple, rank: int, environment: dict[str, str], report: Path) -> None:
    import torch

    from pipeline.errors import PipelineError

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", **environment}
    torch.set_num_threads(1)
    try:
        report.write_text(json.dumps(work(*arguments)))
    except PipelineError as error:
        report.write_text(json.dumps({"error": str(error)}))
        sys.exit(error.exit_code)


def _dump(checkpoint: Path, out: Path | str, settings: Sequence[str]) -> dict:
    import cache.layout
    from pipeline import dump
    from pipeline.backbone import encoder
    from pipeline.backbone.checkpoint import load_checkpoint
    from pipeline.config import apply_setting, make_config

    cache.layout.CHUNK_ROWS = CHUNK_ROWS
    backbone = load_checkpoint(checkpoint)
    tree = backbone.config.model_dump(mode="json")
    for setting in settings:
        apply_setting(tree, setting)
    encode, encoded = encoder.encode, 0

    def counting(model, images):
        nonlocal encoded
        encoded += len(images)
        return encode(model, images)

    encoder.encode = counting
    result = dump.dump_features(backbone, make_config(tree, "test"), out=out, device="cpu")
    return {"encoded": encoded, "written": result.written, "digest": result.digest}


def _train(tree: dict, folders: Sequence[Path]) -> dict:
    from pipeline.backbone import train
    from pipeline.backbone import training_dir as folder
    from pipeline.config import make_config

    train.SAVING_SHARE = float("inf")  # every epoch is saved, however long that takes
    folder.VISIBLE_WITHIN = 0.1
    notes: list[str] = []
    result = train.train_backbone(
        make_config(tree, "test"),
        out=folders[int(os.environ["RANK"])],
        device="cpu",
        report=lambda event: notes.extend(getattr(event, "notes", ())),
    )
    return {"trained_epochs": result.trained_epochs, "notes": notes}
