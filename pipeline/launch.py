"""Workers on this host and others: torchrun inside, and what went wrong said in this program's words.

Workers of which one was killed are started again, all of them, and go on from what is finished; an error that a worker has
told ends the job. A host that goes away without a word is noticed by its missing heartbeat.
"""

import hashlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline.console import Talk
from pipeline.errors import INTERRUPTED, OK, TERMINATED, PipelineError
from pipeline.hosts import TOLD, Job, Seat, meet
from pipeline.resources import usable_cores

SILENCE = 30  # seconds without an answer after which the host where all meet is taken for lost
SAME_AGAIN = "what is finished is kept and the same command goes on"


def launch(job: Job, arguments: Sequence[str]) -> int:
    """Run `python -m pipeline ARGUMENTS` in the workers of a job on this host; return their exit code.

    Raises PipelineError for what no worker could tell: it was killed, or another host is gone, closed the job, or never came.
    """
    silent, environment = logging.root.manager.disable, dict(os.environ)
    try:
        return _launch(job, arguments)
    finally:  # what workers were to inherit is not for the other processes that this one may start
        logging.disable(silent)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


def _launch(job: Job, arguments: Sequence[str]) -> int:
    logging.disable(logging.ERROR)  # torchrun's own words; the worker that failed has said why
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // job.nproc)))
    talk = Talk()
    seat = meet(job.endpoint, patience=job.patience, say=talk.say) if job.endpoint else Seat("127.0.0.1", True)
    host, port = job.endpoint or ("127.0.0.1", 0)  # a container may not know its own name
    if job.several and seat.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", seat.interface)  # else it takes what the host's own name means
    # workers that start again must not meet in the store of those before, which has their addresses
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    rendezvous_handler_registry.register(Watched.name, Watched)
    with ExitStack() as at_end:
        code_file = Path(at_end.enter_context(tempfile.TemporaryDirectory())) / "exit_code"
        os.environ[TOLD] = str(code_file)
        config = LaunchConfig(
            min_nodes=job.nodes[0],
            max_nodes=job.nodes[1],
            nproc_per_node=job.nproc,
            run_id=job.name or _name(job, arguments),
            rdzv_backend=Watched.name,
            rdzv_endpoint=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            rdzv_configs={"is_host": seat.is_endpoint, "told": code_file, "talk": talk, "at_end": at_end, **job.conf},
            local_addr=seat.address,
            max_restarts=job.restarts,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "pipeline", *arguments)
        except Told as end:
            return end.exit_code
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            if code_file.exists():
                return int(code_file.read_text())
            if TERMINATED in codes.values() or INTERRUPTED in codes.values():
                return max(codes.values())
            raise PipelineError(f"{_died(codes)}; {SAME_AGAIN}") from error
        except SignalException as error:
            return INTERRUPTED if error.sigval == signal.SIGINT else TERMINATED
        except RendezvousClosedError as error:
            raise PipelineError(f"another host has ended this job and says why; {SAME_AGAIN}") from error
        except RendezvousTimeoutError as error:
            raise PipelineError(_too_few(job)) from error
        except RendezvousConnectionError as error:
            raise PipelineError(
                f"{host}:{port}, where the hosts meet, does not answer: that host is gone, or another program has its port; "
                f"{SAME_AGAIN} (with the --rdzv-endpoint of a host that is there)"
            ) from error
    return OK


