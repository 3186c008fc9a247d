"""How the processes that decode images start: each a fork of one that has imported all they need."""

import multiprocessing
import os
import threading
from multiprocessing.context import BaseContext


def decoding_processes() -> BaseContext:
    """The way a DataLoader is to start its workers.

    Their common parent imports torch before the first starts, so that they share its pages and are there at once. It never
    uses torch: no threads, no CUDA, nothing a fork would break.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pipeline.data.transform"])
    return context


def end_with_parent(worker: int) -> None:
    """Ends this process when the one it reads for is gone; a DataLoader's own watchdog sees only the fork server live."""
    threading.Thread(target=_outlive_nobody, daemon=True).start()


def _outlive_nobody() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
