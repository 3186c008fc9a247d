"""Pages of results that were replaced since: found by the digest that each page carries, and marked on top."""

import hashlib
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from cache import write_durably
from pipeline.report.study import results_files

PAGE = "report.html"
MARK = "<p class=outdated role=alert>"


def results_digest(runs: Iterable[Path]) -> str:
    """Return the sha256 over every results.json of runs, which a page of them carries."""
    content = b"".join(path.read_bytes() for run in runs for path in results_files(run))
    return hashlib.sha256(content).hexdigest()


def is_outdated(run: Path) -> bool:
    """Return True where a run has a page that was drawn of other results than it has now."""
    page = run / PAGE
    if not page.is_file():
        return False
    carried = re.search(r"<meta name=results content=([0-9a-f]{64})>", page.read_text(encoding="utf-8")[:4096])
    return carried is not None and carried[1] != results_digest([run])


def mark_outdated(results: Path) -> Path | None:
    """Say on top of the page above a folder of results that they are newer, and return the page; None where none is older."""
    run = results.resolve().parent
    run = run.parent if run.name.startswith("seed-") and (run.parent / PAGE).is_file() else run
    if not is_outdated(run):
        return None
    page = run / PAGE
    text = page.read_text(encoding="utf-8")
    if MARK not in text:
        command = escape(f"pipeline report {run.name}")
        notice = f"{MARK}The results are newer than this page. Draw it again: <code>{command}</code></p>"
        write_durably(page, text.replace("<body>", f"<body>\n{notice}", 1))
    return page