class Told(Exception):
    """A worker has printed an error; started again it would print the same."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class Watched(RendezvousHandler):
    """torch's c10d rendezvous, by which a host whose heartbeat is missing changes the membership as one that comes does.

    Without it workers wait in a collective for a host that lost its power or network until TCP gives up, or for a day.
    """

    name = "c10d-watched"

    def __init__(self, parameters: RendezvousParameters):
        self._told: Path = parameters.config.pop("told")
        self._talk: Talk = parameters.config.pop("talk")
        at_end: ExitStack = parameters.config.pop("at_end")
        self._handler = _c10d(parameters)
        self._hosts, self._reason = 0, ""
        self._listener: Listener | None = None
        at_end.callback(self._listen_no_more)  # a thread inside torch when Python ends would abort the process

    def next_rendezvous(self) -> RendezvousInfo:
        if self._told.exists():
            raise Told(int(self._told.read_text()))
        if self._listener:
            self._listener.end()
            self._talk.say(f"{self._reason or 'a process was lost'}: all start again and go on from what is finished")
        try:
            info = self._handler.next_rendezvous()
        except RendezvousGracefulExitError as error:  # a host more than the job takes
            raise Told(OK) from error
        self._hosts, self._reason = info.world_size, ""
        self._listener = Listener(self._handler)
        return info

    def num_nodes_waiting(self) -> int:
        assert self._listener is not None
        waiting, present = self._listener.heard()
        missing = 0 if present is None else self._hosts - present
        if missing > 0:
            self._reason = f"{missing} of {self._hosts} hosts left, or lost a process"
        elif waiting:
            self._reason = "another host is there"
        return max(waiting, missing)

    def shutdown(self) -> bool:
        return self._listen_no_more() and self._handler.shutdown()  # unless nobody is there to be told

    def _listen_no_more(self) -> bool:
        """Ask no more; return True where the last question, if any, was answered."""
        try:
            if self._listener:
                self._listener.end()
        except RendezvousConnectionError:
            return False
        self._handler._stop_heartbeats()
        return True

    def get_backend(self) -> str:
        return self.name

    @property
    def use_agent_store(self) -> bool:
        return self._handler.use_agent_store

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        self._handler.set_closed()

    def get_run_id(self) -> str:
        return self._handler.get_run_id()


class Listener:
    """Asks the place where all meet how things stand, in a thread: a question to a host that is gone never returns."""

    def __init__(self, handler: DynamicRendezvousHandler):
        self._handler = handler
        self._heard_at, self._waiting, self._there = time.monotonic(), 0, None  # type: float, int, int | None
        self._failure: RendezvousError | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="rendezvous", daemon=True)
        self._thread.start()

    def heard(self) -> tuple[int, int | None]:
        """(hosts that wait to join, hosts that take part); RendezvousConnectionError after SILENCE seconds without an answer."""
        if self._failure:
            raise self._failure
        if time.monotonic() - self._heard_at > SILENCE:
            raise RendezvousConnectionError(f"no answer within {SILENCE} s")
        return self._waiting, self._there

    def end(self) -> None:
        """Asks no more, so that somebody else may; RendezvousConnectionError where the last answer does not come."""
        self._ending.set()
        self._thread.join(max(0, self._heard_at + SILENCE - time.monotonic()))
        if self._thread.is_alive():
            raise RendezvousConnectionError(f"no answer within {SILENCE} s")

    def _ask(self) -> None:
        while not self._ending.wait(0.5):
            try:
                waiting = self._handler.num_nodes_waiting()
            except RendezvousError as error:
                self._failure = error
                return
            state = self._handler._state_holder.state  # torch shows nowhere else who takes part
            self._waiting, self._there = waiting, None if state.closed else len(state.participants)
            self._heard_at = time.monotonic()


def _c10d(parameters: RendezvousParameters) -> DynamicRendezvousHandler:
    try:
        backend, store = create_backend(parameters)
    except RendezvousConnectionError:
        if not parameters.config["is_host"]:
            raise
        parameters.config["is_host"] = False  # another process of this host was quicker
        backend, store = create_backend(parameters)
    return create_handler(store, backend, parameters)


def _name(job: Job, arguments: Sequence[str]) -> str:
    """A name that is the same on every host where the same command is typed."""
    return hashlib.sha256("\0".join([str(job.nodes), *arguments]).encode()).hexdigest()[:16]


def _died(codes: dict[int, int]) -> str:
    """Return how the workers of this host ended, by rank; the cause before those that it took along."""
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    for rank, number in killed.items():
        by = signal.Signals(number).name if number in signal.Signals._value2member_map_ else f"signal {number}"
        memory = ", often the system short of memory" if number == signal.SIGKILL else ""
        return f"rank {rank} of this job was killed ({by}{memory})"
    return "a process of this job ended without a word, or its host is gone"


def _too_few(job: Job) -> str:
    fewest, most = job.nodes
    hosts = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"fewer than {hosts} hosts came together within {timedelta(seconds=job.patience)}; type the very same command on each "
        "(or name the job: --rdzv-id NAME), or go on with fewer: --nnodes"
    )
