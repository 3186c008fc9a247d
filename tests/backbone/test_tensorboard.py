"""What TensorBoard reads back is what metrics.jsonl says, each epoch once, also after kills."""

import json
import sys

import pytest

from pipeline.backbone.tensorboard import TAGS
from pipeline.backbone.train import train_backbone
from pipeline.config import make_config
from pipeline.errors import ConfigError
from tests import ranks
from tests.conftest import digits_tree


def assert_shown(out, *, epochs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    assert {tag for key, tag in TAGS.items() if any(line[key] is not None for line in lines)} == set(
        found.Tags()["scalars"]
    )
    for key, tag in TAGS.items():
        kept = [line for line in lines if line[key] is not None]
        if kept:
            scalars = found.Scalars(tag)
            assert [scalar.step for scalar in scalars] == [line["epoch"] for line in kept], tag
            assert [scalar.value for scalar in scalars] == pytest.approx([line[key] for line in kept], rel=1e-6), tag
            assert [scalar.wall_time for scalar in scalars] == pytest.approx([line["time"] for line in kept])


@pytest.mark.slow
def test_every_epoch_is_there_once_whatever_happened(tmp_path):
    out, tree = tmp_path / "out", digits_tree(epochs=4, validate_every=2, tensorboard=True)
    for moment in ("after:line-2", "after:last-3"):  # an epoch told and lost; one kept and perhaps not told
        assert ranks.train(tree, out, kill_at=moment, scratch=tmp_path).codes == [-9]
    assert ranks.train(tree, out, scratch=tmp_path).codes == [0]
    assert_shown(out, epochs=4)


def test_a_finished_training_is_shown_when_asked_and_nothing_is_imported_when_not(tmp_path):
    tree = digits_tree(epochs=1)
    train_backbone(make_config(tree, "t"), out=tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    tree["backbone"]["tensorboard"] = True
    assert train_backbone(make_config(tree, "t"), out=tmp_path).trained_epochs == 0
    assert_shown(tmp_path, epochs=1)


def test_without_the_package_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'iwb-pipeline\[tensorboard\]'"):
        train_backbone(make_config(digits_tree(epochs=1, tensorboard=True), "t"), out=tmp_path)
