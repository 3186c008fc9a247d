"""The end of a command: its result on stdout, or an error that names the next thing to type; and its exit code."""

import contextlib
import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.cli.job import job_of, without_job
from pipeline.errors import DATA, FAILED, INTERRUPTED, TERMINATED, USAGE, ConfigError, Elsewhere, Lost, PipelineError
from pipeline.hosts import TOLD, in_worker
from pipeline.text import printable

DISTRIBUTED = {"run", "train-backbone", "dump-features", "rebalance"}  # commands that several processes may share
JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what whoever starts processes tells each of them
RESUMING = {"run", "train-backbone", "dump-features", "rebalance", "reproduce"}  # the same command continues them


def show(result: Any, as_json: bool) -> None:
    """Print a result on stdout, on rank 0 only: one JSON document, or text and tables."""
    if int(os.environ.get("RANK", 0)):
        return
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1, allow_nan=False))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    Console(highlight=False, width=width).print(
        result if hasattr(result, "__rich__") or hasattr(result, "__rich_console__") else printable(str(result)),
        markup=False,
    )


def relaunched(nproc: int) -> bool:
    """Run the command in torchrun workers where its options ask for them and return True; exit with their code if they fail."""
    context = click.get_current_context()
    job = job_of(context, nproc=nproc)
    if in_worker() or not (job.nproc > 1 or job.several or job.restarts):
        return False
    if not job.several and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # a rank that somebody else has started
        return False
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: a host without a name is no news
    from pipeline.distributed import refuse_too_many
    from pipeline.launch import launch

    refuse_too_many(job.nproc, context.params.get("device", "auto"))
    code = launch(job, without_job(context.obj))
    if code:
        raise click.exceptions.Exit(code)
    return True


def process_count(nproc: int, device: str) -> int:
    """Return the number of processes on all hosts; raise ConfigError where this host lacks devices for its own."""
    job = job_of(click.get_current_context(), nproc=nproc)
    from pipeline.distributed import refuse_too_many

    refuse_too_many(job.nproc, device)
    return max(job.nodes[1] * job.nproc, int(os.environ.get("WORLD_SIZE", 1)))


def exit_code(command: click.Command, words: list[str]) -> int:
    """Run a command on words, which are its context's `obj`, and return its exit code; only --debug shows tracebacks."""
    try:
        _take_part(words)
        code = command.main(words, prog_name="pipeline", standalone_mode=False, obj=words)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        error.show()
        return _failed(words, error.format_message(), USAGE, printed=True)
    except click.ClickException as error:
        return _failed(words, error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        resumes = "; the same command goes on where it stopped" if RESUMING & set(words[:1]) else ""
        return _failed(words, f"interrupted{resumes}", INTERRUPTED)
    except Elsewhere as error:
        return _recorded(error.exit_code)
    except Lost as error:
        return (
            error.exit_code if TOLD in os.environ or not _first_here() else _failed(words, str(error), error.exit_code)
        )
    except BrokenPipeError:
        return 0  # who reads the output has enough of it; what was to be written is written
    except Exception as error:
        if "--debug" in words:
            import traceback

            traceback.print_exc()
        return _failed(words, *_explained(error))


def _take_part(words: list[str]) -> None:
    """Forget what is left in the environment of a job of several processes, or raise ConfigError where it is half there."""
    present = [name for name in JOB if name in os.environ]
    if not present or in_worker():
        return
    alone = not DISTRIBUTED & set(words[:1]) or "--dry-run" in words or {"--help", "-h"} & set(words)
    if alone or os.environ.get("WORLD_SIZE") == "1":
        for name in (*JOB, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return
    numbers = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK")}
    numbers["LOCAL_RANK"] = numbers["LOCAL_RANK"] or "0"
    missing = [name for name in JOB if name not in present]
    wrong = [name for name, text in numbers.items() if name not in missing and not re.fullmatch("[0-9]{1,9}", text)]
    if missing or wrong or int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        problem = f"{', '.join(missing)} missing" if missing else f"{', '.join(wrong) or 'RANK'} of no use"
        del os.environ["RANK" if "RANK" in os.environ else present[0]]  # so that the error is printed
        raise ConfigError(
            f"{', '.join(present)} in the environment say that this is one of several processes, but {problem}; start them "
            f"with torchrun or --nproc, or forget the job: unset {' '.join(present)}"
        )
    place = f"{os.environ['MASTER_ADDR']}:{numbers['MASTER_PORT']}"
    click.echo(f"process {numbers['RANK']} of {numbers['WORLD_SIZE']}: waiting for the others at {place}", err=True)


def _explained(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code of an exception."""
    if isinstance(error, PipelineError):
        return str(error), error.exit_code
    if type(error).__module__.partition(".")[0] == "cache":
        return str(error), getattr(error, "exit_code", DATA)
    unmapped = isinstance(error, ImportError) and "failed to map segment" in str(error)
    if isinstance(error, MemoryError) or unmapped:
        return (
            f"not enough memory{f' ({error})' if str(error) else ''}; free some, or raise the limit (ulimit -v)",
            FAILED,
        )
    if isinstance(error, OSError) and error.errno is not None:
        advice = {
            errno.ENOSPC: "free some space, then the same command goes on where it stopped",
            errno.EDQUOT: "free some space, then the same command goes on where it stopped",
            errno.EACCES: "choose a folder you may write to with --out, or change its permissions",
            errno.EROFS: "choose a folder you may write to with --out",
            errno.ENOTDIR: "a file is in the way: choose another --out",
            errno.EEXIST: "a file is in the way: choose another --out",
        }.get(error.errno, "see --debug for where it happened")
        name = Path(str(error.filename or "file system"))
        if error.errno == errno.EACCES and name.suffix in (".py", ".so", ".pyc"):
            return (
                f"{name}: {error.strerror}; this installation may not be read: ask its owner, or install it anew",
                FAILED,
            )
        path = name.parent if name.suffix == ".tmp" else name  # the temporary file of a durable write
        return f"{path}: {error.strerror}; {advice}", FAILED
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())[:400]} (this should not happen: --debug shows where)",
        FAILED,
    )


def _failed(words: list[str], message: str, code: int, *, printed: bool = False) -> int:
    if not printed:
        from pipeline.console import Talk

        if code in (TERMINATED, INTERRUPTED):  # no failure
            Talk().say(message)
        else:
            Talk().error(message)
    if "--json" in words and not int(os.environ.get("RANK", 0)):
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"error": printable(message), "exit_code": code}))
    return _recorded(code)


def _recorded(code: int) -> int:
    """Return the exit code; a worker also writes it to the launcher's file, which then does not restart the workers."""
    if TOLD in os.environ and in_worker() and code not in (TERMINATED, INTERRUPTED):
        with contextlib.suppress(OSError):
            Path(os.environ[TOLD]).write_text(str(code))
    return code


def _first_here() -> bool:
    """Return True in the first process of this host, under the user's own torchrun, that lost another process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # …/attempt_N/RANK/error.json
    try:
        if file:
            (Path(file).parents[1] / "lost").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
