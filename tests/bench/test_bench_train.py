"""What the trainer is measured against does the same work, and times are of what they are named for."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backbone.events import Epoch
from pipeline.bench import ranks as bench_ranks
from pipeline.bench import train as bench
from pipeline.bench import training_loops as loops
from pipeline.cli import invoke
from pipeline.distributed import Ranks, Signals
from pipeline.resources import usable_cores

CPU = torch.device("cpu")
TINY = {"width": 0.25, "batch_size": 100}


def driven(config, data, out) -> loops.TrainerLoop:
    return loops.TrainerLoop(config, data, out=out, ranks=Ranks(0, 1, CPU), signals=Signals())


def test_the_bare_loop_does_what_the_trainer_does(tmp_path):
    """One batch of everything, nothing augmented: the same step leads to the same weights."""
    config, data = loops.training("cifar_resnet8", **TINY, **{"data.augment": "none"}), loops.images(100, 10)
    batches = loops.ready(config, data, device=CPU)
    drive, bare = driven(config, data, tmp_path), loops.BareLoop(config, batches, classes=100, device=CPU)
    before = {name: weight.clone() for name, weight in bare.classifier.named_parameters()}
    for _ in range(2):
        drive.steps()
        bare.steps()
    theirs = dict(drive.trainer.classifier.named_parameters())
    for name, weight in bare.classifier.named_parameters():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(weight, before[name])


def test_the_time_of_the_steps_is_without_what_ends_an_epoch(tmp_path, monkeypatch):
    drive = driven(loops.training("cifar_resnet8", **TINY), loops.images(200, 10), tmp_path)
    finish = drive.trainer._finish_epoch

    def slowly() -> Epoch:
        time.sleep(0.6)
        return finish()

    monkeypatch.setattr(drive.trainer, "_finish_epoch", slowly)
    steps, whole = drive.steps(), drive.epoch()
    assert drive.trainer.epoch == 2
    assert 0 < steps < whole
    assert whole > 0.6
    drive.close()


def test_a_job_is_as_fast_as_its_slowest_rank_and_processes_add_up():
    seconds = [{"together": [2.0, 1.0], "alone": [1.0, 1.0]}, {"together": [4.0, 5.0], "alone": [2.0, 4.0]}]
    measure = bench_ranks.compare_rates(seconds, images=100, network="x")
    assert measure.figures["two ranks, all images/s"] == [50.0, 40.0]
    assert measure.figures["two processes, all images/s"] == [150.0, 125.0]
    assert (measure.value, measure.target, measure.met) == (round(45 / 137.5, 4), 0.95, False)


def test_the_ratios_say_what_they_compare(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "NETWORK", "cifar_resnet8")
    monkeypatch.setattr(bench, "BATCH", 100)
    monkeypatch.setattr(loops, "BATCH", 100)
    said: list[str] = []
    with Signals() as signals:
        found = list(
            bench.over_bare(tmp_path, steps=1, repeat=1, device=CPU, signals=signals, say=said.append),
        )
    assert [(m.target, m.at_most) for m in found] == [(1.03, True), (1.03, True), (1.0, False), (1.0, False)]
    for measure, way in zip(found, ("trainer", "everything", "loader", "loader with policy"), strict=True):
        ours, bare = measure.figures[f"{way}, images/s"], measure.figures["bare, images/s"]
        expected = ours / bare if way.startswith("loader") else bare / ours
        assert measure.value == pytest.approx(expected, rel=0.01)
    assert said


def test_two_hundred_epochs_are_the_first_and_many_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MINUTES", {"cifar_resnet8": 2.0})
    monkeypatch.setattr(bench, "ROWS", 100)
    monkeypatch.setattr(bench, "VAL_ROWS", 20)
    with Signals() as signals:
        how = {"signals": signals, "say": lambda text: None, "modes": ("none",)}
        (found,) = bench.full_training(tmp_path, epochs=2, device=CPU, **how)
    first, others = found.figures["first epoch, s"], found.figures["other epochs, all s"]
    assert len(others) == 2
    assert found.value == pytest.approx((first + 199 * sum(others) / 2) / 60, abs=0.02)
    assert (found.unit, found.at_most, found.target) == ("min", True, None)  # the target is that of CUDA graphs


def test_generated_images_have_every_class_and_are_the_same_every_time():
    first, again = loops.images(300, 100), loops.images(300, 100)
    assert np.array_equal(first.train.images, again.train.images)
    assert (first.counts == 3).all()
    assert len(first.val) == 100


@pytest.mark.slow
def test_image_files_are_loaded_and_trained_on(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.LARGE, "cpu", ("resnet18", 2))
    measure = bench.image_files(tmp_path, repeat=1, device=CPU, say=lambda text: None)
    assert measure.target == 1.0
    (loader,), (network,) = (measure.figures[f"{way}, all s"] for way in ("loader", "network"))
    assert measure.value == pytest.approx(max(8, 2 * usable_cores()) * 2 / loader / (4 / network), rel=0.01)


@pytest.mark.slow
def test_the_whole_benchmark_as_a_command(tmp_path, capsys, monkeypatch):
    """With two real ranks."""
    monkeypatch.setattr(bench, "NETWORK", "cifar_resnet8")
    out = tmp_path / "bench.json"
    assert invoke(["bench", "train", "--small", "--repeat", "1", "--device", "cpu", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written.pop("header")["kind"] == "bench"
    assert written == found
    (two,) = [m for m in found["measures"] if m["name"].startswith("two ranks")]
    assert two["value"] > 0
    assert len(found["measures"]) == 5
    assert not list(Path(tmp_path).glob("bench-train.*"))
