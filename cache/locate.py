"""The place that a path or a URL means."""

import os
from pathlib import Path

from cache.layout import CacheError
from cache.local import Local
from cache.objects import SCHEMES, Objects


def is_url(path: object) -> bool:
    """Return True for the text of an object store's URL, such as s3://bucket/path."""
    return isinstance(path, str) and path.partition("://")[0] in SCHEMES and "://" in path


def locate(path: Path | str) -> Local | Objects:
    """Return the place that a path, or the text of a URL, means; nothing is looked at yet.

    Raises: CacheError: a URL of another kind, or one that pathlib has broken.
    """
    if is_url(path):
        return Objects(str(path))
    text = os.fspath(path)
    if "://" in text or text.partition(":/")[0] in SCHEMES:
        raise CacheError(f"{text}: give a folder or a URL, as text: {', '.join(f'{s}://bucket/path' for s in SCHEMES)}")
    return Local(Path(path))
