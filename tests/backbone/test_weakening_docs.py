"""What docs/weakening.md tells people to type."""

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import invoke
from pipeline.config import find_config, load_config

DOCS = Path(__file__).parents[2] / "docs" / "weakening.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


def commands():
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.split()[1:] for line in lines if line.startswith("pipeline ")]


def settings(words):
    return [words[i + 1] for i, word in enumerate(words) if word == "--set"]


def test_the_python_in_it_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((300, 8, 8, 3), np.uint8), np.arange(300) % 100
    names = np.array([str(c) for c in range(100)])
    np.savez(
        "cifar100.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels,
        class_names=names,
    )  # fmt: skip
    exec(compile("\n".join(blocks("python")), str(DOCS), "exec"), {})
    assert capsys.readouterr().out == "[0.0, 0.0, 1.0, 0.0]\n"
    if "cifar20.npz" in DOCS.read_text(encoding="utf-8"):
        with np.load("cifar20.npz") as cut:
            assert sorted(set(cut["train_labels"])) == list(range(20))
            assert len(cut["class_names"]) == 20


def test_every_command_in_it_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(blocks("yaml")):
        name = text.split("#")[1].split()[0] if text.startswith("#") else f"{number}.yaml"
        Path(name).write_text(text, encoding="utf-8")
    assert len(commands()) >= 3
    for words in commands():
        if words[0] in ("run", "train-backbone"):
            load_config(find_config(words[1]), settings(words))


@pytest.mark.slow
def test_the_first_commands_do_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands()[:3]:
        short = ["--set", "backbone.epochs=2", "--set", "rebalance.epochs=2"] if words[0] == "run" else []
        assert invoke([*words, *short]) == 0
    assert Path("progress/progress.png").is_file()
