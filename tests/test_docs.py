"""Every code block of the pages: run, or checked as its mark says. A block of a kind that nobody checks fails."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import yaml

from pipeline.cli import cli, invoke
from pipeline.config import Config, apply_setting, find_config, is_rebalance_only, make_config, read_tree
from pipeline.errors import ConfigError
from tests.markdown import PAGES, ROOT, Block, blocks, command_lines, pipeline_words, prose
from tests.small_run import made_store

COMMANDS = cli.commands
SHELL, OUTPUT = ("bash", "sh"), ("", "text")
SHORT = {  # settings that make a command of a page take seconds
    "docs/backbones.md": {"dump-features": ["dump.views=2"], "rebalance": ["rebalance.epochs=1", "rebalance.lam=0.1"]},
    "docs/cluster.md": {"train-backbone": ["backbone.epochs=2"], "dump-features": ["dump.views=2"]},
    "docs/weakening.md": {"run": ["backbone.epochs=2", "rebalance.epochs=2", "dump.views=2"]},
    "docs/methods.md": {"rebalance": ["rebalance.epochs=2", "rebalance.trials=2"]},
}
OTHERS = ("docker", "export", "pip", "printf", "pytest", "python3", "ruff", "run", "sphinx-build")  # first words


def checked_command(words: list[str], where: str) -> None:
    """That the command, its options and their values, and its settings are real."""
    command = COMMANDS.get(words[0])
    assert command is not None, f"{where}: no command {words[0]}"
    if isinstance(command, click.Group):
        command, words = command.commands[words[1]], words[1:]
    try:
        parameters = command.make_context(words[0], list(words[1:])).params
    except click.exceptions.Exit:  # --help, --version
        return
    except click.UsageError as error:
        raise AssertionError(f"{where}: pipeline {' '.join(words)}: {error.format_message()}") from error
    sets, name = parameters.get("sets") or (), parameters.get("config")
    if not sets:
        return
    try:
        path = find_config(name)
    except ConfigError:  # a file of the page, or a placeholder
        path = find_config(None)
    tree = read_tree(path)
    if is_rebalance_only(tree):
        tree |= {"data": {"source": "digits"}}
    tree.setdefault("name", "page")
    for text in sets:
        apply_setting(tree, text)
    make_config(tree, where)


def checked_yaml(block: Block) -> None:
    """That a configuration, or a part of one, is in the words of the schema; that key maps compile."""
    tree = yaml.safe_load(block.text)
    if tree.keys() <= Config.model_fields.keys():
        make_config({"name": "page", "data": {"source": "digits"}} | tree, str(block))
    elif "services" in tree:
        for name, service in tree["services"].items():
            words = service.get("command", "")
            words = shlex.split(words) if isinstance(words, str) else words
            if words:
                checked_command(words, f"{block}, service {name}")
    else:
        assert all(isinstance(v, str | None) for v in tree.values()), f"{block}: neither a configuration nor a key map"
        [re.compile(pattern) for pattern in tree]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page):
    before = None
    for block in blocks(page):
        kind = block.language
        if block.mark in ("run", "test"):
            assert page == "README.md", f"{block}: only .ci/run runs such blocks"
            for part in re.split(r"&&", block.text):
                if (words := pipeline_words(part.strip())) is not None:
                    checked_command(words, str(block))
        elif kind in SHELL and block.mark == "parsed":
            assert len(block.reason) > 8, f"{block}: parsed, but why is it not run?"
            for line in command_lines(block.text):
                if (words := pipeline_words(line)) is not None:
                    checked_command(words, str(block))
                else:
                    assert Path(shlex.split(line)[0]).name in OTHERS, f"{block}: nobody checks `{line}`"
        elif kind in SHELL or kind == "python":
            assert not block.mark, f"{block}: marked {block.mark!r}"
        elif kind == "yaml":
            assert block.mark in ("", "parsed"), f"{block}: marked {block.mark!r}"
            checked_yaml(block)
        elif kind in OUTPUT:
            assert block.mark in ("prints", "sample", "formula"), f"{block}: whose output, or when was it printed?"
            if block.mark == "sample":
                assert re.search(r"20\d\d-\d\d", block.reason), f"{block}: a sample of when?"
            if block.mark == "prints":
                assert before is not None, f"{block}: prints what?"
                assert before.language in (*SHELL, "python")
                assert before.mark != "parsed"
        else:
            pytest.fail(f"{block}: nobody checks blocks of kind {kind!r}")
        before = block


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_prose_have_real_options(page):
    text = prose(page)
    assert not re.search(r"^    (\w+\$ )?pipeline ", text, re.M), "an indented command is run by nobody: fence it"
    for span in re.findall(r"`(pipeline [a-z][^`]*)`", text):
        words = shlex.split(" ".join(span.split()))[1:]
        if any("…" in word for word in words) or not words[0].replace("-", "").isalpha() or words[0].isupper():
            continue
        command = COMMANDS.get(words[0])
        assert command is not None, span
        group = command.commands.values() if isinstance(command, click.Group) else [command]
        known = {option for c in group for p in c.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{page}: `{span}`: no option {word}"


ELSEWHERE = ("docs/docker.md",)  # its options are docker's; tests/test_container.py knows them


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_options_that_are_named_exist(page):
    everywhere = {option for c in COMMANDS.values() for p in c.params for option in (*p.opts, *p.secondary_opts)}
    groups = [c for c in COMMANDS.values() if isinstance(c, click.Group)]
    everywhere |= {option for g in groups for c in g.commands.values() for p in c.params for option in p.opts}
    named = set(re.findall(r"`(--[a-z][\w-]*)", prose(page))) - {"--help", "--version"}
    assert named <= everywhere, f"{page}: no such option: {sorted(named - everywhere)}"


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}: no such heading"


# what lies in the folder in which a page is run


def small_digits(folder: Path, *options: str) -> Path:
    sets = ["backbone.epochs=3", "dump.views=2", "rebalance.epochs=3"]
    words = ["run", "digits-lt", "--out", str(folder / "runs/digits-lt"), *options]
    with contextlib.redirect_stdout(io.StringIO()):
        assert invoke([*words, *(word for text in sets for word in ("--set", text))]) == 0
    return folder


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """runs/digits-lt as the commands make it, trained for three epochs."""
    return small_digits(tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="session")
def digits_seeds(tmp_path_factory) -> Path:
    """The same of two backbones."""
    return small_digits(tmp_path_factory.mktemp("docs"), "--seeds", "0,1")


def with_seeds(request, folder):
    shutil.copytree(request.getfixturevalue("digits_seeds"), folder, dirs_exist_ok=True)


def with_run(request, folder):
    shutil.copytree(request.getfixturevalue("digits_run"), folder, dirs_exist_ok=True)


def with_store(request, folder):
    made_store(folder / "features.zarr")


def with_training(request, folder):
    shutil.copytree(request.getfixturevalue("tiny_backbone").parent, folder, dirs_exist_ok=True)


def with_foreign_files(request, folder):
    import torch
    from safetensors.torch import save_file

    from tests.backbone.test_external_checkpoint import network

    state = network("resnet18", 1000).state_dict()
    save_file(state, folder / "resnet18.safetensors")
    moco = {f"module.encoder_{which}.{key}": tensor for which in "qk" for key, tensor in state.items()}
    torch.save({"state_dict": moco}, folder / "moco.pth")


def with_small_cifar(request, folder):
    images, labels = np.zeros((300, 8, 8, 3), np.uint8), np.arange(300) % 100
    names = np.array([str(c) for c in range(100)])
    splits = {f"{s}_{what}": a for s in ("train", "test") for what, a in (("images", images), ("labels", labels))}
    np.savez(folder / "cifar100.npz", class_names=names, **splits)


PREPARED = {
    "docs/backbones.md": with_foreign_files,
    "docs/cache.md": with_store,
    "docs/choosing.md": with_seeds,
    "docs/commands.md": with_run,
    "docs/method.md": with_run,
    "docs/methods.md": with_run,
    "docs/own-method.md": with_run,
    "docs/python.md": with_run,
    "docs/surviving.md": with_training,
    "docs/weakening.md": with_small_cifar,
}


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """What is printed, text or bytes, as a function that tells it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(stream):
        yield lambda: stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def run_shell(block: Block) -> str:
    """What its commands print; commands of ours alone are run in this process, anything else by bash."""
    lines = command_lines(block.text)
    short = {c: [w for s in sets for w in ("--set", s)] for c, sets in SHORT.get(block.page, {}).items()}
    if all(line.startswith("pipeline ") and not re.search(r"[&|>;$*]", line) for line in lines):
        with captured() as printed:
            for line in lines:
                words = shlex.split(line)[1:]
                assert invoke([*words, *short.get(words[0], [])]) == 0, f"{block}: {line}"
        return printed()
    bin_folder = Path(sys.executable).parent
    known = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    text = block.text
    for command, sets in short.items():
        text = re.sub(rf"(pipeline {command} \S+)", rf"\1 {' '.join(sets)}", text)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], env=known, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{block}: {done.stderr[-2000:]}"
    return done.stdout


