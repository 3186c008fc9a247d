"""Settings that are chosen from a folder of images: what is seen, what is written, and that a run of it goes to its end."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import proposal as proposals
from pipeline.cli import invoke
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.proposal import holds_images, propose
from pipeline.run import run_pipeline

SIZES = {"eight": 24, "one": 12, "three": 4}  # images of each class; the last keeps all in training
DIGITS = {"eight": 8, "one": 1, "three": 3}
QUICK = ("--set", "data.image_size=32", "--set", "data.workers=0", "--set", "rebalance.seeds=0")


def write_digits(folder, sizes=SIZES, side=40):
    """Write handwritten digits, enlarged to `side` pixels, as FOLDER/CLASS/N.png."""
    digits = load_digits()
    for name, size in sizes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(digits.images[digits.target == DIGITS[name]][:size]):
            Image.fromarray((image * 15.9).astype(np.uint8)).resize((side, side + 8)).save(
                folder / name / f"{number}.png"
            )
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "my photos")
    return tmp_path / "my photos"


def words_of(capsys) -> str:
    streams = capsys.readouterr()
    return " ".join((streams.out + streams.err).split())


def test_counts_sizes_formats_and_odd_files_are_seen(photos):
    Image.new("CMYK", (90, 400)).save(photos / "one" / "long.jpg")
    (photos / "one" / "torn.jpg").write_bytes(b"no image")
    frames = [Image.new("L", (50, 50), grey) for grey in (0, 200)]
    frames[0].save(photos / "eight" / "moves.gif", save_all=True, append_images=frames[1:])
    shutil.copy(photos / "eight" / "0.png", photos / "one" / "copy.png")
    shutil.copy(photos / "three" / "0.png", photos / "three" / "again.png")
    survey = propose(photos).survey
    assert survey.class_names == ("eight", "one", "three")
    assert survey.counts == {"train": [25, 15, 5]}
    assert survey.formats == {"PNG": 42, "GIF": 1, "JPEG": 1}
    assert survey.shorter_side == 40
    for phrase in (
        "1 image(s) are more than 3 times as long as wide, of which the middle is taken: one/long.jpg",
        "1 image(s) are CMYK, which is converted to RGB: one/long.jpg",
        "1 image(s) cannot be opened: one/torn.jpg",
        "1 image(s) have several frames, of which the first is taken: eight/moves.gif",
        "1 group(s) of equal files lie in several classes, so that one of their labels is wrong: eight/0.png = one/copy.png",
        "1 group(s) of equal files lie several times in one class: three/0.png = three/again.png",
    ):
        assert phrase in survey.oddities


def test_copies_of_training_images_among_test_images_are_seen(tmp_path):
    for split in ("train", "test"):
        write_digits(tmp_path / split)
    oddities = propose(tmp_path).survey.oddities
    assert any(
        text.startswith("40 group(s) of equal files lie in training and in validation or test images")
        for text in oddities
    )


def test_of_many_files_some_headers_are_read_and_the_text_says_so(photos, monkeypatch):
    monkeypatch.setattr("pipeline.data.survey.MOST_HEADERS", 14)
    (photos / "eight" / "0.png").write_bytes(b"torn")
    survey = propose(photos).survey
    assert len(survey.sides) == 13  # every third of 40, less the torn one
    assert "1 image(s) of 14 that were looked at cannot be opened: eight/0.png" in survey.oddities


def test_init_writes_what_a_run_of_the_folder_takes_with_reasons(photos, capsys, monkeypatch):
    assert invoke(["init", "my photos", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["images"], document["next"], document["out"]) == (40, "pipeline run", "pipeline.yaml")
    text = (photos.parent / "pipeline.yaml").read_text(encoding="utf-8")
    written, direct = load_config("pipeline.yaml"), propose(photos.relative_to(photos.parent)).config()
    assert written == direct
    assert (written.name, written.backbone.encoder, written.data.image_size) == ("my-photos", "lite0", 224)
    assert (written.dump.views, written.dump.on_error) == (1, "skip")
    tree = yaml.safe_load(text)
    assert tree["data"] == {
        "source": "folder", "path": "my photos", "val_per_class": None, "test_per_class": None, "image_size": 224,
    }  # fmt: skip
    comments = " ".join(line.strip().removeprefix("# ") for line in text.splitlines() if line.lstrip().startswith("#"))
    assert "40 images (40 train) in 3 classes, from 24 in eight to 4 in three" in comments
    assert "15% of each class are held out, at least 2 and at most 50, 6 in all for each" in comments
    assert "1 class(es) with fewer than 5 images stay in training whole" in comments
    assert "has seen ImageNet" in comments
    assert max(map(len, text.splitlines())) <= 100
    assert invoke(["init", "my photos"]) == 2
    assert "pipeline.yaml: exists; replace it with --overwrite" in words_of(capsys)
    assert invoke(["init", "my photos", "--out", "sub.yaml"]) == 0
    monkeypatch.chdir("my photos")
    assert load_config("../sub.yaml").data.path.resolve() == photos


@pytest.mark.parametrize(
    ("side", "size", "model"), [(20, 32, "cifar_resnet32"), (60, 64, "resnet18"), (200, 128, "resnet18")]
)
def test_without_pretrained_weights_a_network_is_trained_and_the_extra_is_offered(
    tmp_path, monkeypatch, side, size, model
):
    monkeypatch.setattr(proposals, "installed_aliases", lambda: ())
    proposal = propose(write_digits(tmp_path / "images", side=side))
    config = proposal.config()
    assert (config.backbone.encoder, config.backbone.model, config.data.image_size) == (None, model, size)
    assert config.dump.views == 4
    assert "100 passes over 40 images" in str(proposal).replace("\n ", "")
    assert "pip install 'iwb-pipeline[lite]'" in " ".join(str(proposal).split())


def test_splits_that_are_there_are_taken(tmp_path):
    for split in ("train", "val", "test"):
        write_digits(tmp_path / split, {"eight": 6, "one": 5})
    proposal = propose(tmp_path)
    assert proposal.survey.counts == {split: [6, 5] for split in ("train", "val", "test")}
    assert "per_class" not in str(proposal.tree())


def test_a_run_of_a_folder_ends_with_table_report_and_model(photos, capsys):
    assert invoke(["run", "my photos", "--json", *QUICK]) == 0
    streams = capsys.readouterr()
    document = json.loads(streams.out)
    assert document["report"] == "runs/my-photos/report.html"
    assert document["baseline"]["all"] > 60
    assert "These settings were chosen from the images" in streams.err
    assert invoke(["run", "my photos", *QUICK]) == 0
    assert "runs/my-photos/report.html: up to date" in words_of(capsys)
    assert invoke(["export", "my photos", "--out", "model"]) == 0
    capsys.readouterr()
    assert invoke(["predict", "model", "my photos/one", "--json"]) == 0
    assert "one" in capsys.readouterr().out
    assert invoke(["evaluate", "my photos", "--split", "val"]) == 0
    assert invoke(["config", "my photos"]) == 0
    assert "data.image_size: 224 [images; default: null]" in words_of(capsys)


def test_images_without_settings_are_proposed_instead_of_the_digits(photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    for command in ("run", "train-backbone", "dump-features"):
        assert invoke([command, "--dry-run"]) == 2
        text = words_of(capsys)
        assert "`cd .. && pipeline run my photos`" not in text
        assert "cd .. && pipeline run 'my photos'" in text
        assert "pipeline run digits-lt" in text
    assert not (photos / "runs").exists()
    with pytest.raises(ConfigError, match="lies among the class folders"):
        run_pipeline(propose(photos).config(), out=photos / "runs" / "x")
    (photos / "pipeline.yaml").write_text("data: {source: digits}\nbackbone: {model: cifar_resnet8}\n")
    assert invoke(["run", "--dry-run"]) == 0
    monkeypatch.chdir(photos.parent)
    assert invoke(["run", "my photos", "--dry-run"]) == 0  # the folder's own file
    assert "cifar_resnet8" in words_of(capsys)


def test_a_folder_with_pictures_somewhere_in_it_is_no_data_set(tmp_path):
    for place in ("docs/images", "code", "docs/more"):
        (tmp_path / place).mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "docs" / "images" / "a.png")
    assert not holds_images(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "docs" / "more" / "a.png")
    assert holds_images(tmp_path / "docs")
    assert not holds_images(tmp_path)


def test_init_of_a_folder_that_is_not_there_names_it_and_no_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["init", "nowhere"]) == 3
    message = capsys.readouterr().err
    assert "nowhere: no such folder" in message
    assert "data.path" not in message
