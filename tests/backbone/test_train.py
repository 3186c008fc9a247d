import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from pipeline.backbone import checkpoint
from pipeline.backbone.events import Begin, Epoch, Step
from pipeline.backbone.train import train_backbone
from pipeline.config import make_config
from pipeline.data import load_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.schedule import learning_rate
from tests.conftest import digits_tree


def config(**backbone):
    return make_config(digits_tree(**backbone), "t")


def command(tmp_path, *extra, env=None, **backbone):
    """A real `pipeline train-backbone` process on a tiny configuration; returns (exit code, stdout, stderr)."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(digits_tree(**backbone)))
    words = [sys.executable, "-m", "pipeline", "train-backbone", str(path), "--out", str(tmp_path / "out"), *extra]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {}),
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def weights(path):
    return checkpoint.read(path)["model"]


def assert_same_state(a, b):
    """Equal in every tensor, bit by bit, and in every other value but the provenance."""
    a, b = (leaves(checkpoint.read(path)) for path in (a, b))
    assert list(a) == list(b)
    assert [name for name in a if a[name] != b[name]] == []


def leaves(tree, name=""):
    """Path → value of all that a checkpoint holds, tensors as (dtype, shape, bytes)."""
    if isinstance(tree, torch.Tensor):
        return {name: (tree.dtype, tree.shape, tree.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if children is None:
        return {name: tree}
    return {k: v for key, child in children if key != "provenance" for k, v in leaves(child, f"{name}.{key}").items()}


def test_learning_rate_by_hand():
    rates = [learning_rate(s, peak=0.4, epochs=10, steps_per_epoch=4, warmup_epochs=1) for s in range(40)]
    assert rates[:4] == pytest.approx([0.08, 0.16, 0.24, 0.32])
    assert rates[4] == pytest.approx(0.4)
    assert rates[4 + 18] == pytest.approx(0.2)  # half way down the cosine
    assert 0 < rates[-1] < 0.002


def test_training_learns_and_tells(tmp_path):
    events = []
    result = train_backbone(config(width=0.5, epochs=12), out=tmp_path, report=events.append)
    assert [type(e) for e in events[:2]] == [Begin, Step]
    epochs = [e for e in events if isinstance(e, Epoch)]
    assert [e.epoch for e in epochs] == list(range(1, 13))
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    assert epochs[-1].val_accuracy > 40
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert result.last == lines[-1]
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["complete"]
    assert state["dataset"]["fingerprint"] == result.dataset["fingerprint"]
    assert checkpoint.read(tmp_path / "best.pt")["best"] == max(line["val_accuracy"] for line in lines)


def test_every_image_is_seen_once_an_epoch_in_equal_batches(tmp_path):
    events = []
    train_backbone(config(epochs=1, batch_size=100), out=tmp_path, report=events.append)
    assert sum(isinstance(e, Step) for e in events) == 4  # 363 images
    assert checkpoint.read(tmp_path / "last.pt")["epoch"] == 1


def test_each_epoch_sees_other_crops_in_another_order(tmp_path, monkeypatch):
    from pipeline.data.transform import Loader

    seen = []
    real = Loader.batches
    monkeypatch.setattr(
        Loader, "batches", lambda self, rows, key=None, **how: seen.append((key, rows)) or real(self, rows, key, **how)
    )
    train_backbone(config(epochs=2, validate_every=2), out=tmp_path)
    (first, rows), (second, others) = [(key, np.concatenate(rows)) for key, rows in seen if key is not None]
    assert first != second
    assert (rows != others).any()
    assert sorted(rows) == sorted(others) == list(range(363))


def test_a_balanced_epoch_shows_an_image_in_as_many_ways_as_it_is_drawn(tmp_path, monkeypatch):
    from pipeline.data.transform import Loader

    seen = []
    real = Loader.batches

    def batches(self, rows, key=None, **how):
        pixels = list(real(self, rows, key, **how))
        if key is not None:
            seen.extend(zip(np.concatenate(rows), torch.cat(pixels), strict=True))
        return iter(pixels)

    monkeypatch.setattr(Loader, "batches", batches)
    events = []
    train_backbone(config(epochs=1, sampler="class-balanced"), out=tmp_path, report=events.append)
    assert len(seen) == 363
    assert sum(isinstance(e, Step) for e in events) == 6
    smallest = np.flatnonzero(load_dataset(config().data).train.labels == 9)  # 5 images drawn 36 times
    ways = [[pixels for position, pixels in seen if position == one] for one in smallest]
    assert sorted(map(len, ways)) == [7, 7, 7, 7, 8]
    assert sum(len({w.numpy().tobytes() for w in of_one}) for of_one in ways) > 20  # of 9 shifts


def test_a_finished_training_is_not_done_again(tmp_path):
    train_backbone(config(), out=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    assert train_backbone(config(), out=tmp_path).trained_epochs == 0
    assert (tmp_path / "last.pt").read_bytes() == before


def test_sigterm_saves_in_mid_epoch_and_exits_143(tmp_path):
    process = command(tmp_path, epochs=400)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, err = finished(process)
    assert code == 143, err
    assert "the same command continues" in err
    assert "Traceback" not in err
    state = checkpoint.read(tmp_path / "out" / "last.pt")
    assert not state["complete"]
    assert 1 <= state["epoch"] < 400


EVERYTHING = {
    "loss": "ldam-drw",
    "drw_start": 0.5,
    "sampler": "class-balanced",
    "force_double_balancing": True,
    "ema": 0.8,
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_resuming_in_mid_epoch_is_exact(tmp_path, settings):
    """Stops after every step in turn, as SIGTERM does, and compares with an undisturbed run."""
    undisturbed = train_backbone(config(**settings), out=tmp_path / "whole").checkpoint
    from pipeline.errors import Terminated

    stops = 0
    while True:
        steps = 0

        def stop_after_two(event):
            nonlocal steps
            steps += isinstance(event, Step)
            if steps == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            train_backbone(config(**settings), out=tmp_path / "pieces", report=stop_after_two)
            break
        except Terminated as stop:
            stops += stop.exit_code == 143
    assert stops >= 5
    assert_same_state(undisturbed, tmp_path / "pieces" / "last.pt")
    told = [
        [json.loads(s) for s in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "pieces")
    ]
    for key in ("loss", "train_accuracy", "val_accuracy"):  # an epoch in pieces is told as a whole one
        assert [line[key] for line in told[0]] == pytest.approx([line[key] for line in told[1]], rel=1e-12)


def test_another_configuration_is_refused_and_overwrite_starts_anew(tmp_path):
    train_backbone(config(), out=tmp_path)
    with pytest.raises(ConfigError, match=r"backbone\.lr was 0\.1, now 0\.2.*--overwrite"):
        train_backbone(config(lr=0.2), out=tmp_path)
    tree = digits_tree()
    tree["data"]["imbalance_factor"] = 11
    with pytest.raises(ConfigError, match=r"data \(dataset\) was"):
        train_backbone(make_config(tree, "t"), out=tmp_path)
    assert train_backbone(config(lr=0.2), out=tmp_path, overwrite=True).trained_epochs == 2


def test_a_foreign_or_missing_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "last.pt")
    with pytest.raises(DataError, match="not one of `pipeline train-backbone`"):
        checkpoint.load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(DataError, match="no such checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "none.pt")


def test_a_diverged_training_says_what_to_change(tmp_path):
    from pipeline.errors import PipelineError

    with pytest.raises(PipelineError, match=r"the loss is (nan|inf).*backbone\.lr"):
        train_backbone(config(lr=1e30, epochs=3), out=tmp_path)


def test_float16_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match="only GPUs compute in it"):
        train_backbone(config(precision="float16"), out=tmp_path)


def test_two_ranks_train_as_one(tmp_path):
    """Same global batches; with batch normalisation each rank normalises its half, so close, not equal; counts are exact."""
    one = train_backbone(config(epochs=1), out=tmp_path / "one")
    code, out, err = finished(command(tmp_path, "--nproc", "2", "--json", epochs=1))
    assert code == 0, err
    document = json.loads(out)  # one document, of rank 0 alone
    assert document["trained_epochs"] == 1
    a, b = weights(one.checkpoint), weights(tmp_path / "out" / "last.pt")
    difference = torch.cat([(a[k] - b[k]).float().flatten() for k in a if "weight" in k]).norm()
    size = torch.cat([a[k].float().flatten() for k in a if "weight" in k]).norm()
    assert difference / size < 0.2
    assert document["last"]["loss"] == pytest.approx(one.last["loss"], rel=0.1)


@pytest.mark.slow
def test_two_ranks_give_the_same_parameters_on_a_net_without_batch_norm(tmp_path):
    setting = {"model": "vit_tiny_patch16_224", "width": 1, "epochs": 1, "batch_size": 182, "lr": 0.001}
    tree = digits_tree(**setting)
    tree["data"]["image_size"] = 224
    tree["data"]["max_per_class"], tree["data"]["imbalance_factor"], tree["data"]["val_per_class"] = 2, 1, 0
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    digests = []
    for nproc in ("1", "2"):
        words = [sys.executable, "-m", "pipeline", "train-backbone", "small.yaml", "--out", nproc, "--nproc", nproc]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        digests.append(weights(tmp_path / nproc / "last.pt"))
    for name, tensor in digests[0].items():
        torch.testing.assert_close(tensor, digests[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_mistake_under_torchrun_is_said_once(tmp_path):
    code, _, err = finished(command(tmp_path, "--nproc", "2", "--set", "data.max_per_class=5000"))
    assert code == 2
    assert err.count("max_per_class=5000: class 0 would need") == 1
    assert "Traceback" not in err


def test_torchrun_itself_works(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(digits_tree(epochs=1)))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline"]
    done = subprocess.run(
        [*words, "train-backbone", "tiny.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/tiny/backbone/last.pt").exists()


def test_image_files_train_too(tmp_path):
    from PIL import Image

    for split, count in (("train", 12), ("val", 2)):
        for label in range(3):
            folder = tmp_path / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 80, (20, 24, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    tree = digits_tree(epochs=6, batch_size=8, lr=0.05)
    tree["data"] = {"source": "folder", "path": str(tmp_path / "images"), "image_size": 16, "workers": 1}
    result = train_backbone(make_config(tree, "t"), out=tmp_path / "out")
    assert result.dataset["counts"] == [10, 10, 10]  # there is no test folder: two a class are held out
    assert result.last["val_accuracy"] > 60
    shutil.rmtree(tmp_path / "images/train/class 1")
    (tmp_path / "images/train/class 1").mkdir()
    with pytest.raises(DataError, match="without a training image: class 1"):
        train_backbone(make_config(tree, "t"), out=tmp_path / "out")
