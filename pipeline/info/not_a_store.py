"""Advice for a path that is no feature store."""

from pathlib import Path

from cache import CacheError
from pipeline.errors import DataError
from pipeline.info import describe


def not_a_store(path: Path) -> str:
    """Return the kind of the artefact at a path and what to type instead; nothing where it is of no known kind."""
    try:
        kind = describe(path).kind
    except (DataError, CacheError):
        return ""
    if "checkpoint" in kind or "weights" in kind:
        return f" (it is: {kind}); make a store of it: pipeline dump-features --checkpoint {path}"
    stores = (folder / "features.zarr" for folder in (path.parent, path.parent.parent))
    store = next((store for store in stores if store.exists()), None)
    return f" (it is: {kind})" + (f"; did you mean {store}?" if store else "")
