"""How the processes that decode images start: each a fork of one that has imported all they need."""

import multiprocessing
from multiprocessing.context import BaseContext


def decoding_processes() -> BaseContext:
    """The way a DataLoader is to start its workers.

    Their common parent imports torch before the first starts, so that they share its pages and are there at once. It never
    uses torch: no threads, no CUDA, nothing a fork would break.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pipeline.data.transform"])
    return context
