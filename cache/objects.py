"""A store in an object store (S3, Google Cloud Storage, Azure), through obstore.

A PUT replaces one object whole and there is no rename: nothing here needs one. obstore is imported where it is used,
since most stores are folders and it is an extra.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from typing import Any
from urllib.parse import quote

from cache.layout import CacheError
from cache.lease import Lease
from cache.place import ABSENT, LEASE, Changed

SCHEMES = ("s3", "gs", "az")
PIECE = 1 << 20

# an endpoint that does not answer ends a command within about half a minute; 16 MiB may take that long one way
_TIMEOUTS: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "120s"}
_RETRIES: Any = {
    "max_retries": 100,  # the time below ends them: a server may be busy for some seconds
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}


class Objects:
    """The objects under a URL such as s3://bucket/path; credentials and endpoint come from the usual environment."""

    streams = 8  # requests side by side: one alone does not fill a network

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        scheme, _, rest = self.url.partition("://")
        bucket, _, self._prefix = rest.partition("/")
        if "@" in bucket:
            kind = f"{scheme}://…@{bucket.rpartition('@')[2]}/{self._prefix}"
            raise CacheError(
                f"{kind}: a URL with a password ends up in records and logs; set AWS_ACCESS_KEY_ID and the like"
            )
        if not bucket or "//" in rest or {".", ".."} & set(rest.split("/")):
            raise CacheError(f"{url}: expected a URL such as {scheme}://bucket/path")
        self.bucket = bucket

    def __str__(self) -> str:
        return self.url

    @property
    def location(self) -> str:
        """Return what names it to people, and what `locate` makes this of."""
        return self.url

    @cached_property
    def _store(self) -> Any:
        """obstore's own object, rooted at the prefix."""
        plain = _endpoint().startswith("http://")
        options: Any = {**_TIMEOUTS, **({"allow_http": True} if plain else {})}
        with self.refusals():
            return _library(self).store.from_url(
                quote(self.url, safe=":/"), client_options=options, retry_config=_RETRIES
            )

    def exists(self) -> bool:
        return self.occupied()

    def occupied(self) -> bool:
        """Return True where anything lies here that a new store would have to make room for; a lease alone does not."""
        return any(name != LEASE for name in self.names())

    def names(self) -> Iterator[str]:
        """The name of every object here."""
        obstore = _library(self)
        with self.refusals():
            for batch in obstore.list(self._store):
                yield from (entry["path"] for entry in batch)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple["_Stream", int]]:
        """(a stream with `readinto`, its size); FileNotFoundError where the object is missing."""
        obstore = _library(self)
        with self.refusals():
            response = obstore.get(self._store, name)
            yield _Stream(response.stream(min_chunk_size=PIECE)), response.meta["size"]

    def read(self, name: str) -> tuple[bytes, dict[str, Any]]:
        """(the content, the tag of this version of it); FileNotFoundError where the object is missing."""
        obstore = _library(self)
        with self.refusals():
            response = obstore.get(self._store, name)
            return bytes(response.bytes()), _tag(response.meta)

    def write(self, name: str, content: bytes, *, tag: dict[str, Any] | None = None) -> dict[str, Any]:
        """The tag of the object that one PUT has replaced whole.

        tag: the version that is to be replaced, ABSENT for none, None for any. Raises Changed where another is there.
        """
        obstore = _library(self)
        refusals = obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError, FileNotFoundError
        mode: Any = "overwrite" if tag is None else "create" if tag == ABSENT else tag
        with self.refusals():
            try:
                return _tag(obstore.put(self._store, name, content, mode=mode, use_multipart=False))
            except refusals as error:
                if tag is None or "NoSuchBucket" in str(error):
                    raise
                refused = error
            try:  # a PUT whose answer was lost is sent again, and then refused for its own first success
                stored, version = self.read(name)
            except FileNotFoundError:
                raise Changed(f"{self}: another process has removed {name} meanwhile") from refused
            if stored != content:
                raise Changed(f"{self}: another process has written {name} meanwhile") from refused
            return version

    def delete(self, *names: str) -> None:
        obstore = _library(self)
        with self.refusals(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, list(names))

    def writing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Nothing more: an object that was written is durable, and one that was not is not there."""
        return self.refusals()

    def settle(self) -> None:
        """Nothing to do: what a PUT has confirmed is durable."""

    def sweep(self) -> None:
        """Nothing to do: a broken PUT leaves nothing."""

    def zarr(self) -> Any:
        """Return the store that zarr writes to: each chunk one PUT, not zarr's several parts, which a kill would leave behind."""
        from zarr.storage import ObjectStore

        obstore = _library(self)

        class WholeObjects(ObjectStore):
            async def set(self, key: str, value: Any) -> None:
                self._check_writable()
                await obstore.put_async(self.store, key, value.as_buffer_like(), use_multipart=False)

        return WholeObjects(self._store)

    def lock(self) -> Lease:
        return Lease(self)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turns what the object store refuses, and its silence, into a CacheError that says what to check."""
        try:
            yield
        except Exception as error:
            message = str(error)
            if type(error).__module__.partition(".")[0] != "obstore" and "NoSuchBucket" not in message:
                raise
            raise CacheError(f"{self}: {_explained(message, self.bucket)}") from error


def _library(place: Objects) -> Any:
    """obstore, or a CacheError that says how to get it."""
    try:
        import obstore
        import obstore.store
    except ImportError:
        raise CacheError(f"{place}: object stores need one more package: pip install 'iwb-pipeline[s3]'") from None
    return obstore


class _Stream:
    """The pieces of one object as a file that is read into memory given by the caller."""

    def __init__(self, pieces: Any):
        self._pieces, self._rest = iter(pieces), memoryview(b"")

    def readinto(self, into: memoryview) -> int:
        if not len(self._rest):
            self._rest = memoryview(next(self._pieces, b""))
        count = min(len(into), len(self._rest))
        into[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _tag(meta: Any) -> dict[str, Any]:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _explained(message: str, bucket: str) -> str:
    """Return one line on the cause of an object store's message and what to check."""
    code_match = re.search(r"<Code>(\w+)</Code>", message)
    code = code_match.group(1) if code_match else ""
    status = re.search(r"status code: (\d{3}[\w ]*)", message)
    address = re.search(r"https?://[^/\s\"]+", message)
    host = re.sub("//[^/@]*@", "//", address.group(0) if address else _endpoint() or "the object store")
    keys = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket} at {host}; make it, or check the URL and AWS_ENDPOINT_URL"
    if "169.254." in message:
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN)"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        return f"{host} refuses the credentials ({code}); {keys}"
    if "status code: 401" in message or "status code: 403" in message:
        return f"{host} gives no permission for this ({code or 'Forbidden'}); {keys}, and the bucket's policy"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed") or "status code: 301" in message:
        return f"the bucket is in another region ({code or 'redirected'}); set AWS_REGION to the bucket's"
    if status:
        return (
            f"{host} answers {status.group(1).strip()}{f' ({code})' if code else ''}; run the same command again later"
        )
    if "scheme is not allowed" in message or "URL scheme" in message:
        return "plain http is off; set AWS_ALLOW_HTTP=true if you mean it"
    if any(words in message for words in ("error sending request", "HTTP error", "timed out", "retries")):
        return f"no answer from {host}; check AWS_ENDPOINT_URL and the network, then run the same command again"
    return re.sub(r"://[^/@\s]+@", "://", " ".join(message.split("\n")[0].split()))[:300]
