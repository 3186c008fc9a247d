"""Ranks and devices: with pipeline.launch the only user of torch.distributed besides DDP itself."""

import datetime
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pipeline.errors import INTERRUPTED, TERMINATED, ConfigError, Elsewhere, Lost, PipelineError, Terminated
from pipeline.resources import ROOT, usable_cores

GO_ON, SAVE, STOP = 0, 1, 2
WAIT = datetime.timedelta(days=1)  # ranks wait for the slowest one; torchrun ends those whose fellow died
JOIN = datetime.timedelta(minutes=10)  # in which processes that torchrun has not started must have come together
CROWD = 4  # processes a core: slow, but some try on a laptop what is to run on a cluster
AGAIN_AFTER = 2.0  # seconds; torchrun, `timeout` and Ctrl-C in a terminal all send the same signal twice

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        self.largest(0)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Element-wise sum over ranks, float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        """The largest value any rank passes."""
        return int(self._reduce(np.array([value]), dist.ReduceOp.MAX)[0])

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over ranks, in place, on whatever device and in whatever precision it is."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def take_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors by those of rank 0, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank; anything that pickles."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, make: Callable[[], T]) -> T:
        """Return the result of make() on this rank. Where it raises PipelineError on any rank, the lowest such rank raises it and
        the others raise Elsewhere, so that nobody waits for the dead and the reason is said once."""
        failure: PipelineError | None = None
        try:
            result = make()
        except PipelineError as error:
            failure = error
        culprit = self.world - self.largest(self.world - self.rank if failure else 0)
        code = self.largest(failure.exit_code if failure else 0)
        if failure is not None and culprit == self.rank:
            raise failure
        if culprit < self.world:
            raise Elsewhere(code)
        return result

    def _reduce(self, values: np.ndarray, operation) -> np.ndarray:
        if self.world == 1:
            return np.asarray(values, dtype=np.float64)
        tensor = torch.tensor(np.asarray(values, dtype=np.float64))
        dist.all_reduce(tensor, operation)
        return tensor.numpy()


def choose_device(name: str = "auto") -> torch.device:
    """cuda where there is one, else cpu; under torchrun each local rank takes its own GPU. ConfigError if it is not there."""
    if name == "auto" and (reason := unusable_gpu()):
        raise ConfigError(f"{reason}; or go on without it: --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: no CUDA device here; take --device cpu")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"--device {name}: there are {torch.cuda.device_count()} GPUs; use --nproc of at most that many"
            )
        device = torch.device("cuda", index)
    elif device.type != "cpu":
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    return device


def unusable_gpu() -> str:
    """Return the reason why a GPU of this host cannot be used, mostly a driver older than torch's CUDA; empty where none is."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    nodes = sorted(ROOT.glob("dev/nvidia[0-9]*"))
    if hidden or not nodes or torch.version.cuda is None:
        return ""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    cause = f" ({' '.join(str(remarks[-1].message).split())[:200]})" if remarks else ""
    return (
        f"/{nodes[0].relative_to(ROOT)} is there, but torch {torch.__version__}, made for CUDA {torch.version.cuda}, cannot use "
        f"it with driver {driver_version() or 'unknown'}{cause}; update the driver, or install a torch for an older CUDA"
    )


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as 535.104.05; None where there is none."""
    try:
        text = (ROOT / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return match and match[0]


def planned_ranks(device: str, world: int) -> Ranks:
    """Return the first of `world` processes that are not started, as a dry run needs it.

    Raises: ConfigError: the device is not there.
    """
    return Ranks(0, world, choose_device(device))


def refuse_too_many(nproc: int, device: str = "auto") -> None:
    """ConfigError where a host has too few GPUs, or far too few cores, for so many processes."""
    if choose_device(device).type == "cuda":
        if nproc > torch.cuda.device_count():
            raise ConfigError(
                f"--nproc {nproc}: there are {torch.cuda.device_count()} GPUs; use --nproc of at most that many"
            )
        return
    cores = usable_cores()
    if nproc > CROWD * cores:
        raise ConfigError(
            f"--nproc {nproc}: this host lends {cores} core(s) and no GPU, and every process needs one; take --nproc {cores}"
        )


@contextmanager
def ranks(device: str = "auto") -> Iterator[Ranks]:
    """The process group torchrun asks for (gloo, and NCCL for CUDA tensors), or one lone rank."""
    selected = choose_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks(0, 1, selected)
        return
    if dist.is_initialized():  # a stage of a run: the run owns the group
        yield Ranks(dist.get_rank(), world, selected)
        return
    if selected.type == "cuda":
        torch.cuda.set_device(selected)
    backend = "cpu:gloo,cuda:nccl" if selected.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=WAIT, **_meeting_point(world))
        yield Ranks(dist.get_rank(), world, selected)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise Lost(
            "another process of this job ended without a word (killed, or out of memory); "
            "what is finished is kept and the same command goes on"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meeting_point(world: int) -> dict[str, Any]:
    """Return the arguments by which processes that torchrun has not started meet; PipelineError after JOIN."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return {}
    host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    try:
        store = dist.TCPStore(host, port, world, rank == 0, timeout=JOIN)
    except (dist.DistError, RuntimeError, OSError) as error:
        taken = "another program has this port" if "EADDRINUSE" in str(error) or "in use" in str(error) else ""
        reason = taken or f"not all of {world} processes came within {JOIN}"
        raise PipelineError(
            f"MASTER_ADDR {host}, MASTER_PORT {port}: {reason}; start the others, take another port, or forget the job: "
            "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
        ) from error
    store.set_timeout(WAIT)
    return {"store": store, "rank": rank, "world_size": world}


class Obeyed(Exception):
    """A signal that arrived where it is obeyed at once."""


class Signals:
    """While entered, SIGTERM and Ctrl-C are noted, not obeyed, so that work ends at a point that can be saved.

    Another one, at least AGAIN_AFTER seconds later, ends the process at once.
    """

    received: int = 0
    _at: float = 0.0
    _obeying: bool = False

    def __enter__(self) -> "Signals":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, error: object, *_) -> None:
        if error and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return  # a rank that has lost another says so before it heeds the signal with which torchrun then ends it
        for s, handler in self._before.items():
            signal.signal(s, handler)
        if error is None and self.received:  # after the last point where it was looked for: it is not forgotten
            stop = Terminated("stopped; what is finished is kept and the same command goes on")
            stop.exit_code = self.exit_code
            raise stop

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Where waiting may be broken off: raises Obeyed as soon as there is a signal, also one noted before."""
        self._obeying = True
        try:
            if self.received:
                raise Obeyed
            yield
        finally:
            self._obeying = False

    def _note(self, number, frame) -> None:
        if self.received and time.monotonic() - self._at > AGAIN_AFTER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self._at = number, time.monotonic()
        if self._obeying:
            self._obeying = False
            raise Obeyed

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.received == signal.SIGINT else TERMINATED
