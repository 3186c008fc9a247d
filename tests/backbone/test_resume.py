"""A training killed at any moment, on any rank, goes on to the very checkpoint of one that nobody disturbed."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backbone import checkpoint
from pipeline.backbone.events import Epoch
from pipeline.backbone.train import train_backbone
from pipeline.config import make_config
from pipeline.errors import ConfigError, DataError
from tests import ranks
from tests.backbone.test_train import assert_same_state
from tests.conftest import digits_tree

STEPS, EPOCHS = 6, 3
MEASURED = {"images_per_s", "seconds", "peak_memory_mb", "time"}  # fields of metrics.jsonl that no two runs share
LEFT = ["best.pt", "diagnostics.csv", "last.pt", "metrics.jsonl", "previous.pt", "run.json"]


def tree(**backbone):
    """Everything of stage 1 that has a state or draws lots."""
    choices = {
        "loss": "ldam-drw",
        "drw_start": 0.5,
        "sampler": "square-root",
        "force_double_balancing": True,
        "ema": 0.8,
    }
    mixed = {"weaken": {"strength": 0.5, "group": 16}}
    return digits_tree(epochs=EPOCHS, accumulate=2, diagnose_every=2, **choices, **mixed, **backbone)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of a whole training by so many ranks; best.pt is of its last epoch but one or the last."""
    done = {}

    def of(world: int) -> Path:
        if world not in done:
            done[world] = tmp_path_factory.mktemp(f"whole-{world}")
            assert ranks.train(tree(), done[world], ranks=world, scratch=done[world]).codes == [0] * world
            for report in done[world].glob("rank-*.json"):
                report.unlink()
        return done[world]

    return of


def history(folder: Path) -> list[dict]:
    """What metrics.jsonl says of the training, leaving out what was measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same_training(folder: Path, whole: Path) -> None:
    for name in ("last.pt", "best.pt", "previous.pt"):
        assert_same_state(folder / name, whole / name)
    assert history(folder) == history(whole)
    assert (folder / "diagnostics.csv").read_text() == (whole / "diagnostics.csv").read_text()
    assert sorted(p.name for p in folder.iterdir()) == LEFT


@dataclass(frozen=True)
class Kill:
    """When which rank of how many dies, and when then, until one is left alone."""

    world: int
    moments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' '.join(self.moments)} of {self.world}"


def storm() -> list[Kill]:
    """Twenty first moments, drawn once, each kind for one and two ranks; every third training is killed again later."""
    random = np.random.default_rng(2021)
    in_step = ("before:step", "before:update", "after:step")
    in_epoch = ("before:validation", "after:validation", "after:line", "after:last", "within:last", "before:last")
    firsts = [(kind, STEPS, world) for kind in in_step for world in (1, 2)]
    firsts += [(kind, 1, world) for kind in in_epoch for world in (1, 2)]
    firsts += [("within:best", 1, 1), ("after:best", 1, 2)]
    kills = []
    for n, (kind, per_epoch, world) in enumerate(firsts):
        epoch = 1 if "best" in kind else int(random.integers(1, EPOCHS + 1))  # the first is the best so far
        number = (epoch - 1) * per_epoch + (int(random.integers(1, STEPS + 1)) if per_epoch > 1 else 1)
        rank = int(random.integers(world)) if kind in in_step or "validation" in kind else 0  # rank 0 writes
        again = (
            [f"after:step-{epoch * STEPS + int(random.integers(1, STEPS + 1))}"]
            if n % 3 == 0 and epoch < EPOCHS
            else []
        )
        again += [f"within:last-{EPOCHS}"] if n % 6 == 0 else []
        kills.append(Kill(world, (f"{kind}-{number}@{rank}", *again)))
    assert len(kills) == 20
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("kill", storm(), ids=str)
def test_a_training_killed_at_any_moment_goes_on_to_the_same_weights(kill, undisturbed, tmp_path):
    out = tmp_path / "out"
    for moment in kill.moments:
        died = ranks.train(tree(), out, ranks=kill.world, kill_at=moment, scratch=tmp_path)
        by = signal.SIGXFSZ if moment.startswith("within") else signal.SIGKILL
        assert died.codes[int(moment.partition("@")[2] or 0)] == -by
        assert all(died.codes)  # whoever is left ends too, and not well
    after = ranks.train(tree(), out, ranks=kill.world, scratch=tmp_path)
    assert after.codes == [0] * kill.world, after.said
    assert_same_training(out, undisturbed(kill.world))


@pytest.mark.parametrize("moments", [("before:update-9", "within:last-2")], ids=str)
def test_killed_between_gradient_and_step_and_again_in_the_midst_of_a_checkpoint(moments, undisturbed, tmp_path):
    """Of the storm, for every day."""
    test_a_training_killed_at_any_moment_goes_on_to_the_same_weights(Kill(1, moments), undisturbed, tmp_path)


def test_two_ranks_killed_while_validating(undisturbed, tmp_path):
    kill = Kill(2, ("before:validation-2@1",))
    test_a_training_killed_at_any_moment_goes_on_to_the_same_weights(kill, undisturbed, tmp_path)


@pytest.mark.parametrize(
    "moment",
    [
        "term:data-8",
        "term:validation-2",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("term:update-8", "term:last-1")),
    ],
)
def test_a_signal_saves_wherever_it_comes(moment, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert ranks.train(tree(), out, kill_at=moment, scratch=tmp_path).codes == [143]
    state = checkpoint.read(out / "last.pt")
    done = {"data": 7, "update": 8, "validation": 12, "last": 6}[moment.partition(":")[2].partition("-")[0]]
    assert state["epoch"] * STEPS + state["step_in_epoch"] == done
    assert ranks.train(tree(), out, scratch=tmp_path).codes == [0]
    for name in ("last.pt", "best.pt"):
        assert_same_state(out / name, undisturbed(1) / name)
    assert history(out) == history(undisturbed(1))


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the undisturbed training of one process."""
    return Path(shutil.copytree(undisturbed(1), tmp_path / "out"))


