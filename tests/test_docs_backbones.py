"""docs/backbones.md does what it says: its commands and its Python are run, its key maps are used by other tests."""

import re
import shlex
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "backbones.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def block(name: str) -> str:
    """The YAML file that begins with a comment of its name."""
    return next(text for text in blocks("yaml") if text.startswith(f"# {name}\n"))


@pytest.mark.slow
def test_the_commands_and_the_python_run(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from pipeline.cli import invoke
    from tests.backbone.test_foreign import network

    monkeypatch.chdir(tmp_path)
    state = network("resnet18", 1000).state_dict()
    save_file(state, "resnet18.safetensors")
    moco = {f"module.encoder_{which}.{key}": tensor for which in "qk" for key, tensor in state.items()}
    torch.save({"state_dict": moco}, "moco.pth")
    Path("moco.yaml").write_text(block("moco.yaml"))
    commands = [shlex.split(line)[1:] for text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    assert [words[0] for words in commands] == [
        "dump-features",
        "rebalance",
        "report",
        "export",
        *["dump-features"] * 2,
    ]
    for words in commands:
        quick = ["--set", "dump.views=2"] if words[0] == "dump-features" else []
        quick += ["--set", "rebalance.epochs=1", "--set", "rebalance.lam=0.1"] if words[0] == "rebalance" else []
        assert invoke([*words, *quick]) == 0, words
    for text in blocks("python"):
        exec(compile(text, "docs/backbones.md", "exec"), {})
