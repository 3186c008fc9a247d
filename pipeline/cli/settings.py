"""All settings of a configuration with type, default and description, for options, `pipeline config` and the docs.

They are read from the source text of pipeline/config/, since importing pydantic would take most of the time of `--help`.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

REQUIRED = object()  # default of a setting that has none
LIMITS = {"ge": "{} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
KINDS = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", dict: "mapping"}
SECTIONS = {"": "Config", "data": "DataConfig", "backbone": "BackboneConfig", "backbone.weaken": "WeakenConfig"}
SECTIONS |= {"dump": "DumpConfig", "rebalance": "RebalanceConfig", "rebalance.variants[]": "Variant"}


@dataclass(frozen=True)
class SettingField:
    """One setting, as its pydantic field declares it.

    Arguments:
        key: its name after --set, such as `backbone.weaken.gamma`.
        annotation: the type of its value.
        default: the value without a configuration; REQUIRED where there is none, None where the description says more.
        limits: the constraints `ge`, `gt`, `le` and `lt` of a number.
        description: a sentence; behind `; null` it says what a missing value means.
    """

    key: str
    annotation: Any
    default: Any
    limits: Mapping[str, float]
    description: str

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, without None."""
        return tuple(part for part in _parts(self.annotation) if part is not NoneType)

    @property
    def range(self) -> str:
        """The limits in words, such as `0 or more, below 1`; empty where there are none."""
        return ", ".join(LIMITS[name].format(f"{limit:g}") for name, limit in self.limits.items())

    @property
    def values(self) -> str:
        """The values that are allowed, in words."""
        return " or ".join(map(_in_words, self.kinds)) + (f", {self.range}" if self.range else "")

    @property
    def default_text(self) -> str:
        """The default as one types it."""
        if self.default is REQUIRED:
            return "none"
        return self.default if isinstance(self.default, str) else json.dumps(self.default, ensure_ascii=False)


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _in_words(kind: Any) -> str:
    values = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(values)
    if get_origin(kind) is tuple:
        return f"list of {_in_words(values[0])}s" if values[-1] is ... else f"{len(values)} {_in_words(values[0])}s"
    return KINDS.get(get_origin(kind) or kind, kind.__name__.lower())


@dataclass(frozen=True)
class SettingSection:
    """The settings of one class of pipeline/config/, by name; path is its key in a configuration, description its docstring."""

    path: str
    description: str
    fields: Mapping[str, SettingField] = field(default_factory=dict)


@cache
def setting_sections() -> dict[str, SettingSection]:
    """Return the sections of a configuration by path, in the order of SECTIONS."""
    sources = Path(__file__).resolve().parents[1].joinpath("config").glob("*.py")
    nodes = [node for source in sources for node in ast.parse(source.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    types: dict[str, Any] = {name: type(name, (), {}) for name in classes} | {
        "Literal": Literal,
        "Any": Any,
        "Path": Path,
    }
    sections = {}
    for path, name in SECTIONS.items():
        lines = [node for node in classes[name].body if isinstance(node, ast.AnnAssign)]
        fields = [_read_field(f"{path}.".lstrip("."), line, types) for line in lines]
        settings = {item.name: item for item in fields if getattr(item.annotation, "__name__", "") not in classes}
        sections[path] = SettingSection(path, ast.get_docstring(classes[name]) or "", settings)
    return sections


def _read_field(prefix: str, line: ast.AnnAssign, types: dict[str, Any]) -> SettingField:
    """Return the field of a line `name: annotation = Field(default, ge=…, description=…)`."""
    assert isinstance(line.target, ast.Name)
    assert isinstance(line.value, ast.Call), f"{line.target.id}: no Field with a description"
    annotation = eval(compile(ast.Expression(line.annotation), "pipeline/config", "eval"), dict(types))
    arguments = {word.arg: word.value for word in line.value.keywords}
    default: Any = REQUIRED
    if line.value.args:
        default = None if isinstance(line.value.args[0], ast.Call) else ast.literal_eval(line.value.args[0])
    elif "default_factory" in arguments:
        default = None
    limits = {name: ast.literal_eval(arguments[name]) for name in LIMITS if name in arguments}
    return SettingField(
        prefix + line.target.id, annotation, default, limits, ast.literal_eval(arguments["description"])
    )
