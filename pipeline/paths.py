"""Where what belongs to a store lies, and which settings it was made for."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cache import Cache, CacheError, open_cache
from pipeline.config import RebalanceConfig, make_rebalance_config
from pipeline.errors import DataError

_OF_A_RUN = ("backbone/last.pt", "features.zarr", "rebalance/results.json", "seed-*/backbone", "seed-*/features.zarr")


def near(path: Path) -> str:
    """`; did you mean …?` with the name beside a path that is most like it, or nothing."""
    found = get_close_matches(path.name, [other.name for other in path.parent.glob("*")], 1)
    return f"; did you mean {path.with_name(found[0])}?" if found else ""


def is_run(folder: Path) -> bool:
    """Whether a folder has a training, features or results of its own, or of several backbones."""
    return any(next(folder.glob(part), None) is not None for part in _OF_A_RUN)


def holds_runs(folder: Path) -> str:
    """That a folder is no run but has some in it, which are named; nothing where that is not so."""
    runs = [] if is_run(folder) else sorted(str(path) for path in folder.glob("*") if is_run(path))
    if not runs:
        return ""
    others = f" ({len(runs)} in all: {', '.join(Path(run).name for run in runs[:8])}" if runs[1:] else ""
    others += (", …)" if runs[8:] else ")") if others else ""
    return f"{folder}: holds runs, is none; name one, such as {runs[0]}{others}"


def what_else(path: Path) -> str:
    """What lies at a path where a feature store is wanted, and what to type instead; nothing where nobody knows."""
    from pipeline.info import describe

    try:
        kind = describe(path).kind
    except (DataError, CacheError):
        return ""
    beside = next(
        (f for f in (path.parent / "features.zarr", path.parent.parent / "features.zarr") if f.exists()), None
    )
    made = "checkpoint" in kind or "weights" in kind
    advice = f"make a store of it: pipeline dump-features --checkpoint {path}" if made else f"did you mean {beside}?"
    return f" (it is: {kind})" + (f"; {advice}" if made or beside else "")


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
