"""Death on purpose, as by `kill -9`, where PIPELINE_KILL_AT says: how tests prove that a dump survives it at any moment.

PIPELINE_KILL_AT=WHEN:WHAT[@RANK]: WHEN is before, within (its bytes partly on the disk) or after, or term for a SIGTERM
before; WHAT is the number, from 1, of a chunk among those that the rank writes, or seal; RANK is 0 unless given.
"""

import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import ConfigError


class KillPoint:
    """One moment of one rank, or none."""

    def __init__(self, armed: str | None, *, rank: int):
        """armed: PIPELINE_KILL_AT; made in the main thread, which alone may change what a signal does."""
        self._when, self._what = "", ""
        if not armed:
            return
        parts = re.fullmatch(r"(before|within|after|term):(\d+|seal)(?:@(\d+))?", armed)
        if parts is None:
            raise ConfigError(
                f"PIPELINE_KILL_AT={armed}: expected WHEN:WHAT[@RANK], for example within:3@1 or after:seal"
            )
        if int(parts[3] or 0) != rank:
            return
        self._when, self._what = parts[1], parts[2]
        if self._when == "within":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would see a write fail instead
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    @contextmanager
    def around(self, what: str, *, size: int) -> Iterator[None]:
        """Encloses the writing of something; size: bytes of its file, in the middle of which `within` falls."""
        when = self._when if what == self._what else ""
        if when == "before":
            _die()
        if when == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if when == "within":  # the kernel ends the process that writes beyond this, what it wrote so far stays
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        yield
        if when == "after":
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
