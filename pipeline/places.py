"""Where what belongs to a store lies, and which settings it was made for."""

from pathlib import Path
from typing import Any

from cache import Cache, CacheError, open_cache
from pipeline.config import RebalanceConfig, make_rebalance_config
from pipeline.errors import DataError


def results_folder(store: Cache | Path | str, kind: str = "rebalance") -> Path:
    """Where results of a store go: rebalance/ beside a run's features.zarr, NAME-rebalance/ beside another NAME.zarr.

    Those of a store in a bucket go to NAME-rebalance/ in the working folder; NAME of …/cifar/features.zarr is cifar.
    """
    place = store.path if isinstance(store, Cache) else store
    if "://" in str(place):
        *_, parent, name = str(place).split("/")
        return Path(f"{parent if name == 'features.zarr' else Path(name).stem}-{kind}")
    place = Path(place)
    return place.parent / (kind if place.name == "features.zarr" else f"{place.stem}-{kind}")


def store_tree(store: Cache | Path | str) -> dict[str, Any]:
    """The tree of the configuration a store was made with; empty where it does not say.

    Raises CacheError where it cannot be read.
    """
    opened = store if isinstance(store, Cache) else open_cache(store)
    own = dict(opened.provenance.get("config") or {})
    rebalance = dict(own.get("rebalance", {}))
    if opened.views("train") == 1:
        rebalance.pop("views", None)  # what was configured cannot be had; what is typed is still refused
    return own | {"rebalance": rebalance}


def store_settings(store: Cache | Path | str) -> RebalanceConfig:
    """The settings of stage 2 in the configuration a store was made with; DataError where it cannot be read."""
    try:
        return make_rebalance_config(store_tree(store), "the store's settings")
    except CacheError as error:
        raise DataError(str(error)) from error