def flip(path: Path, name: str) -> None:
    """Inverts one bit in the middle of a record of a checkpoint."""
    with zipfile.ZipFile(path) as records:
        record = next(r for r in records.infolist() if r.filename.endswith(name))
    data = bytearray(path.read_bytes())
    # behind 30 bytes, the name and padding, where a short content may stand by chance too
    lengths = struct.unpack_from("<HH", data, record.header_offset + 26)
    data[record.header_offset + 30 + sum(lengths) + record.file_size // 2] ^= 8
    path.write_bytes(data)


def test_a_flipped_bit_in_any_record_is_found(finished):
    with zipfile.ZipFile(finished / "last.pt") as records:
        names = [r.filename for r in records.infolist() if r.file_size]
    assert sum("/data/" in name for name in names) >= 60  # weights, statistics and momenta
    whole = (finished / "last.pt").read_bytes()
    for name in names:
        flip(finished / "last.pt", name)
        with pytest.raises(
            checkpoint.DamagedCheckpoint, match=r"last\.pt: not a readable checkpoint.*goes on from .*previous\.pt"
        ):
            checkpoint.read(finished / "last.pt")
        (finished / "last.pt").write_bytes(whole)
    assert checkpoint.read(finished / "last.pt")["complete"]


def torn(path):
    path.write_bytes(path.read_bytes()[:-1000])


def foreign(path):
    torch.save({"state_dict": {}}, path)


@pytest.mark.parametrize(
    "damage", [lambda path: flip(path, "data/3"), torn, foreign], ids=["flipped", "torn", "foreign"]
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damaged_one_kept(damage, finished, undisturbed):
    for times in (1, 2):
        damage(finished / "last.pt")
        bytes_of_it = (finished / "last.pt").read_bytes()
        told = []
        again = train_backbone(make_config(tree(), "t"), out=finished, report=told.append)
        assert again.trained_epochs == 1
        kept = "last.pt.damaged" if times == 1 else "last.pt.damaged-2"
        (note,) = told[0].notes
        assert f"it is kept as {kept}. Going on from previous.pt, which is of epoch 2" in note
        assert (finished / kept).read_bytes() == bytes_of_it
    for left in finished.glob("last.pt.damaged*"):
        left.unlink()
    assert_same_training(finished, undisturbed(1))


def test_a_lost_checkpoint_is_replaced_by_the_one_before(finished, undisturbed):
    (finished / "last.pt").unlink()
    told = []
    train_backbone(make_config(tree(), "t"), out=finished, report=told.append)
    assert "last.pt is missing. Going on from previous.pt" in told[0].notes[0]
    assert_same_training(finished, undisturbed(1))


def test_without_a_whole_checkpoint_nothing_is_touched(finished):
    for name in ("last.pt", "previous.pt"):
        torn(finished / name)
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    with pytest.raises(
        DataError, match=r"last\.pt: not .*, and so is the one before it: .*previous\.pt.*--overwrite"
    ) as e:
        train_backbone(make_config(tree(), "t"), out=finished)
    assert e.value.exit_code == 3
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before
    (finished / "previous.pt").unlink()
    with pytest.raises(DataError, match=r"last\.pt: not a readable checkpoint.*--overwrite"):
        train_backbone(make_config(tree(), "t"), out=finished)
    assert train_backbone(make_config(tree(), "t"), out=finished, overwrite=True).trained_epochs == EPOCHS


def test_the_checkpoint_before_must_be_of_this_training_too(finished):
    torn(finished / "last.pt")
    with pytest.raises(ConfigError, match=r"previous\.pt is of another training: backbone\.lr was 0\.1, now 0\.2"):
        train_backbone(make_config(tree(lr=0.2), "t"), out=finished)
    assert not (finished / "last.pt.damaged").exists()


@pytest.mark.parametrize("links", [True, False])
def test_what_was_saved_before_keeps_a_name_at_every_moment(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no hard links here")))
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for n in (1, 2, 3):
        checkpoint.save(last, {"model": {}, "config": {}, "transform": {}, "n": n}, previous=previous)
    assert [checkpoint.read(path)["n"] for path in (last, previous)] == [3, 2]
    checkpoint.link_as(previous, last)
    checkpoint.link_as(previous, last) if links else None  # both names are of one file by now
    assert checkpoint.read(last)["n"] == 2
    assert {p.name for p in tmp_path.iterdir()} == ({"last.pt", "previous.pt"} if links else {"last.pt"})


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "previous.pt"])
def test_no_pickle_is_executed(name, finished, monkeypatch):
    monkeypatch.chdir(finished)
    torch.save({"format": 1, "model": Evil(), "config": {}, "transform": {}}, finished / name)
    with pytest.raises(DataError):
        checkpoint.load_checkpoint(finished / name)
    if name == "previous.pt":
        torn(finished / "last.pt")
        with pytest.raises(DataError):
            train_backbone(make_config(tree(), "t"), out=finished)
    else:
        assert train_backbone(make_config(tree(), "t"), out=finished).last["epoch"] == EPOCHS
    assert not (finished / "executed").exists()


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_second_training_into_the_same_folder_is_refused(tmp_path):
    out, refused = tmp_path / "out", []

    def meanwhile(event):
        if isinstance(event, Epoch) and not refused:
            for overwrite in (False, True):
                with pytest.raises(
                    DataError, match=f"another process is writing it .process {os.getpid()} on .*--out"
                ) as e:
                    train_backbone(make_config(tree(), "t"), out=out, overwrite=overwrite)
                refused.append(e.value.exit_code)

    train_backbone(make_config(tree(), "t"), out=out, report=meanwhile)
    assert refused == [3, 3]
    assert not (out / ".lock").exists()


def test_without_locks_a_training_says_so_and_runs(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    told = []
    train_backbone(make_config(digits_tree(epochs=1), "t"), out=tmp_path, report=told.append)
    assert "cannot lock files" in told[0].notes[0]


@pytest.mark.parametrize("other", [pytest.param("none", marks=pytest.mark.slow), "older"])
def test_ranks_that_see_different_checkpoints_are_refused(other, undisturbed, tmp_path):
    here, there = (Path(shutil.copytree(undisturbed(2), tmp_path / name)) for name in ("here", "there"))
    (there / "last.pt").unlink()
    if other == "older":
        shutil.copy(there / "previous.pt", there / "last.pt")
    job = ranks.train(tree(), here, ranks=2, hosts=[here, there], scratch=tmp_path)
    assert job.codes == [2, 2]
    sees = "sees none, rank 0" if other == "none" else "sees another, rank 0"
    assert "not the same file on all hosts: rank 1 on" in job.said[0]["error"]
    assert sees in job.said[0]["error"]
    assert job.said[1]["error"] == "another rank failed"


@pytest.mark.slow
def test_image_files_read_by_processes(tmp_path):
    for split, count in (("train", 30), ("val", 4)):
        for label in range(3):
            folder = tmp_path / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 80, (20, 24, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    files = tree(batch_size=32, lr=0.05)
    files["data"] = {"source": "folder", "path": str(tmp_path / "images"), "image_size": 16, "workers": 1}
    assert ranks.train(files, tmp_path / "whole", scratch=tmp_path).codes == [0]
    for moment, code in (("before:update-4", -9), ("term:data-9", 143)):
        assert ranks.train(files, tmp_path / "out", kill_at=moment, scratch=tmp_path).codes == [code]
    assert ranks.train(files, tmp_path / "out", scratch=tmp_path).codes == [0]
    for name in ("last.pt", "best.pt"):
        assert_same_state(tmp_path / "out" / name, tmp_path / "whole" / name)
    assert history(tmp_path / "out") == history(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_the_same_command_goes_on(undisturbed, tmp_path):
    """On a file system of its own, which then has room again; without the right to mount one there is nothing to test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        out = disk / "out"
        assert ranks.train(tree(), out, kill_at="after:last-1", scratch=tmp_path).codes == [-9]
        before = (out / "last.pt").read_bytes()
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 20 * 1024))
        job = ranks.train(tree(), out, scratch=tmp_path)
        assert job.codes == [1]
        assert (
            f"{out}: cannot be written: No space left on device; {out / 'last.pt'} stays as it was"
            in job.said[0]["error"]
        )
        assert (out / "last.pt").read_bytes() == before
        (disk / "ballast").unlink()
        assert ranks.train(tree(), out, scratch=tmp_path).codes == [0]
        assert_same_training(out, undisturbed(1))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_save_of_long_duration_is_not_made_after_every_short_epoch(tmp_path, monkeypatch):
    """Epochs go on being told; the best of those between two saves is best.pt of the next."""
    saved, real = [], checkpoint.save

    def slow(path, state, **how):
        saved.append((path.name, state["epoch"]))
        time.sleep(0.3)
        real(path, state, **how)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr("pipeline.backbone.train.SAVING_SHARE", 1e-6)
    result = train_backbone(make_config(tree(), "t"), out=tmp_path)
    told = [line["epoch"] for line in history(tmp_path)]
    assert told == [1, 2, 3]
    assert [epoch for name, epoch in saved if name == "last.pt"] == [1, 3]
    best = checkpoint.read(tmp_path / "best.pt")
    best_line = max(history(tmp_path), key=lambda line: line["val_accuracy"])
    assert (best["epoch"], best["best"]) == (best_line["epoch"], result.best_val_accuracy)
