"""Start of the processes that decode images: each a fork of one that has imported all they need."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

WAIT_AFTER_SIGTERM = 20.0  # seconds; torchrun kills what is left after 30


def decoding_processes() -> BaseContext:
    """The way a DataLoader is to start its workers.

    Their common parent imports torch before the first starts, so that they share its pages and are there at once. It never
    uses torch: no threads, no CUDA, nothing a fork would break.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pipeline.data.transform"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit it: Ctrl-C is told by one process
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with_parent(worker: int) -> None:
    """Ends this process when the one it reads for is gone; a DataLoader's own watchdog sees only the fork server live.

    And not before: a signal to all processes of a job (Ctrl-C, `timeout`, Slurm) is for the one that reads, which takes
    some more batches until it has saved what it did.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    threading.Thread(target=_outlive_nobody, daemon=True).start()


def _end_later(number, frame) -> None:
    late = threading.Timer(WAIT_AFTER_SIGTERM, os._exit, [0])
    late.daemon = True
    late.start()


def _outlive_nobody() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
