"""Durable files: a name holds either the old content or the whole new one, also after a power cut."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_durably(path: Path | str, content: bytes | str | Callable[[BinaryIO], object]) -> Path:
    """Return the path, after its content was replaced whole: temporary file, fsync, rename, fsync of the folder.

    Arguments:
        content: bytes, text (written as UTF-8) or a function that writes to an open binary file.
    Raises: OSError: disk full, no permission; the old content is then still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600, which another user of a shared run could not read
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is met by an open file, which does not say its name
            error.filename = error.filename or str(path)
        raise
    fsync(path.parent)
    return path


def refuse_unwritable(folder: Path | str) -> None:
    """Raise the OSError that making this folder, or a file in it, would meet; nothing is changed."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        code = errno.EEXIST if nearest == folder else errno.ENOTDIR
    elif not os.access(nearest, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
    elif os.statvfs(nearest).f_bavail == 0:
        code = errno.ENOSPC
    else:
        return
    raise OSError(code, os.strerror(code), str(folder))


def fsync_tree(path: Path) -> None:
    """Make a folder and all that is in it survive a power cut, its own name excepted."""
    for folder, _, files in os.walk(path, topdown=False):
        for file in files:
            fsync(Path(folder, file))
        fsync(Path(folder))


def fsync(path: Path) -> None:
    """Make what a file holds, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
