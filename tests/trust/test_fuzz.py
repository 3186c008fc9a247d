"""Class E: whatever the bytes, a reader answers or refuses in its own words; a bounded search, after the cases found before."""

import csv
import io
import json
import shutil
import string
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cache import CacheError, open_cache
from pipeline.cli import cli, invoke
from pipeline.config import DataConfig
from pipeline.config.plain_yaml import plain_yaml
from pipeline.data import load_dataset
from pipeline.data.names import class_names_from
from pipeline.data.sources import read_npz
from pipeline.errors import DATA, OK, USAGE, DataError
from pipeline.info import describe
from pipeline.results.files import csv_line
from pipeline.results.heads import read_heads_file
from pipeline.text import printable
from tests.trust.crafted import KEPT, NONSENSE, crafted_file, fields, signed

EXAMPLES = 60  # of each search: together some ten seconds on a core
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

VALUES = st.sampled_from(NONSENSE) | st.integers() | st.floats() | st.text(max_size=5)
ROOT = json.loads((KEPT / "one/features.zarr/zarr.json").read_text())
ATTRIBUTES = [
    ("attributes", *path) for path in fields(ROOT["attributes"]) if "check" not in path and "digest" not in path
]
DOCUMENTS = {
    name: list(fields(json.loads((KEPT / name).read_text())))
    for name in (
        "one/rebalance/results.json",
        "three/results.json",
        "one/rebalance/selection.json",
        "ablation/ablation.json",
        "exported/config.json",
    )
}


def answer(function, *arguments, refusal=DataError):
    """Return (the result, None) or (None, the text of the refusal); any other exception is a failure."""
    try:
        return function(*arguments), None
    except refusal as error:
        return None, str(error)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return shutil.copytree(KEPT / "one/features.zarr", tmp_path_factory.mktemp("fuzz") / "features.zarr")


@fuzz
@given(st.sampled_from(ATTRIBUTES), VALUES)
@example(("attributes", "layout", "dtype"), [])
@example(("attributes", "layout", "splits", 0), [[]])
@example(("attributes", "class_names"), None)
@example(("attributes",), {})
def test_attributes_of_a_store(store, path, value):
    try:
        crafted_file(KEPT / "one/features.zarr/zarr.json", store / "zarr.json", path, value, signed)
    except (ValueError, TypeError, AttributeError):
        return  # no JSON that could be signed
    opened, _ = answer(open_cache, store, refusal=CacheError)
    assert opened is None or opened.rows("train") == len(opened.labels("train"))


@pytest.mark.parametrize("name", DOCUMENTS)
@fuzz
@given(st.data())
def test_fields_of_documents(name, tmp_path_factory, data):
    path, value = data.draw(st.sampled_from(DOCUMENTS[name])), data.draw(VALUES)
    folder = tmp_path_factory.getbasetemp() / "documents"
    folder.mkdir(exist_ok=True)
    file = crafted_file(KEPT / name, folder / Path(name).name, path, value)
    artefact, refused = answer(describe, file)
    assert str(artefact) if refused is None else str(folder) in refused


@fuzz
@given(st.text(alphabet="abc:-[]{}&*!|>?,'\"#% \n\t019.~<", max_size=60) | st.text(max_size=40))
@example("a: 2020-99-99")
@example("a: !!int x")
@example("&a {x: *a}")
@example("? [a]\n: 1")
@example("!!binary '@@'")
def test_texts_of_yaml(text):
    tree, _ = answer(plain_yaml, text, refusal=yaml.YAMLError)
    assert isinstance(repr(tree), str)


