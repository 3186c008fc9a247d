"""Where a store lives, as all who read or write one see it: named pieces of bytes, a folder's files or a bucket's objects."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

from cache.layout import CacheError

LEASE = ".lock"  # of the object, or file, that keeps other writers away
ABSENT: dict[str, Any] = {}  # the tag of an object that must not be there yet


class Changed(CacheError):
    """An object is not, or no longer, the one that was to be replaced."""


class WriteLock(Protocol):
    """The right to write a store, from `take` to `release`."""

    def take(self) -> Self:
        """Return itself once it is held; raise CacheError naming a living owner."""

    def confirm(self) -> None:
        """Raise CacheError where another process has taken it over."""

    def renew(self) -> None:
        """Begin anew one that runs out."""

    def release(self) -> None: ...


class Place(Protocol):
    """A folder or a prefix of a bucket; names are relative to it, as zarr's keys. `str` names it to people."""

    streams: int  # pieces that are read side by side

    @property
    def location(self) -> Path | str:
        """Return the path, or the URL as text, of which `locate` makes this."""

    def exists(self) -> bool: ...

    def occupied(self) -> bool:
        """Return True where anything lies here that a new store would have to make room for."""

    def names(self) -> Iterator[str]: ...

    def open(self, name: str) -> AbstractContextManager[tuple[Any, int]]:
        """Return (a stream with `readinto`, its size in bytes); raise FileNotFoundError where it is missing."""

    def read(self, name: str) -> tuple[bytes, Any]:
        """Return (the content, the tag of its version, None in a folder); raise FileNotFoundError where it is missing."""

    def write(self, name: str, content: bytes, *, tag: Any = None) -> Any:
        """Replace a piece whole and durably, in a bucket only the version `tag` (ABSENT: none, None: any).

        Returns: the tag of the new version, None in a folder.
        Raises: Changed: another version is there.
        """

    def delete(self, *names: str) -> None: ...

    def writing(self, name: str) -> AbstractContextManager[None]:
        """Make what zarr writes inside durable on leaving, and leave none where that fails."""

    def settle(self) -> None:
        """Make durable what a killed process left, and another took for finished."""

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""

    def zarr(self) -> Any:
        """Return the store that zarr opens to write here."""

    def lock(self) -> WriteLock: ...

    def refusals(self) -> AbstractContextManager[None]:
        """Turn what the disk or the object store refuses into a CacheError that names what to check."""