def bare(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


QUICK = ("docs/surviving.md", "docs/training.md")
RUN = [page for page in PAGES if any(b.language in ("python", *SHELL) and b.mark == "" for b in blocks(page))]


@pytest.mark.usefixtures("methods_as_before")
@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in RUN]
)
def test_its_blocks_run_and_print_what_it_says(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    PREPARED.get(page, lambda request, folder: None)(request, tmp_path)
    names: dict = {}
    printed = ""
    for block in blocks(page):
        if block.language == "yaml" and (first := re.match(r"# (\S+\.ya?ml)\n", block.text)):
            Path(first[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            if first := re.match(r"# (\S+\.py)\n", block.text):
                Path(first[1]).write_text(block.text, encoding="utf-8")
            with captured() as told:
                exec(compile("\n" * block.line + block.text, page, "exec"), names)
            printed = told()
        elif block.language in SHELL and block.mark == "":
            printed = run_shell(block)
        elif block.mark == "prints":
            assert bare(block.text) == bare(printed), f"{block}: it printed\n{printed}"
    for folder in ("docs", "configs"):
        assert not (tmp_path / folder).exists()


def test_the_weighting_of_ones_own_leaves_out_a_class_without_test_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (path := Path("runs/digits-lt/seed-0/rebalance/per_class.csv")).parent.mkdir(parents=True)
    path.write_text("method,lam,split,images,correct,total\ncb,,test,30,3,4\ncb,,test,10,1,4\ncb,,test,60,0,0\n")
    (block,) = (b for b in blocks("docs/choosing.md") if b.language == "python")
    exec(block.text, {})
    assert capsys.readouterr().out == "cb : 62.5 % of images mixed as in training\n"  # (30 · ¾ + 10 · ¼) / 40


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/reference.html").read_text(encoding="utf-8")
    import cache
    import pipeline

    for name in pipeline.__all__:
        assert f'.{name}"' in reference, name
    for name in cache.__all__:
        assert f'.{name}"' in reference, name
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / page.with_suffix(".html").name).is_file()
