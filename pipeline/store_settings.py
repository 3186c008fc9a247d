"""The settings that a feature store was made with."""

from pathlib import Path
from typing import Any

from cache import Cache, CacheError, open_cache
from pipeline.config import RebalanceConfig, make_rebalance_config
from pipeline.errors import DataError
from pipeline.results.documents import RecordShape, checked


def store_tree(store: Cache | Path | str) -> dict[str, Any]:
    """Return the tree of the configuration that a store was made with, empty where it does not say.

    Raises: CacheError: the store cannot be read.
    """
    opened = store if isinstance(store, Cache) else open_cache(store)
    checked(Path(opened.path), opened.provenance, RecordShape, "dump again with --overwrite")
    tree = dict(opened.provenance.get("config") or {})
    rebalance = tree.get("rebalance", {})
    if not isinstance(rebalance, dict):
        raise DataError(f"{opened.path}: provenance.config.rebalance is no section; dump again with --overwrite")
    rebalance = dict(rebalance)
    if opened.views("train") == 1:
        rebalance.pop("views", None)  # what was configured cannot be had; what is typed is still refused
    return tree | {"rebalance": rebalance}


def store_settings(store: Cache | Path | str) -> RebalanceConfig:
    """Return the settings of stage 2 that a store was made with; raise DataError where it cannot be read."""
    try:
        return make_rebalance_config(store_tree(store), "the store's settings")
    except CacheError as error:
        raise DataError(str(error)) from error
