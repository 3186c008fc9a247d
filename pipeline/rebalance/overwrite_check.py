"""Results that are already where new ones go."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import RebalanceConfig
from pipeline.errors import DataError

WITHOUT_EFFECT = {"memory", "spread"}  # settings that change no result


def replacement_note(out: Path, config: RebalanceConfig, digest: str) -> str | None:
    """Return a note on results of other settings, or of another store, that new ones replace; None where there are none.

    Arguments:
        digest: of the store that is fitted on.
    """
    try:
        results, run = (json.loads((out / name).read_text(encoding="utf-8")) for name in ("results.json", "run.json"))
        unchanged = _settings(run["config"]) == _settings(config.model_dump(mode="json"))
        if unchanged and results["digest"] == digest:
            return None
        methods, heads = len({row["method"] for row in results["results"]}), results["timing"]["heads"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none there, or not of this program
    counts = f"{methods:,} method{'s' * (methods != 1)}, {heads:,} head{'s' * (heads != 1)}"
    return f"replaces the results in {out} ({counts}); --out DIR keeps both"


def refuse_other_results(out: Path) -> None:
    """Raise DataError where a results.json that `rebalance` did not write is where its results go."""
    file = out / "results.json"
    if not file.is_file():
        return
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(document, dict) and {"results", "digest"} <= document.keys():
            return
    except (OSError, ValueError):
        pass
    raise DataError(f"{out}: holds a results.json that is not of `pipeline rebalance`; take another --out")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in WITHOUT_EFFECT}
