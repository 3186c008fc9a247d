"""What commands share: the options every one has, and how an option's text is read."""

from pathlib import Path
from typing import Any

import click

from pipeline.cli.job import GROUP, HostOption, job_options
from pipeline.errors import ConfigError


class Folder(click.Path):
    """A file or folder of this machine; of all artefacts only a feature store may be elsewhere."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if "://" in str(value):
            self.fail(f"{value}: expected a path on this machine; only feature stores may be URLs", param, ctx)
        return super().convert(value, param, ctx)


class Store(click.ParamType):
    """A feature store: a folder, or a URL such as s3://bucket/path, which stays text."""

    name = "store"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path | str:
        if "://" not in str(value):
            return Path(value)
        from cache import CacheError, locate

        try:
            return str(locate(value))
        except CacheError as error:
            self.fail(str(error), param, ctx)


PATH = Folder(path_type=Path)
STORE = Store()


class Examples(click.Command):
    """A command whose help ends with an example that works as it stands, after lists of names with what they mean."""

    def __init__(self, *args: Any, example: str = "", lists: dict[str, dict[str, str]] | None = None, **kwargs: Any):
        parts = [_listing(title, lines) for title, lines in (lists or {}).items()]
        kwargs["epilog"] = "\n\n".join(parts + ([f"\b\nExample:\n  {example}"] if example else [])) or None
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], GROUP: []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                groups[GROUP if isinstance(parameter, HostOption) else "Options"].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _listing(title: str, lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join([f"\b\n{title}:", *(f"  {name:<{width}}  {text}" for name, text in lines.items())])


def shared(command: Any) -> Any:
    """The options every command has."""
    command = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")(
        command
    )


def dry_run(command: Any) -> Any:
    """--dry-run, of every command that writes."""
    return click.option(
        "--dry-run", is_flag=True, help="Check all, say what would be done and written, and write nothing."
    )(command)


def settings(command: Any) -> Any:
    """--set, of every command that takes a configuration."""
    return click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a configuration key, such as backbone.epochs=10.",
    )(command)


def on_error(command: Any) -> Any:
    """--on-error, of the commands that read the images of a configuration."""
    return click.option(
        "--on-error",
        type=click.Choice(["fail", "skip"]),
        help="Whether an image that cannot be read ends the work or is left out [default: the configuration's; fail].",
    )(command)


def workers(command: Any) -> Any:
    """--device, --nproc and the options of several hosts, of the commands that compute on them."""
    command = job_options(command)
    command = click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute."
    )(command)
    return click.option(
        "--nproc",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Processes on this host (torchrun); one a GPU.",
    )(command)


def key_map(command: Any) -> Any:
    """--key-map, of the commands that take anybody's checkpoint."""
    return click.option(
        "--key-map",
        type=PATH,
        help="YAML or JSON lines `pattern: replacement` that turn the checkpoint's names of tensors into timm's.",
    )(command)


def encoder(command: Any) -> Any:
    """--encoder, of the commands that can take a pretrained network as it is."""
    return click.option(
        "--encoder",
        metavar="NAME",
        help="A pretrained network instead of training one: lite0, lite1, lite2 (weights by pip), a timm name, hf-hub:…, "
        "local-dir:… or a file.",
    )(command)


def with_encoder(sets: Any, name: str | None, checkpoint: Any) -> tuple[str, ...]:
    """The settings with those that --encoder means; ConfigError where --checkpoint names another network."""
    if name is None:
        return tuple(sets)
    if checkpoint is not None:
        raise ConfigError(f"--encoder {name} and --checkpoint {checkpoint} both name a network; leave one of them away")
    return (*sets, f"backbone.encoder={name}")


def probe(command: Any) -> Any:
    """--probe, of the same."""
    return click.option(
        "--probe", is_flag=True, help="Leave the checkpoint's head out and fit a linear probe on the features."
    )(command)


def typed(sets: Any, key: str) -> str | None:
    """What the last --set of a key says, None where there is none."""
    values = [value.strip() for name, _, value in (text.partition("=") for text in sets) if name.strip() == key]
    return values[-1] if values else None


def whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """The different numbers, each 0 or more, of a text such as 0,1,2; ConfigError naming the option."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise ConfigError(f"{option} {text}: expected different whole numbers such as 0,1,2")
    return numbers


def number(text: str) -> float | str:
    """The number a text means, or the text."""
    try:
        return float(text)
    except ValueError:
        return text
