"""Options of the command line: those made from the settings, those that commands share, and how their texts are read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from pipeline.cli.settings import REQUIRED, setting_sections
from pipeline.errors import ConfigError

COMMON, EXECUTION = "Common", "Execution"  # groups of a command's help, in the order in which they appear
GROUPS = (COMMON, "Objective", "Tuning", EXECUTION)
HOSTS = "Several hosts (the same command on each; docs/cluster.md)"
WRITTEN = ("out", "page", "store")  # options that name a place to write to
EMPTY = "an empty path; name a folder, or leave the option out"
Decorator = Callable[[Any], Any]


class LocalPath(click.Path):
    """A file or folder of this machine; of all artefacts only a feature store may be elsewhere."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if "://" in str(value):
            self.fail(f"{value}: expected a path on this machine; only feature stores may be URLs", param, ctx)
        if not str(value).strip():
            self.fail(EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class StorePath(click.ParamType):
    """A feature store: a folder, or a URL such as s3://bucket/path, which stays text."""

    name = "store"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path | str:
        if "://" not in str(value):
            if not str(value).strip():
                self.fail(EMPTY, param, ctx)
            return Path(value)
        from cache import CacheError, locate

        try:
            return str(locate(value))
        except CacheError as error:
            self.fail(str(error), param, ctx)


PATH = LocalPath(path_type=Path)
STORE = StorePath()
METAVARS = {click.types.IntRange: "N", click.types.FloatRange: "X", LocalPath: "PATH", StorePath: "FOLDER|URL"}


class Option(click.Option):
    """An option that help shows in a group, its limits in words; shown_default is the default of the program itself."""

    def __init__(self, *args: Any, group: str = COMMON, limits: str = "", shown_default: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group, self.limits, self.shown_default = group, limits, shown_default
        if self.metavar is None:
            self.metavar = METAVARS.get(type(self.type))

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra | {
            key: text for key, text in {"default": self.shown_default, "range": self.limits}.items() if text
        }


def option(*names: str, **kwargs: Any) -> Decorator:
    """Return a decorator that adds an option to a command, as click.option does."""
    return click.option(*names, cls=kwargs.pop("cls", Option), **kwargs)


def setting_option(key: str, *, group: str = COMMON, **kwargs: Any) -> Decorator:
    """Return a decorator that adds the option of a setting: its name, type, limits, default and help are the field's.

    Arguments:
        key: of the setting, such as `rebalance.lr`; the option is --lr, and the command gets None where it is not typed.
        group: the group of the command's help.
        kwargs: further arguments of click.option, such as metavar and shell_complete.
    """
    section, _, name = key.rpartition(".")
    setting = setting_sections()[section].fields[name]
    kind, *alternatives = setting.kinds
    sentence, _, missing = setting.description.rstrip(".").partition("; null ")
    default = missing.removeprefix("takes ") if missing.startswith("takes ") else _typed_default(setting.default)
    names = f"--{name.replace('_', '-')}"
    if kind is bool:
        names += "" if setting.default is False else f"/--no-{name.replace('_', '-')}"
        kwargs["is_flag"] = True
    elif get_origin(kind) is Literal:
        kwargs["type"] = click.Choice(get_args(kind))
    elif kind in (int, float) and not alternatives:
        at = setting.limits
        bounds: Any = {"min": at.get("ge", at.get("gt")), "max": at.get("le", at.get("lt"))}
        bounds |= {"min_open": "gt" in at, "max_open": "lt" in at}
        kwargs["type"] = click.IntRange(**bounds) if kind is int else click.FloatRange(**bounds)
    elif get_args(kind)[:1] == (str,):
        kwargs["multiple"] = True
    return option(
        names, help=f"{sentence}.", default=None, group=group, limits=setting.range, shown_default=default, **kwargs
    )


def _typed_default(value: Any) -> str:
    """Return a default as one types it after an option, or an empty text."""
    if value is REQUIRED or value is None or isinstance(value, bool):
        return "yes" if value is True else ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Command(click.Command):
    """A command whose help shows its options in groups and ends with lists of names and an example that works."""

    def __init__(self, *args: Any, example: str = "", lists: dict[str, dict[str, str]] | None = None, **kwargs: Any):
        parts = [_listing(title, lines) for title, lines in (lists or {}).items()]
        kwargs["epilog"] = "\n\n".join(parts + ([f"\b\nExample:\n  {example}"] if example else [])) or None
        super().__init__(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, unless it would write into an artefact, which holds nothing else."""
        from pipeline.paths import enclosing_artefact

        for parameter in self.params:
            if not isinstance(parameter, Option) or parameter.name not in WRITTEN:
                continue
            place = ctx.params[parameter.name]
            if place is None and parameter.shown_default:  # somewhere below the working folder
                place = Path("runs")
            if place is not None and (artefact := enclosing_artefact(place)):
                raise click.BadParameter(
                    f"{place}: lies in {artefact}, which holds nothing else; name a folder outside with --out",
                    ctx, parameter,
                )  # fmt: skip
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, HOSTS)}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                groups[getattr(parameter, "group", COMMON)].append(record)
        titles = [title for title, records in groups.items() if records]
        for title in titles:
            with formatter.section(title if len(titles) > 1 else "Options"):
                formatter.write_dl(groups[title])


def _listing(title: str, lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join([f"\b\n{title}:", *(f"  {name:<{width}}  {text}" for name, text in lines.items())])


def shared(command: Any) -> Any:
    """Add the options of every command: --json and --debug."""
    command = option("--debug", is_flag=True, help="Show the traceback of an error.")(command)
    return option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")(
        command
    )


dry_run = option("--dry-run", is_flag=True, help="Check everything, print what would be done, and write nothing.")
settings = option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, such as backbone.epochs=10; docs/settings.md lists all.",
)
device = option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda",
    help="Device to compute on.",
    group=EXECUTION,
)
key_map = option(
    "--key-map",
    type=PATH,
    help="File of YAML or JSON lines `pattern: replacement` that turn the checkpoint's names of tensors into timm's.",
)
encoder = setting_option("backbone.encoder", metavar="NAME")
probe = option("--probe", is_flag=True, help="Leave the checkpoint's head out and fit a linear probe on the features.")
out_json = option("--out", type=PATH, help="JSON file to write the result to as well.")


def with_encoder(sets: Sequence[str], name: str | None, checkpoint: Path | None) -> tuple[str, ...]:
    """Return the settings with those of --encoder; raise ConfigError where --checkpoint names another network.

    A configuration made for training may ask for many augmented views: with --encoder only the clean one is encoded, unless
    a setting says otherwise.
    """
    if name is None:
        return tuple(sets)
    if checkpoint is not None:
        raise ConfigError(f"--encoder {name} and --checkpoint {checkpoint} both name a network; leave one of them out")
    views = () if last_value(sets, "dump.views") else ("dump.views=1",)
    return (*sets, *views, f"backbone.encoder={name}")


def encoder_names(text: str | None) -> tuple[str | None, ...]:
    """Return the encoders that --encoder names, several with commas between them; (None,) without the option."""
    if text is None or "," not in text or Path(text).exists():
        return (text,)
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def count(name: str, text: str, *, default: int | None = None, group: str = COMMON) -> Decorator:
    """Return a decorator that adds an option for a whole number of 1 or more."""
    return option(
        name, type=click.IntRange(1), default=default, show_default=True, help=text, group=group, limits="1 or more"
    )


def last_value(sets: Sequence[str], key: str) -> str | None:
    """Return the value that the last `--set KEY=VALUE` gives a key, or None where there is none."""
    values = [value.strip() for name, _, value in (text.partition("=") for text in sets) if name.strip() == key]
    return values[-1] if values else None


def whole_numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """Return the different numbers, each 0 or more, of a text such as 0,1,2; raise ConfigError that names the option."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise ConfigError(f"{name} {text}: expected different whole numbers such as 0,1,2")
    return numbers


def number(text: str) -> float | str:
    """Return the number that a text is, or the text."""
    try:
        return float(text)
    except ValueError:
        return text
