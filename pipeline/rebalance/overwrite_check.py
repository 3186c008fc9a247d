"""Results that stand already where new ones go."""

from pathlib import Path
from typing import Any

from pipeline.config import RebalanceConfig
from pipeline.errors import DataError
from pipeline.info.artefact import Facts, read_json

NO_MATTER = {"memory", "spread"}  # settings that change no result


def replaced(out: Path, config: RebalanceConfig, digest: str) -> str | None:
    """What is lost where these settings on the store of that digest write over results of others; None where nothing is."""
    try:
        found, run = read_json(out / "results.json"), read_json(out / "run.json")
        same = _settings(run["config"]) == _settings(config.model_dump(mode="json"))
        if same and found["digest"] == digest:
            return None
        methods, heads = len({row["method"] for row in found["results"]}), found["timing"]["heads"]
    except (DataError, KeyError, TypeError, AttributeError):
        return None  # none there, or not of this program
    counts = f"{methods:,} method{'s' * (methods != 1)}, {heads:,} head{'s' * (heads != 1)}"
    return f"replaces the results in {out} ({counts}); --out DIR keeps both"


def refuse_foreign(out: Path) -> None:
    """DataError where results of something else lie where results are to go."""
    if not (out / "results.json").is_file():
        return
    try:
        known = {"results", "digest"} <= read_json(out / "results.json").keys()
    except DataError:
        known = False
    if not known:
        raise DataError(f"{out}: holds a results.json that is not of `pipeline rebalance`; take another --out")


def _settings(config: Facts) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NO_MATTER}