@fuzz
@given(st.binary(max_size=60) | st.text(alphabet="a.png 01²-\n\r\t\ufeff", max_size=60).map(str.encode))
@example("a.png ²".encode())
@example(b"a.png --1")
@example(b"a.png 0\na.png 1000000000")
@example(b"\xff\xfe")
def test_lists_of_images(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.png").touch()
    (folder / "list.txt").write_bytes(content)
    dataset, refused = answer(load_dataset, DataConfig(source="list", train_list=folder / "list.txt"))
    assert len(dataset.class_names) <= len(content) if refused is None else "list" in refused


@fuzz
@given(st.data())
def test_damaged_archives_of_arrays(tmp_path_factory, data):
    held = io.BytesIO()
    np.savez_compressed(held, images=np.zeros((2, 3, 3), np.uint8), labels=np.arange(2))
    content = bytearray(held.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "a.npz"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    _, refused = answer(read_npz, file)
    assert refused is None or "allow_pickle" not in refused


@fuzz
@given(st.data())
def test_damaged_heads(tmp_path_factory, data):
    content = bytearray((KEPT / "one/rebalance/heads.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "heads.safetensors"
    file.write_bytes(content)
    heads, refused = answer(read_heads_file, file)
    if refused is None:
        assert all(np.isfinite(array).all() for _, head in heads.scorers for array in head.arrays)
    else:
        assert str(file) in refused


@fuzz
@given(st.lists(st.text(max_size=6), max_size=4))
@example(["a\r"])
@example(["\ud800"])
def test_names_of_classes(names):
    accepted, refused = answer(class_names_from, names, "names.txt")
    assert "\x1b" not in printable(refused or "")
    assert all(name == printable(name) for name in accepted or () if "://" not in name)


@fuzz
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=4))
@example(["=1"])
@example(["a\rb", "\n"])
def test_cells_of_csv(cells):
    (row,) = csv.reader(io.StringIO(csv_line(cells) + "\n", newline=""))
    assert [cell.removeprefix("'") for cell in row] == [cell.removeprefix("'") for cell in cells]
    assert not any(cell[:1] in ("=", "@", "\t", "\r") for cell in row)


WORDS = [
    "--json",
    "--out",
    "",
    "--lam",
    "nan",
    "-1",
    str(KEPT / "one"),
    str(KEPT),
    "/dev/null",
    "digits-lt",
    "\x1b[2J",
    "--set",
]


@fuzz
@given(
    st.sampled_from(
        ["info", "config", "export", "evaluate", "verify", "report", "predict", "train-backbone", "rebalance"]
    ),
    st.lists(st.sampled_from(WORDS) | st.text(string.printable, max_size=6), max_size=4),
)
def test_random_command_lines(tmp_path_factory, command, words):
    place = tmp_path_factory.getbasetemp() / "place"
    place.mkdir(exist_ok=True)
    dry = ["--dry-run"] * (command in ("export", "report", "predict", "train-backbone", "rebalance"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert invoke([command, *words, *dry]) in (OK, USAGE, DATA)
    assert not list(place.iterdir())


def typed(random, parameter) -> list[str]:
    """Return the words of an option or an argument, with a value that may be right or wrong."""
    kind = parameter.type
    right = list(getattr(kind, "choices", ())) or [str(KEPT / "one"), "0.1", "1", "digits-lt"]
    value = str(random.choice([*map(str, right), *WORDS, "0", "1e400", "a=b", "s3://x:y@z/b", "²", "a\tb"]))
    if isinstance(parameter, click.Argument):
        return [value]
    return [str(random.choice(parameter.opts))] + ([] if parameter.is_flag else [value])


@pytest.mark.slow
def test_five_hundred_command_lines(tmp_path_factory, monkeypatch):
    """Drawn from the commands, options and choices that there are; --dry-run, or --help where a command has none."""
    random, place = np.random.default_rng(500), tmp_path_factory.mktemp("lines")
    monkeypatch.chdir(place)
    commands = [
        (path, command)
        for name, first in cli.commands.items()
        for path, command in ([([name, n], c) for n, c in getattr(first, "commands", {}).items()] or [([name], first)])
        if name not in ("doctor", "bench", "completion", "init")
    ]
    before, runner, codes = sorted(KEPT.rglob("*")), CliRunner(), dict.fromkeys((OK, USAGE, DATA), 0)
    for number in range(500):
        path, command = commands[number % len(commands)]
        parameters = [p for p in command.params if p.name != "debug"]  # which asks for tracebacks
        some = random.permutation(len(parameters))[: random.integers(0, 4)]
        words = [word for i in sorted(some) for word in typed(random, parameters[i])]
        dry = any("--dry-run" in p.opts for p in command.params)
        stop = ["--dry-run"] if dry else [] if path[0] in ("info", "verify", "evaluate", "config") else ["--help"]
        with runner.isolation() as streams:
            code = invoke([*path, *words, *stop])
        said = streams[0].getvalue() + streams[1].getvalue()
        assert code in codes, (path, words, said.decode())
        assert b"Traceback" not in said, (path, words)
        codes[code] += 1
    print(f"500 command lines: {codes}")
    assert min(codes.values()) > 10
    assert not list(place.iterdir())
    assert sorted(KEPT.rglob("*")) == before
