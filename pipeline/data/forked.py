"""Imported where processes that decode images are forked from, and there alone: those left alone at once end silently."""

import sys
from multiprocessing import synchronize
from types import TracebackType


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An uncaught error, but for those of a process whose parent has gone before it could hand over what to do."""
    last = trace
    while last and last.tb_next:
        last = last.tb_next
    where = last.tb_frame.f_code.co_filename if last else ""
    taken_away = isinstance(error, FileNotFoundError) and where == synchronize.__file__  # semaphores
    if not (taken_away or isinstance(error, EOFError)):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell
