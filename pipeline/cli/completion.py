"""completion: what the Tab key offers in bash, zsh and fish, each word made without a heavy import.

What stands for files or folders comes first: bash's script forgets all words before it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from pipeline.cli.options import Examples
from pipeline.method_names import METHODS
from pipeline.shipped import shipped_configs

INSTALL = {
    "bash": "pipeline completion bash >> ~/.bashrc",
    "zsh": "pipeline completion zsh >> ~/.zshrc    (below its compinit)",
    "fish": "pipeline completion fish > ~/.config/fish/completions/pipeline.fish",
}


def configs(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Shipped names, and files."""
    return [CompletionItem(incomplete, type="file"), *_starting(shipped_configs(), incomplete)]


def runs(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Runs under ./runs, those of several backbones with each of them, and folders."""
    found = [
        folder for pattern in ("*", "*/seed-*") for folder in sorted(Path("runs").glob(pattern)) if folder.is_dir()
    ]
    return [CompletionItem(incomplete, type="dir"), *_starting(map(str, found), incomplete)]


def stores(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Feature stores under ./runs beside the runs themselves."""
    found = [
        str(root.parent) for pattern in ("*", "*/seed-*") for root in Path("runs").glob(f"{pattern}/*.zarr/zarr.json")
    ]
    return [*runs(context, parameter, incomplete), *_starting(sorted(found), incomplete)]


def methods(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Methods of stage 2 with what they do, and files, which may define others."""
    known = METHODS | {"all": "every one of them"}
    # fish takes what follows a comma for another word
    found = [
        CompletionItem(name, help=of.replace(",", ";")) for name, of in known.items() if name.startswith(incomplete)
    ]
    return [CompletionItem(incomplete, type="file"), *found]


def _starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command(
    "completion",
    short_help="Let the Tab key complete commands, in your shell.",
    cls=Examples,
    example='eval "$(pipeline completion bash)"',
    lists={"To keep it, once": INSTALL},
)
@click.argument("shell", type=click.Choice(list(INSTALL)))
@click.pass_context
def completion_command(context, shell):
    """The script that lets the Tab key complete commands, options, configurations, methods and runs; bash from 4.4 on."""
    of_shell = get_completion_class(shell)
    assert of_shell is not None
    click.echo(of_shell(context.find_root().command, {}, "pipeline", "_PIPELINE_COMPLETE").source())


COMMANDS = (completion_command,)
