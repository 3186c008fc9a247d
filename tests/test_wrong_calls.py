"""Wrong calls as people make them: the cause and the next thing to type, on one screen, nothing lost or half-written.

What is wrong inside a rebalance is in rebalance/test_bad_input.py, images that cannot be read in test_unreadable.py.
"""

import ctypes
import json
import os
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.cli import invoke
from tests.conftest import digits_tree
from tests.small_run import made_store
from tests.test_dry_run import tree

ROOT = Path(__file__).parents[1]

# words, exit code, what has to be said
CALLS = [
    ("rebalence", 2, ["No such command 'rebalence'", "Did you mean", "'rebalance'"]),
    ("rebalance --lamb 0.1", 2, ["No such option", "--lam"]),
    ("rebalance --method cRT", 2, ["--method cRT: unknown", "did you mean crt?"]),
    ("rebalance --set rebalence.lam=0.1", 2, ["unknown key rebalence", "did you mean rebalance?"]),
    ("rebalance --views 5", 2, ["--views", "'augmented', 'clean'"]),
    ("rebalance --loss ldam", 2, ["--loss", "'cb', 'ce', 'la'"]),
    (
        "rebalance runs/tiny/backbone/last.pt",
        3,
        ["last.pt", "stage-1 checkpoint", "pipeline dump-features --checkpoint"],
    ),
    (
        "rebalance runs/tiny/rebalance",
        3,
        ["runs/tiny/rebalance", "rebalancing results", "did you mean runs/tiny/features.zarr?"],
    ),
    ("rebalance runs/tinny", 3, ["runs/tinny: no such feature store", "did you mean runs/tiny?"]),
    ("rebalance open.zarr", 3, ["open.zarr", "its dump did not finish", "pipeline dump-features"]),
    ("rebalance --device cuda", 2, ["--device cuda: no CUDA device here", "--device cpu"]),
    ("rebalance --out photo.jpg/results", 1, ["photo.jpg", "Not a directory", "--out"]),
    ("evaluate open.zarr", 3, ["open.zarr", "its dump did not finish"]),
    ("evaluate --heads runs/tiny/rebalance/results.json", 3, ["results.json", "heads.safetensors"]),
    ("evaluate --heads nowhere.safetensors", 3, ["nowhere.safetensors", "pipeline rebalance"]),
    ("evaluate other.zarr --heads runs/tiny/rebalance/heads.safetensors", 3, ["16 features", "other.zarr has 5 and 8"]),
    ("evaluate --split tset", 2, ["--split", "'test'"]),
    ("verify photo.jpg", 3, ["photo.jpg", "not a feature store"]),
    (
        "dump-features --checkpoint runs/tiny/features.zarr",
        3,
        ["features.zarr", "a feature store, not a checkpoint", "such as runs/tiny/backbone/last.pt"],
    ),
    ("dump-features --checkpoint pipeline.yaml", 3, ["pipeline.yaml", "not a PyTorch or safetensors file"]),
    ("dump-features --checkpoint runs/tiny/backbone/lats.pt", 3, ["did you mean runs/tiny/backbone/last.pt?"]),
    ("dump-features --out runs/tiny/backbone", 3, ["runs/tiny/backbone", "not a feature store", "--out"]),
    ("dump-features --probe", 2, ["--probe", "--checkpoint FILE"]),
    ("dump-features --views many", 2, ["--views", "'many'"]),
    ("train-backbone photo.jpg", 2, ["photo.jpg", "not a configuration"]),
    ("train-backbone cifar100lt", 2, ["no configuration cifar100lt", "did you mean cifar100-lt"]),
    ("run pipline.yaml", 2, ["no configuration pipline.yaml", "did you mean pipeline.yaml?"]),
    ("run runs", 2, ["no configuration runs", "a folder of runs", "a folder of images, CLASS/*.jpg"]),
    ("train-backbone --set backbone=3", 2, ["backbone is a section, got 3", "such as backbone.model"]),
    ("train-backbone --set backbone.lr=fast", 2, ["backbone.lr", "'fast'"]),
    ("train-backbone --set data.source=folder --set data.path=pipeline.yaml", 3, ["pipeline.yaml", "folder"]),
    ("train-backbone --nproc 80", 2, ["--nproc 80", "take --nproc"]),
    ("train-backbone --nnodes 2", 2, ["--nnodes 2", "--rdzv-endpoint HOST:29400"]),
    ("run digits-lt cifar10-lt", 2, ["unexpected extra argument", "cifar10-lt"]),
    ("run --checkpoint nowhere.pth", 3, ["nowhere.pth: no such checkpoint", "check the path"]),
    ("run --store http://bucket/x", 2, ["http://bucket/x"]),
    ("report runs/tiny/features.zarr", 3, ["features.zarr", "a feature store, not a run", "such as runs/tiny"]),
    ("report runs/tiny/backbone", 3, ["the training of a run", "such as runs/tiny"]),
    ("export --lam 0.7 --out model", 3, ["no head iwb, λ = 0.7", "pipeline rebalance --lam 0.7"]),
    ("export --to npy --out model", 2, ["npy is of a feature store", "runs/tiny/features.zarr"]),
    ("export --out runs", 2, ["runs", "--out"]),
    ("export", 2, ["Missing option '--out'"]),
    ("predict photo.jpg runs/tiny", 3, ["runs/tiny: no image in this folder", "give image files"]),
    ("predict runs/tiny nowhere.jpg", 3, ["nowhere.jpg", "no such file"]),
    ("predict runs/tiny photo.jpg --device cuda", 2, ["--device cuda", "--device cpu"]),
    ("info photo.jpg", 3, ["photo.jpg", "not an artefact of this program", "checkpoint"]),
    ("info runs/tinny", 3, ["runs/tinny", "no such file or folder", "did you mean runs/tiny?"]),
    ("info runs", 3, ["runs: holds runs, is none; name one, such as runs/tiny"]),
    ("report runs", 3, ["runs: holds runs, is none; name one, such as runs/tiny"]),
    ("export runs --out model", 3, ["runs: holds runs, is none; name one, such as runs/tiny"]),
    ("progress photo.jpg", 3, ["photo.jpg"]),
    ("reproduce digits-it", 2, ["digits-it", "did you mean digits-lt"]),
    ("bench rebalence", 2, ["rebalence", "'rebalance'"]),
    ("completion tcsh", 2, ["'tcsh'", "'bash', 'zsh', 'fish'"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a finished run, and things that look as if they could be given."""
    folder = tmp_path_factory.mktemp("wrong")
    settings = digits_tree(epochs=1)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    Image.new("RGB", (8, 8)).save(folder / "photo.jpg")
    made_store(folder / "open.zarr", seal=False)
    made_store(folder / "other.zarr")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert [invoke([stage]) for stage in ("train-backbone", "dump-features", "rebalance")] == [0, 0, 0]
    finally:
        os.chdir(before)
    return folder


def screen(text: str) -> int:
    """Lines that a text takes on a terminal of 80 columns."""
    return sum(max(1, ceil(len(line) / 80)) for line in text.rstrip().splitlines())


def checked(told: str, says: list[str]) -> None:
    flat = " ".join(told.split())
    assert "Traceback" not in told
    assert "should not happen" not in flat, flat
    assert not [part for part in says if part not in flat], flat
    assert screen(told) <= 24


@pytest.mark.parametrize(("words", "code", "says"), CALLS, ids=[call[0] for call in CALLS])
def test_a_wrong_call_says_why_and_what_to_type(place, words, code, says, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    before = {name: content for name, (_, content) in tree(place).items()}
    found = invoke(words.split())
    told = capsys.readouterr()
    assert found == code, told.err
    checked(told.err, says)
    assert told.out == ""
    assert {name: content for name, (_, content) in tree(place).items()} == before


@pytest.fixture
def full_disk(tmp_path):
    """A file system without a free byte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "words",
    [
        ["train-backbone", "--out"],
        ["dump-features", "--out"],
        ["rebalance", "--lam", "0.1", "--out"],
        ["report", "--out"],
        ["export", "--out"],
        ["export", "runs/tiny/features.zarr", "--out"],
        ["run", "--out"],
    ],
    ids=" ".join,
)
def test_a_full_disk_is_named_and_holds_nothing_half_written(place, full_disk, words, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    out = full_disk / "out" / "f.zarr"
    for more in ([], ["--dry-run"]):
        assert invoke([*words, str(out), *more]) == 1
        checked(capsys.readouterr().err, ["No space left on device", str(full_disk)])
        left = [path for path in full_disk.rglob("*") if path.is_file() and path.name not in ("ballast", ".lock")]
        assert [path for path in left if path.stat().st_size] == []


def without_the_right_to_overrule() -> None:
    """Of root, to whom no permission is denied: permissions then hold for what is run next."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.slow
def test_a_folder_one_may_not_write_to(place, tmp_path):
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    for words in (
        ["rebalance", "--lam", "0.1", "--out", str(shut / "r")],
        ["train-backbone", "--out", str(shut / "b")],
    ):
        for more in ([], ["--dry-run"]):
            done = subprocess.run(
                [sys.executable, "-m", "pipeline", *words, *more],
                cwd=place,
                env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
                preexec_fn=without_the_right_to_overrule,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1, done.stderr
            checked(done.stderr, ["Permission denied", str(shut), "choose a folder you may write to with --out"])
    assert list(shut.iterdir()) == []


def test_a_bucket_without_credentials_is_told_before_the_training(place, tmp_path, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(place)
    for more in ([], ["--dry-run"]):
        assert invoke(["run", "--store", "s3://bucket/x", "--out", str(tmp_path / "run"), *more]) == 3
        checked(capsys.readouterr().err, ["s3://bucket/x: no credentials found", "AWS_ACCESS_KEY_ID"])
    assert not (tmp_path / "run").exists()


def test_a_wrong_call_is_json_too(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for words, code, _ in CALLS:
        if words.split()[0] in ("rebalence", "completion", "bench"):
            continue
        assert invoke([*words.split(), "--json"]) == code
        document = json.loads(capsys.readouterr().out)
        assert document["exit_code"] == code
        assert document["error"]
