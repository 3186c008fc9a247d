"""Death on purpose, as by `kill -9`, where PIPELINE_KILL_AT says: how tests prove that work survives it at any moment.

PIPELINE_KILL_AT=WHEN:WHAT[@RANK]: WHEN is before, within (a file: its bytes partly on the disk) or after, or term for a
SIGTERM before; RANK is 0 unless given, or any. WHAT in a dump is the number, from 1, of a chunk among those that the rank writes,
or seal. In a training it is one of these, numbers from 1:
    data-N         waiting for the images of optimiser step N of the whole training
    update-N       using the gradients of that step
    step-N         that step
    validation-E   looking at the validation split after epoch E; before means after its first batch
    line-E         writing the epoch's line of metrics.jsonl
    best-E last-E  writing best.pt, last.pt
In a rebalance it is method-N, the file that keeps the Nth finished part of the work, or results, the writing of results.json.
"""

import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import ConfigError

_MOMENT = r"(?:data|update|step|validation|line|best|last|method)-\d+|results"


class KillPoint:
    """One moment of one rank, or none.

    It is made in the main thread, which alone may change what a signal does.

    Arguments:
        armed: the text of PIPELINE_KILL_AT.
    """

    def __init__(self, armed: str | None, *, rank: int):
        self._when, self._moment = "", ""
        if not armed or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # nobody dies twice in one job
            return
        parts = re.fullmatch(rf"(before|within|after|term):(\d+|seal|{_MOMENT})(?:@(\d+|any))?", armed)
        if parts is None:
            raise ConfigError(
                f"PIPELINE_KILL_AT={armed}: expected WHEN:WHAT[@RANK], for example within:3@1, after:seal or before:step-7"
            )
        if parts[3] != "any" and int(parts[3] or 0) != rank:
            return
        self._when, self._moment = parts[1], parts[2]
        if self._when == "within":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would see a write fail instead
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    @classmethod
    def from_environment(cls, *, rank: int) -> "KillPoint":
        """Return the moment that PIPELINE_KILL_AT names."""
        return cls(os.environ.get("PIPELINE_KILL_AT"), rank=rank)

    @contextmanager
    def around(self, moment: str, *, size: int = 0) -> Iterator[None]:
        """Die before, within or after the enclosed work; `within` falls in the middle of the `size` bytes that it writes."""
        self.before(moment)
        if (self._when, self._moment) == ("within", moment):  # the kernel ends the process that writes beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        yield
        self.after(moment)

    def before(self, moment: str) -> None:
        if moment != self._moment:
            return
        if self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._when == "term":
            os.kill(os.getpid(), signal.SIGTERM)

    def after(self, moment: str) -> None:
        if (self._when, self._moment) == ("after", moment):
            os.kill(os.getpid(), signal.SIGKILL)
