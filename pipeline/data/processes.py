"""How the processes that decode images start: each a fork of one that has imported all they need."""

import atexit
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

WAIT_AFTER_SIGTERM = 20.0  # seconds; torchrun kills what is left after 30
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_started: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


def decoding_processes() -> BaseContext:
    """The way a DataLoader is to start its workers.

    Their common parent imports torch before the first starts, so that they share its pages and are there at once. It never
    uses torch: no threads, no CUDA, nothing a fork would break.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.forked", "__main__", "pipeline.data.transform"])
    return context


def started(files: "DataLoader[Any]") -> Iterator[Any]:
    """The batches of a DataLoader, its processes started so that a signal to all of a job ends none of them half-way.

    Waiting for their common parent may be broken off, starting them may not: torch would forget those that it had begun.
    """
    if not files.num_workers:
        return iter(files)
    ready = _server()
    before = set(multiprocessing.active_children())
    with _undisturbed():
        batches = iter(files)
        _started.update(set(multiprocessing.active_children()) - before)
    ready.join()
    return batches


@cache
def _server() -> BaseProcess:
    """Starts the common parent, which heeds no signals and ends with the last it serves; returns as soon as it serves."""
    resource_tracker.ensure_running()  # which would unblock them
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    atexit.register(_end_all, os.getpid())
    first = decoding_processes().Process(target=int, daemon=True)  # type: ignore[attr-defined]
    first.start()
    _started.add(first)
    return first


def _end_all(parent: int) -> None:
    """Before multiprocessing takes away at exit what processes that are still starting look for."""
    for process in list(_started) if os.getpid() == parent else ():
        process.kill()
        process.join()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that come meanwhile are heeded at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    before = {number: signal.signal(number, lambda sent, _: late.append(sent)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for sent in dict.fromkeys(late):
            signal.raise_signal(sent)


def end_with_parent(worker: int) -> None:
    """Ends this process when the one it reads for is gone; a DataLoader's own watchdog sees only the fork server live.

    And not before: a signal to all processes of a job (Ctrl-C, `timeout`, Slurm) is for the one that reads, which takes
    some more batches until it has saved what it did.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
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
