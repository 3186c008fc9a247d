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

LOSING = """
import _multiprocessing, os
from multiprocessing import forkserver
from pipeline.data.processes import decoding_processes

if __name__ == "__main__":
    context = decoding_processes()
    context.set_forkserver_preload(["pipeline.data.forked"])
    status, data = forkserver.connect_to_new_process([])
    os.close(data)
    forkserver.read_signed(status)
    lock = context.Lock()
    _multiprocessing.sem_unlink(lock._semlock.name)
    late = context.Process(target=print, args=(lock,))
    late.start()
    late.join()
    print(late.exitcode, flush=True)
    os._exit(0)
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


def test_a_process_whose_parent_has_gone_before_it_began_ends_silently(tmp_path):
    (tmp_path / "losing.py").write_text(LOSING)
    ended = subprocess.run(
        [sys.executable, tmp_path / "losing.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert ended.stdout == "1\n", ended.stderr
    assert "Traceback" not in ended.stderr
