"""docs/training.md: its examples run, its commands parse, its table has the defaults."""

import re
import shlex
from pathlib import Path

import yaml

from pipeline.backbone.tries import grid
from pipeline.config import BackboneConfig, find_config, load_config

DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.S)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names: dict = {}
    exec(compile(code, "training.md", "exec"), names)
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["loss=ce", "loss=balanced-softmax"]
    assert Path(names["chosen"]).is_file()


def test_the_commands_mean_something():
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 3
    for program, command, name, *words in lines:
        assert (program, command) == ("pipeline", "train-backbone")
        given = dict.fromkeys(words[::2], None)
        assert given.keys() <= {"--set", "--try", "--seeds"}
        options = [(o, v) for o, v in zip(words[::2], words[1::2], strict=True)]
        config = load_config(find_config(name), [v for o, v in options if o == "--set"])
        assert grid(config, [v for o, v in options if o == "--try"])


def test_the_defaults_are_those_of_the_configuration():
    rows = re.findall(r"^\| `backbone\.(\w+)` \| ([^|]+) \|", DOCS, re.M)
    assert len(rows) == 11
    defaults = BackboneConfig()
    for key, told in rows:
        assert getattr(defaults, key) == yaml.safe_load(told), key
