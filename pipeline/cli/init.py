"""The command init: settings for a folder of images, with the reason for each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.cli.exit_codes import show
from pipeline.cli.options import PATH, Command, option, shared
from pipeline.errors import ConfigError
from pipeline.text import Shown


@dataclass(frozen=True)
class InitResult(Shown):
    """The settings proposed for a folder of images, and the file that they were written to."""

    proposal: Any
    file: Path
    next_command: str

    def to_dict(self) -> dict[str, Any]:
        return {"out": str(self.file), **self.proposal.to_dict(), "next": self.next_command}

    def __str__(self) -> str:
        return f"{self.proposal}\nwritten: {self.file}; change what you know better, then: {self.next_command}"


@click.command("init", cls=Command, example="pipeline init photos")
@click.argument("folder", type=PATH)
@option("--out", type=PATH, metavar="FILE", help="File of the settings.", shown_default="pipeline.yaml")
@option("--overwrite", is_flag=True, help="Replace a file that is there.")
@shared
def init_command(folder, out, overwrite, as_json, debug):
    """Look at a folder of images and write a configuration for it, with the reason for every choice.

    FOLDER has a folder for each class, or train, val and test with such folders. Counts, sizes, formats and odd files are
    printed; encoder, image size and splits are chosen by them. `pipeline run FOLDER` takes the same settings without a file.
    """
    from cache import write_durably
    from pipeline.proposal import FILE, propose

    file = out or Path(FILE)
    if file.exists() and not overwrite:
        raise ConfigError(f"{file}: exists; replace it with --overwrite, or write to another file with --out")
    proposal = propose(folder)
    write_durably(file, proposal.yaml_text(file))
    show(InitResult(proposal, file, "pipeline run" if out is None else f"pipeline run {file}"), as_json)


COMMANDS = (init_command,)
