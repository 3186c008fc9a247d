"""The command that lists the settings of a configuration, or the shipped configurations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.cli.completion import configs
from pipeline.cli.exit_codes import show
from pipeline.cli.options import Command, settings, shared
from pipeline.cli.paths import images_folder
from pipeline.cli.settings import REQUIRED, SettingField, setting_sections
from pipeline.shipped import shipped_configs
from pipeline.text import Shown, columns, wrapped

LONGEST_SUMMARY = 100  # characters; a longer first sentence is cut at its colon


@dataclass(frozen=True)
class ShippedConfigs(Shown):
    """The configurations that travel with the installation: name → a line on each, from the head of its file."""

    summaries: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"configurations": [{"name": name, "summary": text} for name, text in self.summaries.items()]}

    def __str__(self) -> str:
        width = max(map(len, self.summaries)) + 2
        lines = [
            line
            for name, text in self.summaries.items()
            for line in wrapped(f"{name:<{width}}", text, columns(), indent=width)
        ]
        return "\n".join([*lines, "", "`pipeline config NAME` lists the settings of one of them, or of a file."])


@dataclass(frozen=True)
class SettingValue:
    """A setting with its value in a configuration; origin is default, file, images (chosen from them) or --set."""

    field: SettingField
    value: Any
    origin: str

    def to_dict(self) -> dict[str, Any]:
        default = {} if self.field.default is REQUIRED else {"default": self.field.default}
        document = {"key": self.field.key, "value": self.value, "from": self.origin, **default}
        return document | {"values": self.field.values, "description": self.field.description}

    @property
    def text(self) -> str:
        """The value, where it comes from, and the default where it differs."""
        value = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        differs = self.origin != "default" and self.field.default is not REQUIRED
        return f"{value}  [{self.origin}{f'; default: {self.field.default_text}' if differs else ''}]"


@dataclass(frozen=True)
class ConfigSettings(Shown):
    """All settings of one configuration, in the order of config.py."""

    name: str
    path: Path
    values: tuple[SettingValue, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "path": str(self.path), "settings": [value.to_dict() for value in self.values]}

    def __str__(self) -> str:
        width, lines = columns(), [f"{self.name}: {self.path}"]
        for section, title in ((section, section.path or "configuration") for section in setting_sections().values()):
            values = [value for value in self.values if value.field in section.fields.values()]
            if values:
                lines += ["", *wrapped(f"{title}: ", section.description, width, indent=2)]
            for item in values:
                lines += wrapped(f"  {item.field.key}: ", item.text, width, indent=6)
                lines += wrapped("      ", f"{item.field.description} ({item.field.values})", width, indent=6)
        return "\n".join(lines)


def list_shipped() -> ShippedConfigs:
    """Return the shipped configurations with a line on each, from the head of its file."""
    summaries = {}
    for name, path in shipped_configs().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        head = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        sentence = " ".join(head).partition(". ")[0].partition(" pipeline ")[0].rstrip(".")
        summaries[name] = sentence if len(sentence) < LONGEST_SUMMARY else sentence.partition(": ")[0]
    return ShippedConfigs(summaries)


def list_settings(name: str | None, sets: Sequence[str]) -> ConfigSettings:
    """Return every setting of a configuration; raise ConfigError where its file or a `KEY=VALUE` of sets is wrong."""
    from pipeline.config import (
        apply_setting,
        find_config,
        is_rebalance_only,
        load_config,
        make_rebalance_config,
        read_tree,
    )

    folder = images_folder(name) if name else None
    if folder:
        from pipeline.proposal import propose

        proposal = propose(folder)
    path = folder or find_config(name)
    tree: dict[str, Any] = proposal.tree() if folder else read_tree(path)
    typed: dict[str, Any] = {}
    for text in sets:
        apply_setting(typed, text)
    if is_rebalance_only(tree):
        for text in sets:
            apply_setting(tree, text)
        values = {"name": path.stem} | tree
        values["rebalance"] = make_rebalance_config(tree, str(path)).model_dump(mode="json")
        tree = read_tree(path)
    else:
        config = proposal.config(sets) if folder else load_config(path, sets)
        values = config.model_dump(mode="json") | {"rebalance": config.rebalance.model_dump(mode="json")}
    rows = []
    for section in setting_sections().values():
        for item in section.fields.values():
            if "[" in section.path or item.key.partition(".")[0] not in values:
                continue
            origin = (
                "--set"
                if _has(typed, item.key)
                else ("images" if folder else "file")
                if _has(tree, item.key)
                else "default"
            )
            rows.append(SettingValue(item, _at(values, item.key), origin))
    return ConfigSettings(values["name"], path, tuple(rows))


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _has(tree: Any, key: str) -> bool:
    """Return True where a tree holds a key such as `backbone.weaken.gamma`."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


@click.command(
    "config",
    cls=Command,
    example="pipeline config digits-lt --set backbone.epochs=10",
)
@click.argument("name", required=False, shell_complete=configs)
@settings
@shared
def config_command(name, sets, as_json, debug):
    """List every setting of a configuration: its value, where the value comes from, its default and its meaning.

    NAME is a file, the name of a shipped configuration, or a folder of images. Without NAME and --set, list the shipped
    configurations.
    """
    show(list_settings(name, sets) if name or sets else list_shipped(), as_json)


COMMANDS = (config_command,)
