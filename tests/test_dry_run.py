"""--dry-run: nothing is written, the numbers are those of the run that follows, and what would fail fails alike."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cache import Lock, open_writer
from pipeline.cli import invoke
from tests.conftest import digits_tree


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Name → (time of the last change, content) of all below a folder, itself included."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (folder, *folder.rglob("*"))
    }


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def planned(capsys, *words):
    """The plan of a command that is not to write anything in the working folder."""
    before = tree(Path.cwd())
    code = invoke([*map(str, words), "--dry-run", "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert tree(Path.cwd()) == before
    return json.loads(told.out)


def done(capsys, *words):
    assert invoke([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    settings = digits_tree(diagnose_every=1)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A finished run, and the plan that was made of it before."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copyfile(place / "pipeline.yaml", folder / "pipeline.yaml")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert [invoke([stage]) for stage in ("train-backbone", "dump-features", "rebalance")] == [0, 0, 0]
    finally:
        os.chdir(before)
    return folder


def test_each_stage_costs_what_was_said_before(place, tmp_path, monkeypatch, capsys):
    """Steps, images, chunks, heads and bytes of the plan against those of the command that follows."""
    shutil.copyfile(place / "pipeline.yaml", tmp_path / "pipeline.yaml")
    monkeypatch.chdir(tmp_path)
    run = Path("runs/tiny")
    plan = planned(capsys, "run")
    assert [part["command"] for part in plan["parts"]] == ["train-backbone", "dump-features", "rebalance"]

    training = planned(capsys, "train-backbone")
    assert (training["epochs"], training["steps"], training["images"]) == (2, 12, 2 * 363)
    assert training["dataset"]["train"] == 363
    done(capsys, "train-backbone")
    last = json.loads((run / "backbone/metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == training["epochs"]
    assert training["bytes"] == pytest.approx(size(run / "backbone"), rel=0.1)

    dump = planned(capsys, "dump-features")
    document = done(capsys, "dump-features")
    assert dump["chunks"] == document["written"] == document["chunks"]
    assert dump["images"] == 3 * document["samples"]["train"] + document["samples"]["val"] + document["samples"]["test"]
    metadata = sum(file.stat().st_size for file in (run / "features.zarr").rglob("zarr.json"))
    assert dump["bytes"] == size(run / "features.zarr") - metadata  # to the byte, but for what describes it
    for stage, of in (("train-backbone", training), ("dump-features", dump)):  # of the whole run the same was said
        part = next(part for part in plan["parts"] if part["command"] == stage)
        assert {k: part[k] for k in ("bytes", "images", "ranks", "device")} == {
            k: of[k] for k in ("bytes", "images", "ranks", "device")
        }

    fit = planned(capsys, "rebalance", "--lam", "0.05,0.2")
    results = done(capsys, "rebalance", "--lam", "0.05,0.2")
    assert fit["heads"] == results["timing"]["heads"] == 8
    assert fit["steps"] == 2 * 2 * 6
    assert fit["bytes"] == pytest.approx((run / "rebalance/heads.safetensors").stat().st_size, rel=0.3)
    assert fit["heads"] == next(part for part in plan["parts"] if part["command"] == "rebalance")["heads"]


def test_what_is_finished_is_said_to_be(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    plan = planned(capsys, "run")
    states = [write["state"] for part in plan["parts"] for write in part["writes"]]
    assert states == [
        "complete, nothing is left to train",
        "complete, nothing is missing",
        "kept where it is of the same features and settings, else replaced",
    ]
    assert plan["parts"][0]["steps"] == 0
    assert plan["parts"][1]["images"] == 0
    assert planned(capsys, "train-backbone", "--overwrite")["writes"][0]["state"] == "replaced"
    again = planned(capsys, "dump-features", "--overwrite")
    assert again["writes"][0]["state"] == "what is there is replaced"
    assert again["bytes"] == again["store_bytes"]
    assert planned(capsys, "rebalance")["writes"][0]["state"] == "results there are replaced"


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--seeds", "0,1", "--out", "seeds"],
        ["run", "digits-lt"],
        ["train-backbone", "--try", "backbone.lr=0.1,0.2", "--seeds", "0,1", "--out", "tried"],
        ["train-backbone", "--nproc", "2", "--out", "two"],
        ["dump-features", "--views", "2", "--out", "two.zarr"],
        ["dump-features", "--checkpoint", "runs/tiny/backbone/best.pt", "--out", "best/features.zarr"],
        ["rebalance", "--config", "ablations/table3"],
        ["rebalance", "--method", "crt", "--method", "iwb-la"],
        ["report"],
        ["report", "--out", "elsewhere"],
        ["progress", "runs/tiny"],
        ["export", "--out", "model"],
        ["export", "--to", "safetensors", "--out", "model"],
        ["export", "runs/tiny/features.zarr", "--out", "plain"],
        ["reproduce", "pipeline.yaml", "--out", "again"],
    ],
    ids=" ".join,
)
def test_every_command_that_writes_can_say_what(finished, words, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    plan = planned(capsys, *words)
    assert plan["dry_run"] is True
    assert plan["command"] == words[0]
    assert plan["bytes"] >= 0
    assert plan["writes"]
    assert invoke([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{words[0]} would start; nothing was written\n")
    assert "free there: " in out


def test_labels_take_the_images_and_batches_that_were_said(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    words = [
        "predict",
        "runs/tiny",
        tmp_path,
        tmp_path / "absent.png",
        "--batch-size",
        "2",
        "--out",
        tmp_path / "l.csv",
    ]
    plan = planned(capsys, *words)
    assert (plan["images"], plan["batches"], plan["classes"], plan["device"]) == (5, 3, 10, "cpu")
    assert [write["path"] for write in plan["writes"]] == [str(tmp_path / "l.csv")]
    assert any("absent.png: no such file" in note for note in plan["notes"])
    assert not (tmp_path / "l.csv").exists()
    assert invoke([*map(str, words)]) == 0
    assert len((tmp_path / "l.csv").read_text().splitlines()) == 1 + plan["images"]
    capsys.readouterr()
    assert invoke([*map(str, words[:3]), "--dry-run"]) == 0
    assert "in all" not in capsys.readouterr().out  # nothing is written without --out


def test_exports_take_what_was_said(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    for words in (
        ["export", "--out", tmp_path / "m"],
        ["export", "runs/tiny/features.zarr", "--out", tmp_path / "npy"],
    ):
        said = planned(capsys, *words)
        done(capsys, *words)
        assert said["bytes"] == pytest.approx(size(words[-1]), rel=0.25)


def test_a_training_that_was_stopped_goes_on_as_said(place, tmp_path, monkeypatch, capsys):
    from pipeline import load_config, train_backbone
    from pipeline.backbone.prepare import prepare_training
    from pipeline.errors import Terminated

    config, out = load_config(place / "pipeline.yaml"), tmp_path / "backbone"

    def stop(event):
        if type(event).__name__ == "Step" and (event.epoch, event.step) == (0, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        train_backbone(config, out=out, report=stop)
    before = tree(tmp_path)
    plan = prepare_training(config, out=out).description
    assert plan.writes[0].state == "goes on after epoch 0 of 2, step 4 of 6"
    assert plan.numbers["steps"] == 12 - 4
    (out / "last.pt").write_bytes(b"torn")
    (tmp_path / "before").write_text("")
    with pytest.raises(Exception, match=r"last\.pt"):
        prepare_training(config, out=out)
    assert before.keys() | {"before"} == tree(tmp_path).keys()


def test_what_several_processes_refuse_is_refused_before_they_start(place, tmp_path):
    """A setting that only GPUs share, and more ranks than images in a batch: told without a process group."""
    from pipeline import load_config
    from pipeline.backbone.prepare import prepare_training
    from pipeline.errors import ConfigError

    config = load_config(place / "pipeline.yaml", ["backbone.sync_batch_norm=true"])
    assert prepare_training(config, out=tmp_path / "out", device="cpu").steps == 6
    with pytest.raises(ConfigError, match="only between GPUs"):
        prepare_training(config, out=tmp_path / "out", device="cpu", world=2)
    with pytest.raises(ConfigError, match="too few for 10000 rank"):
        prepare_training(load_config(place / "pipeline.yaml"), out=tmp_path / "out", device="cpu", world=10_000)
    assert not (tmp_path / "out").exists()


def test_a_training_that_finished_is_described_in_the_precision_of_its_checkpoint(place, tmp_path, monkeypatch):
    from pipeline import load_config, train_backbone
    from pipeline.backbone import arithmetic
    from pipeline.backbone.prepare import prepare_training

    monkeypatch.setattr(arithmetic, "computes_bfloat16", lambda device: True)
    out = tmp_path / "backbone"
    train_backbone(load_config(place / "pipeline.yaml", ["backbone.precision=bfloat16", "backbone.epochs=1"]), out=out)
    again = prepare_training(load_config(place / "pipeline.yaml", ["backbone.epochs=1"]), out=out)
    assert again.complete
    assert again.description.numbers["precision"] == "bfloat16"


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_as_said(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    last = Path("runs/tiny/backbone/last.pt")
    last.write_bytes(last.read_bytes()[:-500])
    plan = planned(capsys, "train-backbone")
    assert plan["writes"][0]["state"] == "goes on after epoch 1 of 2"
    assert plan["steps"] == 6
    assert any(str(last) in note for note in plan["notes"])
    assert done(capsys, "train-backbone")["trained_epochs"] == 1


def test_what_another_process_writes_is_refused_alike(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    for words, folder in ((["train-backbone"], "backbone"), (["dump-features", "--overwrite"], "features.zarr")):
        with Lock(Path("runs/tiny") / folder):
            errors = []
            for more in (["--dry-run"], []):
                assert invoke([*words, *more, "--json"]) == 3
                errors.append(json.loads(capsys.readouterr().out)["error"])
        assert errors[0] == errors[1]
        assert f"another process is writing it (process {os.getpid()} on " in errors[0]


def test_a_store_that_lacks_chunks_is_finished_as_said(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    (chunk,) = Path("runs/tiny/features.zarr/train/features/c/1").rglob("0/0")
    chunk.unlink()
    plan = planned(capsys, "dump-features")
    assert plan["writes"][0]["state"].startswith("damaged chunks are computed again: 4 of 5 chunks are there")
    assert (plan["chunks"], plan["images"], plan["bytes"]) == (1, 363, 363 * 16 * 2 + 4)
    assert done(capsys, "dump-features")["written"] == 1
    assert open_writer("runs/tiny/features.zarr").sealed


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train-backbone", "--set", "backbone.model=resnet51"], 2),
        (["train-backbone", "--set", "backbone.epocs=1"], 2),
        (["train-backbone", "--set", "backbone.epochs=3"], 2),
        (["train-backbone", "--device", "cuda"], 2),
        (["train-backbone", "--nproc", "80", "--out", "many"], 2),
        (["train-backbone", "--out", "pipeline.yaml/x"], 1),
        (["train-backbone", "--try", "data.path=x"], 2),
        (["train-backbone", "--set", "data.source=folder", "--set", "data.path=nowhere"], 3),
        (["dump-features", "--checkpoint", "nowhere.pt"], 3),
        (["dump-features", "--checkpoint", "pipeline.yaml"], 3),
        (["dump-features", "--views", "2"], 3),
        (["dump-features", "--out", "pipeline.yaml"], 3),
        (["rebalance", "--lam", "2"], 2),
        (["rebalance", "nowhere.zarr"], 3),
        (["rebalance", "--method", "iwbb"], 2),
        (["rebalance", "--out", "pipeline.yaml/x"], 1),
        (["run", "--set", "backbone.epochs=3"], 2),
        (["run", "--seeds", "0,1"], 2),
        (["report", "nowhere"], 3),
        (["export", "--lam", "0.7", "--out", "model"], 3),
        (["export", "--out", "runs"], 2),
        (["progress", "nowhere"], 3),
        (["predict", "nowhere", "pipeline.yaml"], 3),
        (["predict", "runs/tiny", "nowhere.png"], 3),
        (["reproduce", "digits-lt", "--tables", "table9"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_fail_fails_alike(finished, words, code, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    before, errors = tree(finished), []
    for more in (["--dry-run"], []):
        assert invoke([*words, *more, "--json"]) == code
        errors.append(json.loads(capsys.readouterr().out)["error"])
        after = tree(finished)
        if more:
            assert after == before
        assert {name: content for name, (_, content) in after.items()} == {
            n: content for n, (_, content) in before.items()
        }
    assert errors[0] == errors[1]
