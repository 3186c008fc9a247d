"""The examples of docs/surviving.md run as they stand, in the folder of a training."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs/surviving.md"


def test_the_examples_run(tiny_backbone, monkeypatch, capsys):
    monkeypatch.chdir(tiny_backbone.parent)
    known: dict = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S):
        exec(code, known)
    assert capsys.readouterr().out
    assert known["weights"]
