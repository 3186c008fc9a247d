"""The origin of an artefact: command, configuration, versions, machine, time."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("iwb-pipeline", "torch", "torchvision", "timm", "zarr", "numpy")


def provenance(**facts: Any) -> dict[str, Any]:
    """Return a JSON-ready description of this process, plus the given facts (config, device, seed, made_from, …)."""
    return {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_revision(),
        "versions": {"python": platform.python_version(), **{name: library_version(name) for name in LIBRARIES}},
        "platform": platform.platform(),
        **facts,
    }


def shared_provenance(**facts: Any) -> dict[str, Any]:
    """Return the same for what is passed on to others: without the words that were typed, which hold names of places."""
    return {key: value for key, value in provenance(**facts).items() if key != "argv"}


def git_revision() -> str | None:
    """Commit of the source tree this package runs from, `+` behind it where files differ; outside a checkout what
    PIPELINE_REVISION says, as in an image, or None."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("PIPELINE_REVISION") or None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def library_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
