"""The command line: parse, call one public function, print. Heavy libraries are imported inside the commands."""

import sys
from typing import Any

import click

from pipeline.cli import artefacts, bench, completion, config, features, import_features, reproduce, stages
from pipeline.cli.exit_codes import exit_code

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Commands(click.Group):
    """A group that lists its commands in the order of use and, for a beginning of a name, suggests the commands.

    click itself suggests names that look alike.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            matches = [name for name in self.list_commands(ctx) if name.startswith(args[0])]
            if error.possibilities or not matches:
                raise
            raise click.UsageError(f"{error.message} Did you mean {' or '.join(map(repr, matches))}?", ctx) from None


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="iwb-pipeline", prog_name="pipeline")
def cli() -> None:
    """Train an image classifier once on unbalanced classes, re-balance it in seconds.

    \b
    The three steps:  pipeline train-backbone
                      pipeline dump-features
                      pipeline rebalance --lam 0.05
    All in one:       pipeline run digits-lt
    """


for _group in (stages, import_features, features, artefacts, config, reproduce, bench, completion):
    for _command in _group.COMMANDS:
        cli.add_command(_command)


def invoke(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(cli, sys.argv[1:] if arguments is None else arguments)


def main() -> None:
    """Run the command line and exit; the entry point of the console script."""
    sys.exit(invoke())
