"""The Tab key in real shells: what is offered, quickly, and nothing heavy loaded for it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import cli, invoke
from pipeline.method_names import METHODS
from pipeline.shipped import shipped_configs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path):
    """A working folder with runs, and `pipeline` on the path as a shell would find it."""
    for run in ("cifar", "digits/seed-0", "digits/seed-1"):
        (tmp_path / "runs" / run / "features.zarr").mkdir(parents=True)
        (tmp_path / "runs" / run / "features.zarr" / "zarr.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "pipeline"
    command.write_text(f"#!{sys.executable}\nfrom pipeline.cli import main\nmain()\n")
    command.chmod(0o755)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def offered(place: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words, by the script that `pipeline completion bash` prints."""
    line = " ".join(("pipeline", *words))
    script = f"""eval "$(pipeline completion bash)"
COMP_LINE='{line}'; COMP_WORDS=({line} {"''" if words[-1:] == ("",) else ""}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
compopt() {{ :; }}
_pipeline_completion pipeline; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=place, env=environment(place), capture_output=True, text=True
    )
    assert not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_offers_commands_options_names_and_runs(place):
    assert sorted(offered(place, "re")) == ["rebalance", "report", "reproduce"]
    assert {"--lam", "--dry-run", "--set", "--nnodes"} <= set(offered(place, "rebalance", "--"))
    assert offered(place, "train-backbone", "cifar10-") == ["cifar10-lt"]
    assert set(offered(place, "run", "")) >= set(shipped_configs())
    assert offered(place, "rebalance", "--method", "ba") == ["baseline", "balanced-softmax"]
    assert offered(place, "rebalance", "--formulation", "p") == ["paper"]
    assert offered(place, "report", "runs/d") == ["runs/digits", "runs/digits/seed-0", "runs/digits/seed-1"]
    assert "runs/cifar/features.zarr" in offered(place, "verify", "runs/c")
    assert offered(place, "completion", "") == ["bash", "zsh", "fish"]
    assert offered(place, "bench", "") == ["cache", "heads", "rebalance", "train"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_takes_the_script(place):
    script = """autoload -U compinit; compinit -u -D; eval "$(pipeline completion zsh)"; whence -w _pipeline_completion
print ${_comps[pipeline]}"""
    done = subprocess.run(
        ["zsh", "-f", "-c", script], cwd=place, env=environment(place), capture_output=True, text=True
    )
    assert done.stdout.split() == ["_pipeline_completion:", "function", "_pipeline_completion"], done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_offers_the_same(place):
    script = "pipeline completion fish | source; complete -C 'pipeline rebalance --method ba'"
    env = environment(place) | {"HOME": str(place)}
    done = subprocess.run(["fish", "-N", "-c", script], cwd=place, env=env, capture_output=True, text=True)
    wanted = [f"{name}\t{METHODS[name].replace(',', ';')}" for name in ("balanced-softmax", "baseline")]
    assert done.stdout.splitlines() == wanted, done.stderr


def test_a_word_is_completed_at_once_and_without_heavy_imports(place):
    code = (
        "import sys; from pipeline.cli import cli; from pipeline.cli.completion import configs, methods, stores; "
        "configs(None, None, ''), methods(None, None, ''), stores(None, None, ''); "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'rich', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment(place), capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        words = environment(place) | {
            "COMP_WORDS": "pipeline run dig",
            "COMP_CWORD": "2",
            "_PIPELINE_COMPLETE": "bash_complete",
        }
        told = subprocess.run([place / "bin/pipeline"], cwd=place, env=words, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert "plain,digits-lt" in told.stdout
    assert min(seconds) < 1  # 0.1 s on a machine with nothing else to do


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_help_says_how_to_keep_it(shell, capsys):
    assert invoke(["completion", "--help"]) == 0
    assert f"pipeline completion {shell} >" in capsys.readouterr().out
    assert invoke(["completion", shell]) == 0
    assert "_PIPELINE_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("rebalence", "rebalance"), ("train", "train-backbone"), ("dump", "dump-features"), ("repot", "report")],
)
def test_a_mistyped_command_is_understood(typed, meant, capsys):
    assert invoke([typed]) == 2
    told = capsys.readouterr().err
    assert f"No such command '{typed}'." in told
    assert "Did you mean" in told
    assert f"'{meant}'" in told


def test_the_page_of_commands_says_which_has_no_json():
    import click

    def leaves(command):
        if isinstance(command, click.Group):
            return [leaf for inner in command.commands.values() for leaf in leaves(inner)]
        return [command]

    without = [c.name for c in leaves(cli) if not any("--json" in option.opts for option in c.params)]
    assert without == ["completion"]
    assert "every command but `completion` has `--json`" in (ROOT / "docs" / "commands.md").read_text()
