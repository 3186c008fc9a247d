"""A store in a folder: on this host, or one that several hosts share."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cache.files import fsync, fsync_tree, write_durably
from cache.layout import CacheError, Refused
from cache.lock import Lock


class Local:
    """The files below a folder, by their names relative to it."""

    streams = min(4, os.cpu_count() or 1)  # chunks read side by side; the system copies without the interpreter's lock

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def location(self) -> Path:
        """Return what names it to people, and what `locate` makes this of."""
        return self.path

    def exists(self) -> bool:
        return self.path.exists()

    def occupied(self) -> bool:
        """Return True where anything lies here that a new store would have to make room for."""
        return self.path.is_dir() and any(self.path.iterdir())

    def names(self) -> Iterator[str]:
        """The name of every file here."""
        yield from (str(file.relative_to(self.path)) for file in self.path.rglob("*") if file.is_file())

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple[Any, int]]:
        """(a file with `readinto`, its size); FileNotFoundError where it is missing, OSError where it cannot be read."""
        with open(self.path / name, "rb", buffering=0) as file:
            yield file, os.fstat(file.fileno()).st_size

    def read(self, name: str) -> tuple[bytes, None]:
        """The content; raises as `open` does."""
        return (self.path / name).read_bytes(), None

    def write(self, name: str, content: bytes, *, tag: Any = None) -> None:
        """Replaces a file whole; tag is of use on object stores alone, here the lock keeps others away."""
        write_durably(self.path / name, content)

    def delete(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Makes a file that is written inside durable on leaving, and leaves none where that fails."""
        file = self.path / name
        try:
            yield
            fsync(file)
            fsync(file.parent)
        except BaseException:
            file.unlink(missing_ok=True)
            raise

    def settle(self) -> None:
        """Makes durable what a process killed before its own fsync left, and another took for finished."""
        fsync_tree(self.path)

    def sweep(self) -> None:
        """Removes the temporary files of killed processes."""
        for leftover in [*self.path.rglob(".*.tmp"), *self.path.rglob("*.partial")]:
            leftover.unlink(missing_ok=True)

    def zarr(self) -> Path:
        """Return the store that zarr writes to."""
        return self.path

    def lock(self) -> Lock:
        return Lock(self.path)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turns what the disk refuses (full, no permission) into a CacheError."""
        try:
            yield
        except FileNotFoundError as error:
            meanwhile = "another process has moved or removed it meanwhile; run the same command again"
            raise CacheError(f"{self}: {meanwhile}") from error
        except OSError as error:
            raise Refused(
                f"{self}: cannot be written: {error.strerror or error}; finished chunks stay good: "
                "run the same pipeline dump-features command again when this is mended"
            ) from error

    def build(self, fill: Callable[["Local"], None]) -> None:
        """A new folder: filled beside its place and renamed, so that it is there whole or not at all."""
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".building"))
        umask = os.umask(0)
        os.umask(umask)
        building.chmod(0o777 & ~umask)  # mkdtemp gives 0700, which another user of a shared run could not read
        with _claimed(building):
            try:
                fill(Local(building))
                fsync_tree(building)
                os.rename(building, path)
            except BaseException as error:
                shutil.rmtree(building, ignore_errors=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    meanwhile = "another process has made a store there meanwhile; run the same command again"
                    raise CacheError(f"{path}: {meanwhile}") from error
                raise
        fsync(path.parent)

    def refuse_removal(self) -> None:
        """CacheError where what lies here is no store, which is not taken away."""
        if not (self.path / "zarr.json").is_file():
            raise CacheError(f"{self}: not a feature store (it has no zarr.json); remove it or choose another --out")

    def remove(self) -> None:
        """Takes a store, or an empty folder, away; a kill half-way leaves no half store under its name."""
        path = self.path
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.building"):
            with _claimed(leftover) as claimed:
                if claimed:
                    shutil.rmtree(leftover, ignore_errors=True)
        inode = _inode(path)
        if inode is None:
            return
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
            return
        try:
            self.refuse_removal()
        except CacheError:
            if _inode(path) == inode:
                raise
            raise CacheError(f"{self}: another process has replaced it meanwhile; run the same command again") from None
        with Lock(path):
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".building"))
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)  # another process may take it for a leftover and help


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Marks a folder that is being built as in use; false where it is gone or a living process has claimed it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claimed = True
    except OSError:
        claimed = False
    try:
        yield claimed
    finally:
        os.close(descriptor)
