"""Words that the Tab key offers in bash, zsh and fish, made without a heavy import, and the command `completion`.

The item that stands for files or folders comes first, since bash's script drops the words before it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from pipeline.cli.options import Command
from pipeline.method_names import METHODS
from pipeline.shipped import shipped_configs

INSTALL = {
    "bash": "pipeline completion bash >> ~/.bashrc",
    "zsh": "pipeline completion zsh >> ~/.zshrc    (below its compinit)",
    "fish": "pipeline completion fish > ~/.config/fish/completions/pipeline.fish",
}


def configs(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Return the names of shipped configurations, and files."""
    return [CompletionItem(incomplete, type="file"), *_starting(shipped_configs(), incomplete)]


def runs(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Return the runs under ./runs, with the backbones of those that have several, and folders."""
    folders = [path for pattern in ("*", "*/seed-*") for path in sorted(Path("runs").glob(pattern)) if path.is_dir()]
    return [CompletionItem(incomplete, type="dir"), *_starting(map(str, folders), incomplete)]


def stores(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Return the runs under ./runs and their feature stores."""
    roots = [root for pattern in ("*", "*/seed-*") for root in Path("runs").glob(f"{pattern}/*.zarr/zarr.json")]
    return [*runs(context, parameter, incomplete), *_starting(sorted(str(root.parent) for root in roots), incomplete)]


def methods(context: Any, parameter: Any, incomplete: str) -> list[CompletionItem]:
    """Return the methods of stage 2 with a line on each, and files, which may define others."""
    matches = [
        CompletionItem(name, help=text.replace(",", ";"))  # fish takes the text behind a comma for another word
        for name, text in (METHODS | {"all": "every one of them"}).items()
        if name.startswith(incomplete)
    ]
    return [CompletionItem(incomplete, type="file"), *matches]


def _starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command(
    "completion",
    cls=Command,
    example='eval "$(pipeline completion bash)"',
    lists={"To keep it, once": INSTALL},
)
@click.argument("shell", type=click.Choice(list(INSTALL)))
@click.pass_context
def completion_command(context, shell):
    """Print the script that lets the Tab key complete commands, options, configurations, methods and runs; bash from 4.4."""
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    click.echo(shell_class(context.find_root().command, {}, "pipeline", "_PIPELINE_COMPLETE").source())


COMMANDS = (completion_command,)
