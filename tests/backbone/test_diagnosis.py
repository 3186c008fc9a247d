"""What is measured of every class while training: against hand-written formulas, and the same after a kill."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backbone import checkpoint, diagnosis
from pipeline.backbone.arithmetic import Arithmetic
from pipeline.backbone.build import classifier, encode
from pipeline.backbone.events import Epoch, Step
from pipeline.backbone.image_classifier import ImageClassifier
from pipeline.backbone.train import train_backbone
from pipeline.config import make_config
from pipeline.data import load_dataset
from pipeline.data.transform import Loader
from pipeline.errors import Terminated
from tests.conftest import digits_tree


def config(**backbone):
    return make_config(digits_tree(diagnose_every=1, **backbone), "t")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 25), st.integers(0, 99))
def test_every_class_is_there_with_as_many_as_it_has(counts, per_class, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    ids = np.random.default_rng(seed + 1).permutation(len(labels)) + 7
    rows = diagnosis.fixed_rows(labels, ids, per_class=per_class, seed=seed)
    assert np.bincount(labels[rows]).tolist() == [min(n, per_class) for n in counts]
    moved = np.random.default_rng(seed + 2).permutation(len(labels))  # the choice follows the sample, not its place
    again = diagnosis.fixed_rows(labels[moved], ids[moved], per_class=per_class, seed=seed)
    assert sorted(ids[moved][again]) == sorted(ids[rows])


def test_the_gradient_is_the_closed_form(tiny_backbone):
    model = checkpoint.load_checkpoint(tiny_backbone).model.double()
    learner, random = ImageClassifier(model), np.random.default_rng(0)
    z = torch.from_numpy(random.normal(size=(9, classifier(model).in_features)))
    y = torch.from_numpy(random.integers(0, 10, 9))
    norms, guess = diagnosis.gradient_norms(learner, z, y)
    weight, bias = (p.detach() for p in (classifier(model).weight, classifier(model).bias))
    logits = z @ weight.T + bias
    by_hand = ((torch.softmax(logits, 1) - torch.eye(10, dtype=torch.float64)[y]) @ weight).norm(dim=1)
    torch.testing.assert_close(norms, by_hand, rtol=1e-5, atol=1e-7)  # the loss is taken in float32
    assert torch.equal(guess, logits.argmax(1))
    assert all(p.grad is None for p in model.parameters())


def test_class_sums_leave_out_what_could_not_be_read(tiny_backbone):
    model = checkpoint.load_checkpoint(tiny_backbone).model
    images = torch.randn(6, 3, 8, 8)
    labels = torch.tensor([0, 0, 3, -100, 3, 1])
    sums = diagnosis.class_sums(
        ImageClassifier(model), [(images, labels)], classes=10, arithmetic=Arithmetic(torch.float32)
    )
    assert sums[2].tolist() == [2, 1, 0, 2, 0, 0, 0, 0, 0, 0]
    norms, guess = diagnosis.gradient_norms(ImageClassifier(model), encode(model, images), labels.clamp(min=0))
    assert sums[1, 3] == pytest.approx(float(norms[2] + norms[4]))
    assert sums[0, 0] == int((guess[:2] == 0).sum())


def test_the_file_says_what_the_checkpoint_gives(tmp_path):
    """The last epoch measured again from last.pt, image by image."""
    done = train_backbone(config(epochs=2, diagnose_per_class=6), out=tmp_path)
    with open(tmp_path / "diagnostics.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] == "2"]
    trained, train = checkpoint.load_checkpoint(done.checkpoint), load_dataset(config().data).train
    assert [int(r["images"]) for r in rows] == trained.counts.tolist()
    assert [int(r["measured"]) for r in rows] == np.minimum(trained.counts, 6).tolist()
    chosen = diagnosis.fixed_rows(train.labels, train.ids, per_class=6, seed=0)
    loader = Loader(train, trained.transform, device=torch.device("cpu"))
    (pixels,) = loader.batches([chosen])
    with torch.no_grad():
        logits = trained.model(pixels)
        p = torch.softmax(logits, 1)
        y = torch.from_numpy(train.labels[chosen])
        norms = ((p - torch.eye(10)[y]) @ classifier(trained.model).weight).norm(dim=1)
    for c, row in enumerate(rows):
        assert float(row["accuracy"]) == pytest.approx(100 * (logits.argmax(1) == y)[y == c].double().mean().item())
        assert float(row["gradient"]) == pytest.approx(norms[y == c].mean().item(), rel=1e-4)


def test_looking_changes_nothing(tmp_path):
    """Not even the running statistics of batch normalisation, in an epoch without validation."""
    looked = train_backbone(config(validate_every=2), out=tmp_path / "looked").checkpoint
    alone = train_backbone(make_config(digits_tree(validate_every=2), "t"), out=tmp_path / "alone").checkpoint
    digests = [checkpoint.load_checkpoint(path).weights_digest for path in (looked, alone)]
    assert digests[0] == digests[1]
    assert not (tmp_path / "alone" / "diagnostics.csv").exists()


def test_only_the_epochs_that_were_asked_for_and_the_last(tmp_path):
    train_backbone(make_config(digits_tree(epochs=5, diagnose_every=2), "t"), out=tmp_path)
    lines = (tmp_path / "diagnostics.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines[::10]] == [2, 4, 5]


@pytest.mark.parametrize("stop_at", [(0, 2), (1, 1), (2, 6)])
def test_stops_and_torn_lines_leave_the_same_file(tmp_path, stop_at):
    train_backbone(config(epochs=3), out=tmp_path / "whole")

    def stop(event):
        if isinstance(event, Step) and (event.epoch, event.step) == stop_at:
            os.kill(os.getpid(), 15)

    with pytest.raises(Terminated):
        train_backbone(config(epochs=3), out=tmp_path / "pieces", report=stop)
    file = tmp_path / "pieces" / "diagnostics.csv"
    if file.exists():
        with open(file, "a", encoding="utf-8") as torn:  # what a kill before the checkpoint leaves
            torn.write("3,0,110,20,55.0,0.1\n3,1,78,2")
    train_backbone(config(epochs=3), out=tmp_path / "pieces")
    assert file.read_text() == (tmp_path / "whole" / "diagnostics.csv").read_text()


def test_a_kill_between_the_lines_and_the_checkpoint_repeats_the_epoch(tmp_path):
    train_backbone(config(epochs=2), out=tmp_path / "whole")
    saved = []

    def keep(event):
        if isinstance(event, Epoch) and event.epoch == 1:
            saved.append((tmp_path / "pieces" / "last.pt").read_bytes())

    train_backbone(config(epochs=2), out=tmp_path / "pieces", report=keep)
    (tmp_path / "pieces" / "last.pt").write_bytes(saved[0])  # both files have epoch 2, the checkpoint has not
    train_backbone(config(epochs=2), out=tmp_path / "pieces")
    whole, pieces = ((tmp_path / d / "diagnostics.csv").read_text() for d in ("whole", "pieces"))
    assert whole == pieces
    assert len((tmp_path / "pieces" / "metrics.jsonl").read_text().splitlines()) == 2


def test_overwrite_forgets_the_old_diagnosis(tmp_path):
    train_backbone(config(epochs=2), out=tmp_path)
    train_backbone(config(epochs=1, lr=0.05), out=tmp_path, overwrite=True)
    assert len((tmp_path / "diagnostics.csv").read_text().splitlines()) == 11
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["epoch"] == 1
