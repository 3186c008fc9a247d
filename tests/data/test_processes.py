"""Processes that decode images end with the one they read for, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

READER = """
import multiprocessing, sys, time
import numpy as np, torch
from pathlib import Path
from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.transform import Loader, Transform

if __name__ == "__main__":
    files = FileNames(["0.png", "1.png"]).below(Path(sys.argv[1]))
    split = Split(labels=np.zeros(2, np.int64), ids=np.arange(2), stored=files)
    transform = Transform(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, augment="none")
    batches = Loader(split, transform, device=torch.device("cpu"), workers=2).batches([np.array([0]), np.array([1])])
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_process_leaves_no_loading_processes_behind(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    script = tmp_path / "reader.py"
    script.write_text(READER)
    command = [sys.executable, str(script), str(tmp_path)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert reader.stdout is not None
    workers = [int(pid) for pid in reader.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(is_alive, workers))
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
