"""The command line: parse, call one public function, print. Heavy libraries are imported inside the commands."""

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS = {  # name → module of this package, line in the help; in the order of use
    "init": ("init", "Look at a folder of images and write settings for it."),
    "run": ("stages", "Train, dump, rebalance and report in one go."),
    "train-backbone": ("stages", "Stage 1: train, or continue, encoder and classifier."),
    "dump-features": ("stages", "Run the encoder once over every image into a store."),
    "import-features": ("import_features", "Make a feature store of features computed elsewhere."),
    "rebalance": ("features", "Stage 2: fit classifiers on features, many λ at once."),
    "evaluate": ("features", "Print the table of given heads on a split."),
    "verify": ("features", "Check every byte of a feature store."),
    "report": ("artefacts", "Write an interactive HTML page of one or several runs."),
    "progress": ("artefacts", "Compare how evenly trainings learn their classes."),
    "export": ("artefacts", "Write the whole model, or a store, as plain files."),
    "predict": ("artefacts", "Label images with an exported model or a run."),
    "info": ("artefacts", "Print what an artefact is and what made it."),
    "doctor": ("artefacts", "Print versions and devices; run a self-test."),
    "config": ("config", "List all settings, or the shipped configurations."),
    "reproduce": ("reproduce", "Make the paper's tables from images, with deviations."),
    "bench": ("bench", "Measure speed and memory on this machine."),
    "completion": ("completion", "Let the Tab key complete commands, in your shell."),
}


class LazyCommands(Mapping[str, click.Command]):
    """The commands by name; the module of a command is imported when the command is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        module, line = COMMANDS[name]
        command = next(c for c in import_module(f"pipeline.cli.{module}").COMMANDS if c.name == name)
        command.short_help = line
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(click.Group):
    """A group that lists its commands in the order of use and, for a beginning of a name, suggests the commands.

    click itself suggests names that look alike.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            matches = [name for name in COMMANDS if name.startswith(args[0])]
            if error.possibilities or not matches:
                raise
            raise click.UsageError(f"{error.message} Did you mean {' or '.join(map(repr, matches))}?", ctx) from None


@click.group(cls=Commands, commands=LazyCommands(), context_settings=CONTEXT)
@click.version_option(package_name="iwb-pipeline", prog_name="pipeline")
def cli() -> None:
    """Train an image classifier once on unbalanced classes, re-balance it in seconds.

    \b
    The three steps:  pipeline train-backbone
                      pipeline dump-features
                      pipeline rebalance --lam 0.05
    All in one:       pipeline run FOLDER-OF-IMAGES
    """


def invoke(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from pipeline.cli.exit_codes import exit_code

    return exit_code(cli, sys.argv[1:] if arguments is None else arguments)


def main() -> None:
    """Run the command line and exit; the entry point of the console script.

    A stream that is closed takes nothing, one of few letters gets question marks for the others, and one that is full is a
    failure of its own: what the command wrote is there.
    """
    import os

    sys.stdout, sys.stderr = (open(os.devnull, "w") if s is None else s for s in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    code = invoke()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code if isinstance(error, BrokenPipeError) else code or 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try, and complain, once more
    sys.exit(code)
