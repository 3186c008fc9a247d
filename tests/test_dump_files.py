"""Dumping image files: the same bytes whatever reads them, and Ctrl-C that also reaches the processes which do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache import open_cache, open_writer
from tests.test_dump_kills import contents
from tests.test_unreadable import checkpoint, clean, dump, one_thread, settings, small_chunks, whole  # noqa: F401


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of machines with fewer cores
@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_loader_processes_gives_the_same_bytes(workers, clean, checkpoint, whole, tmp_path):  # noqa: F811
    config = settings(clean)
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    store = dump(checkpoint, config, tmp_path / "f.zarr").store
    assert contents(store) == contents(whole)
    assert open_cache(store).digest == open_cache(whole).digest


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_keeps_the_finished_chunks(checkpoint, tmp_path):  # noqa: F811
    """The terminal sends it to the loader processes too; that they end must not be taken for a failure."""
    store = tmp_path / "f.zarr"
    command = [sys.executable, "-m", "pipeline", "dump-features", "--checkpoint", str(checkpoint), "--out", str(store)]
    command += ["--views", "400", "--set", "data.workers=2", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and len(list(store.glob("train/features/c/*/0/0"))) < 5:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == f"stopped; the finished images are in {store}: the same command goes on"
    assert "Traceback" not in said
    there = len(list(store.glob("train/features/c/*/0/0")))
    assert 5 <= there < 400
    assert len(open_writer(store).missing()) == 402 - there
    assert not (store / ".lock").exists()
