"""The commands of docs/cluster.md that one machine can run, as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import ROOT

DOCS = ROOT / "docs" / "cluster.md"


def blocks(text: str) -> list[str]:
    return re.findall(r"<!-- run -->\n```bash\n(.*?)```", text, re.S)


@pytest.mark.slow
def test_its_commands_run_as_they_stand(tmp_path):
    found = blocks(DOCS.read_text(encoding="utf-8"))
    assert len(found) == 3
    assert shutil.which("pipeline", path=Path(sys.executable).parent)
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    known["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(found)],
        cwd=tmp_path, env=known, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/rehearsal/last.pt").exists()
    assert done.stdout.count("all checksums hold") == 2


def test_its_table_has_every_option_and_its_links_lead_somewhere():
    text = DOCS.read_text(encoding="utf-8")
    for option in ("--nnodes", "--rdzv-endpoint", "--rdzv-id", "--max-restarts", "--rdzv-conf"):
        assert f"| `{option}" in text
    for target in re.findall(r"\]\((\.\./[^)#]+)\)", text):
        assert (DOCS.parent / target).exists(), target
