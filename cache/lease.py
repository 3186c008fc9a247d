"""One writer at a time on an object store: a lease object that its owner renews, and that runs out with its owner.

Every change of it is a PUT on the condition that it is still the version seen last, so of two that take it one wins.
No two clocks are compared: a lease is over when it was seen unchanged for as long as it says it lasts.
"""

import json
import logging
import os
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from cache.layout import CacheError
from cache.place import ABSENT, LEASE, Changed, Place

SECONDS = float(os.environ.get("CACHE_LEASE_SECONDS", 60))

log = logging.getLogger("cache")


class Lease:
    """The right to write a store, from `take` to `release`; a thread renews it three times in its length."""

    def __init__(self, place: Place):
        self._place = place
        self._tag: dict[str, Any] | None = None  # of our own last version, None while we have no lease
        self._renewed = 0.0
        self._lost = ""
        self._busy = threading.Lock()
        self._over = threading.Event()

    def take(self) -> "Lease":
        """Itself, held; waits for the lease of a dead owner to run out. CacheError naming a living owner."""
        while self._tag is None:
            self._renewed = time.monotonic()
            try:
                self._tag = self._put(ABSENT)
            except Changed:
                self._succeed()
        self._refuse_careless_servers()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        return self

    def confirm(self) -> None:
        """Returns while the store is ours to write; CacheError once another process has taken it.

        Asks the object store only where the last renewal is longer ago than a lease lasts, as after a suspension.
        """
        if time.monotonic() - self._renewed > SECONDS:
            self.renew()
        if self._lost:
            raise CacheError(f"{self._place}: {self._lost}; stopped without sealing, its chunks stay good")

    def renew(self) -> None:
        """Begins the lease anew, or finds that another process has it."""
        with self._busy:
            if self._tag is None or self._lost:
                return
            started = time.monotonic()
            try:
                self._tag = self._put(self._tag)
                self._renewed = started
            except Changed:
                self._lost = "another process took over writing it, since the lease of this one had run out"

    def release(self) -> None:
        self._over.set()
        with self._busy:
            # one that has run out may be another's by now, and is left to it
            if self._tag and not self._lost and time.monotonic() - self._renewed < SECONDS / 2:
                self._place.delete(LEASE)
            self._tag = None

    def __enter__(self) -> "Lease":
        return self.take()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._over.wait(SECONDS / 3) and not self._lost:
            try:
                self.renew()
            except CacheError as error:  # `confirm` raises it if it lasts
                log.info("%s", error)

    def _succeed(self) -> None:
        """Takes the lease that is there once it has run out; returns too where it is gone or another one took it."""
        try:
            content, tag = self._place.read(LEASE)
        except FileNotFoundError:
            return
        owner, seconds = _read(content)
        log.warning("%s: waiting up to %.0f s to see whether %s still writes it", self._place, seconds, owner)
        first_read = time.monotonic()
        while (waited := time.monotonic() - first_read) < seconds:
            time.sleep(min(1.0, seconds / 20, seconds - waited))
            try:
                content, current = self._place.read(LEASE)
            except FileNotFoundError:
                return
            if current != tag:
                owner, _ = _read(content)
                raise CacheError(f"{self._place}: another process is writing it ({owner}); wait for it or stop it")
        self._renewed = time.monotonic()
        try:
            self._tag = self._put(tag)
        except Changed:
            return

    def _put(self, tag: dict[str, Any]) -> dict[str, Any]:
        expires = datetime.now(UTC) + timedelta(seconds=SECONDS)
        document = {
            "owner": f"process {os.getpid()} on {os.uname().nodename}",
            "seconds": SECONDS,
            "expires": expires.isoformat(timespec="seconds"),
            "version": uuid.uuid4().hex,  # equal content would have an equal tag
        }
        return self._place.write(LEASE, json.dumps(document).encode(), tag=tag)

    def _refuse_careless_servers(self) -> None:
        """CacheError where the server ignores conditions, and so would let two writers in."""
        try:
            self._put(ABSENT)
        except Changed:
            return
        self._place.delete(LEASE)
        raise CacheError(
            f"{self._place}: this object store ignores conditional PUTs (If-None-Match), so two writers could not be "
            "kept apart; dump into a folder and copy it, or use another object store"
        )


def _read(content: bytes) -> tuple[str, float]:
    """(owner, seconds) of a lease; one that nobody can read lasts as long as ours."""
    try:
        document = json.loads(content)
        return str(document["owner"]), float(document["seconds"])
    except (ValueError, KeyError, TypeError):
        return "an unknown process", SECONDS
