"""Signals as terminals, `timeout` and Slurm send them: to every process of a job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import distributed
from pipeline.backbone import checkpoint
from pipeline.distributed import Obeyed, Signals
from pipeline.errors import Terminated
from tests import ranks
from tests.conftest import digits_tree

ROOT = Path(__file__).parents[2]


def _noted():
    with Signals() as signals:
        with signals.obeyed():
            assert not signals.received
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # a second one soon after is the same, sent twice
        assert (signals.received, signals.exit_code) == (signal.SIGTERM, 143)
        with pytest.raises(Obeyed), signals.obeyed():
            raise AssertionError("the signal was there before")


def _interrupted():
    with Signals() as signals, pytest.raises(Obeyed), signals.obeyed():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("work", "exit_code"), [(_noted, 143), (_interrupted, 130)])
def test_a_signal_is_noted_obeyed_where_that_is_asked_and_not_forgotten_at_the_end(work, exit_code):
    with pytest.raises(Terminated) as ended:
        work()
    assert ended.value.exit_code == exit_code


def _signalled_twice():
    distributed.AGAIN_AFTER = 0.2
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)


def test_a_second_signal_ends_at_once():
    process = ranks._context.Process(target=_signalled_twice)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A configuration of many epochs over image files, read by two processes a rank."""
    folder = tmp_path_factory.mktemp("files")
    for split, count in (("train", 40), ("val", 4)):
        for label in range(3):
            images = folder / "images" / split / f"class {label}"
            images.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 80, (20, 24, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(images / f"{i}.png")
    tree = digits_tree(epochs=5000, batch_size=16, lr=0.01)
    tree["data"] = {"source": "folder", "path": str(folder / "images"), "image_size": 16, "workers": 2}
    (folder / "files.yaml").write_text(yaml.safe_dump(tree))
    return folder / "files.yaml"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words", "number", "code"),
    [
        ((), (), signal.SIGTERM, 143),
        ((), ("--nproc", "2"), signal.SIGINT, 130),
        (TORCHRUN, (), signal.SIGTERM, None),  # torchrun's own code
    ],
    ids=["alone", "nproc", "torchrun"],
)
def test_a_signal_to_the_whole_job_saves(program, words, number, code, files, tmp_path):
    command = [sys.executable, *program, "-m", "pipeline", "train-backbone", str(files), "--device", "cpu"]
    job = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "out" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        before = checkpoint.read(tmp_path / "out" / "last.pt")["epoch"]
        time.sleep(1)
        os.killpg(job.pid, number)
        _, said = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert code is None or job.returncode == code, said
    assert "the same command continues" in said
    state = checkpoint.read(tmp_path / "out" / "last.pt")
    assert (state["epoch"], state["step_in_epoch"]) > (before, 0)
    assert not (tmp_path / "out" / ".lock").exists()
