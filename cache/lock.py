"""One writer at a time: a lock that the system drops with its owner, however that ends."""

import contextlib
import fcntl
import os
from pathlib import Path

from cache.layout import CacheError, Unlockable

_descriptors: set[int] = set()


class Lock:
    """The right to write a store, held by one open file in it from `take` to `release`."""

    def __init__(self, store: Path):
        self._store = store
        self._file = store / ".lock"
        self._descriptor: int | None = None

    def take(self) -> "Lock":
        """Itself, held; CacheError naming the owner where another process holds it."""
        while self._descriptor is None:
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError as error:
                meanwhile = "another process has moved or removed it meanwhile; run the same command again"
                raise CacheError(f"{self._store}: {meanwhile}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    os.close(descriptor)
                    raise Unlockable(
                        f"{self._store}: this file system cannot lock files ({error.strerror}); mount it with locks, or "
                        "dump into a local folder and copy the sealed store"
                    ) from error
                refusal = self._held_by(descriptor)
                os.close(descriptor)
                raise refusal from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._file).st_ino == os.fstat(descriptor).st_ino:
                    self._descriptor = descriptor
            if self._descriptor is None:  # its owner removed the file between our open and our lock
                os.close(descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        _descriptors.add(self._descriptor)
        return self

    def refuse_held(self) -> None:
        """CacheError, as `take` raises it, where another process holds it; nothing is changed."""
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held_by(descriptor) from None
        except OSError:  # a file system without locks, which is told when one is taken
            pass
        finally:
            os.close(descriptor)

    def _held_by(self, descriptor: int) -> CacheError:
        owner = os.pread(descriptor, 100, 0).decode(errors="replace") or "unknown"
        return CacheError(f"{self._store}: another process is writing it ({owner}); wait for it or stop it")

    def confirm(self) -> None:
        """Nothing to do: the system keeps the lock as long as we live."""

    def renew(self) -> None:
        """Nothing to do: it does not run out."""

    def release(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._file).st_ino == os.fstat(self._descriptor).st_ino:  # else it is of who came after us
                    self._file.unlink()
            _descriptors.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Lock":
        return self.take()

    def __exit__(self, *_: object) -> None:
        self.release()


def _forget() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


# a forked data-loading worker that outlives its killed parent must not keep the lock
os.register_at_fork(after_in_child=_forget)
