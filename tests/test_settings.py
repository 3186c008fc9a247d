"""Settings have one source, pipeline/config/: options, `pipeline config` and the page of the docs are made from it."""

import json
import re
import runpy
from pathlib import Path

import click
import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline import config as config_module
from pipeline.cli import cli, invoke
from pipeline.cli.settings import REQUIRED, SECTIONS, setting_sections

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", [*SECTIONS])
def test_what_is_read_from_the_source_is_what_pydantic_has(path):
    fields = getattr(config_module, SECTIONS[path]).model_fields
    section = setting_sections()[path]
    nested = {
        name for name, f in fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)
    }
    assert list(section.fields) == [name for name in fields if name not in nested]
    for name, setting in section.fields.items():
        field = fields[name]
        assert setting.description == field.description
        if field.default is PydanticUndefined:
            assert setting.default is (None if field.default_factory else REQUIRED)
        else:
            assert setting.default == field.default
        constraints = {
            key: getattr(m, key) for m in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(m, key)
        }
        assert dict(setting.limits) == constraints
        if "Variant" not in str(field.annotation):
            assert setting.annotation == field.annotation


def test_every_setting_has_a_sentence():
    for name in (*SECTIONS.values(), "RebalanceOnly"):
        for key, field in getattr(config_module, name).model_fields.items():
            assert re.match(r"[A-Zα-ω].{8,}\.$", field.description or ""), f"{name}.{key}"
            assert "\n" not in field.description


def test_no_section_is_left_out():
    sections = {
        name
        for name, thing in vars(config_module).items()
        if isinstance(thing, type) and issubclass(thing, config_module.Section) and thing is not config_module.Section
    }
    assert sections == {*SECTIONS.values(), "RebalanceOnly"}


def test_options_are_those_of_the_fields():
    options = {
        option.opts[0]: option for option in cli.commands["rebalance"].params if isinstance(option, click.Option)
    }
    assert list(options["--loss"].type.choices) == ["cb", "ce", "la"]
    assert (options["--beta"].type.min, options["--beta"].type.max, options["--beta"].type.max_open) == (0, 1, True)
    assert options["--number"].secondary_opts == ["--no-number"]
    for name, section in (("rebalance", "rebalance"), ("dump-features", "dump")):
        for option in cli.commands[name].params:
            setting = setting_sections()[section].fields.get(option.name)
            if setting and option.opts[0] not in ("--batch-size",):
                assert option.help.rstrip(".") in setting.description, option.opts


def every_command():
    for name, command in cli.commands.items():
        yield from [(name, inner) for inner in command.commands] if isinstance(command, click.Group) else [(name,)]


@pytest.mark.parametrize("words", [*every_command()], ids=" ".join)
def test_help_says_ranges_in_words(words, capsys):
    assert invoke([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"RANGE|\b(INTEGER|FLOAT|TEXT)\b|x[<>]=?|\d<=?x", text)


def test_help_is_in_groups(capsys):
    assert invoke(["rebalance", "--help"]) == 0
    titles = re.findall(r"^(\w[^:\n]*).*:$", capsys.readouterr().out, re.M)
    assert [title.split(" (")[0] for title in titles] == ["Common", "Objective", "Tuning", "Execution", "Several hosts"]


def listed(capsys, *words):
    assert invoke(["config", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_config_lists_values_and_where_they_come_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("data: {source: digits}\nbackbone: {epochs: 7, weaken: {gamma: 0.5}}\n")
    document = listed(capsys, "mine.yaml", "--set", "backbone.lr=1e-3")
    settings = {item["key"]: item for item in document["settings"]}
    assert {key: (item["value"], item["from"]) for key, item in settings.items() if item["from"] != "default"} == {
        "data.source": ("digits", "file"),
        "backbone.epochs": (7, "file"),
        "backbone.weaken.gamma": (0.5, "file"),
        "backbone.lr": (0.001, "--set"),
    }
    assert settings["backbone.epochs"]["default"] == 200
    assert settings["name"]["value"] == document["name"] == "mine"
    assert "default" not in settings["data.source"]
    assert {"values", "description"} <= settings["dump.views"].keys()
    assert invoke(["config", "mine.yaml", "--set", "backbone.lr=1e-3"]) == 0
    text = capsys.readouterr().out
    assert "backbone.epochs: 7  [file; default: 200]" in text
    assert "backbone.lr: 0.001  [--set; default: 0.01]" in text


def test_config_of_stage_2_alone(capsys):
    document = listed(capsys, "ablations/table3", "--set", "rebalance.epochs=3")
    settings = {item["key"]: item for item in document["settings"]}
    assert (settings["rebalance.epochs"]["value"], settings["rebalance.epochs"]["from"]) == (3, "--set")
    assert settings["rebalance.formulation"]["from"] == "file"
    assert not [key for key in settings if key.startswith(("data", "backbone"))]


def test_config_without_a_name_lists_the_shipped_configurations(capsys):
    rows = listed(capsys)["configurations"]
    assert {"digits-lt", "cifar100-lt", "ablations/table3"} <= {row["name"] for row in rows}
    assert all(10 < len(row["summary"]) < 112 and not row["summary"].endswith(".") for row in rows)
    assert invoke(["config"]) == 0
    assert "pipeline config NAME" in capsys.readouterr().out


def test_a_wrong_name_or_setting_is_refused_as_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, text in (
        (["digit-lt"], "did you mean digits-lt"),
        (["--set", "backbone.epocs=1"], "did you mean epochs"),
    ):
        assert invoke(["config", *words]) == 2
        assert text in capsys.readouterr().err


def test_the_page_of_settings_is_the_generated_one():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    generated = runpy.run_path(str(ROOT / "docs" / "settings_page.py"))["settings_page"]()
    assert page == generated, "python docs/settings_page.py > docs/settings.md"
