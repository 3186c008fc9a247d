"""Class C: folders, lists and names are read as people mean them, or refused with the fix; never misread."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import invoke
from pipeline.config import DataConfig
from pipeline.console import Talk
from pipeline.data import load_dataset
from pipeline.data.images import is_image_name, read_image
from pipeline.data.names import class_names_from, split_of
from pipeline.deploy.predict import find_images
from pipeline.errors import ConfigError, DataError
from pipeline.results.files import csv_line
from pipeline.text import markdown, printable
from tests.data.test_sources import write_images

IMAGES = Path(__file__).parent / "images"


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "VALID", "TEST"),
        ("training_set", "validation_set", "test_set"),
        ("training", "validation", "testing"),
        ("train-data", "val_images", "Test Set"),
        ("trainset", "valid", "testset"),
    ],
)
def test_the_usual_names_of_split_folders_are_no_classes(train, val, test, tmp_path):
    for folder in (train, val, test):
        write_images(tmp_path, {"cat": 6, "dog": 6}, split=folder)
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert set(dataset.splits) == {"train", "val", "test"}


def test_names_that_only_begin_like_a_split_are_classes():
    assert [split_of(name) for name in ("trains", "tester", "valve", "test1", "retrain", "contest")] == [None] * 6


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("Train", "train"), "both look like the train split"),
        (("train", "val", "Validation"), "both look like the val split"),
        (("TEST", "Val"), "no folder of training images"),
    ],
)
def test_split_folders_that_leave_a_question_are_refused(folders, words, tmp_path):
    for folder in folders:
        write_images(tmp_path, {"cat": 2, "dog": 2}, split=folder)
    with pytest.raises(DataError, match=words):
        load_dataset(DataConfig(source="folder", path=tmp_path))


@pytest.mark.parametrize("tool", [".thumbs", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN"])
@pytest.mark.parametrize("depth", ["", "train", "train/cat", "train/cat/deeper"])
def test_tool_folders_hold_no_images_at_any_depth(tool, depth, tmp_path):
    write_images(tmp_path, {"cat": 3, "dog": 3}, split="train")
    place = tmp_path / depth / tool
    place.mkdir(parents=True)
    Image.new("L", (8, 8)).save(place / "thumb.png")
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path, val_per_class=0, test_per_class=0))
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset.train) == 6
    assert len(find_images([tmp_path])) == 6


def test_images_beside_class_folders_are_named(tmp_path):
    write_images(tmp_path, {"cat": 3, "dog": 3}, split="train")
    Image.new("L", (8, 8)).save(tmp_path / "train/stray.png")
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path, val_per_class=0, test_per_class=0))
    assert any("stray.png" in note and "belong to no class" in note for note in dataset.notes)


READERS = {
    "image": read_image,
    "list": lambda path: load_dataset(DataConfig(source="list", train_list=path)),
    "predict": lambda path: find_images([path]),
}


@pytest.mark.parametrize("kind", READERS)
def test_pipes_are_refused_unopened(kind, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"not a file|neither a file nor a folder"):
        READERS[kind](tmp_path / "a.png")


@pytest.mark.parametrize(
    "name", ["a\rb", "a\nb", "a\x1b[31mb", "a\x00b", "a\x85b", "a\u2028b", "a\u202eb", "a\udce9b", " ", ""]
)
def test_class_names_that_cannot_be_printed_are_refused(name):
    with pytest.raises(DataError, match=r"cats.txt: (class name|the name of class 1 is empty)"):
        class_names_from(["dog", name], "cats.txt")


def test_blanks_around_class_names_are_left_out_and_twins_refused(tmp_path):
    assert class_names_from([" cat ", "\ufeffdog", b"c\xc3\xa9pe", "a b"], "x") == ("cat", "dog", "cépe", "a b")
    for twins in (["cat", "cat "], ["\u00e9", "e\u0301"]):
        with pytest.raises(DataError, match="two classes have one name"):
            class_names_from(twins, "x")
    write_images(tmp_path, {" cat": 3, "dog\r": 3})
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path, val_per_class=0, test_per_class=0))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.counts.tolist() == [3, 3]
    (tmp_path / "dog\r").rename(tmp_path / "do\rg")
    with pytest.raises(DataError, match=r"class name 'do\\rg' holds the character '\\r'; rename it"):
        load_dataset(DataConfig(source="folder", path=tmp_path))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("a.png 0\nb.png ²", r"line 2: expected `relative/path label`"),
        ("a.png 0\nb.png --1", "line 2: expected"),
        ("a.png 0\nb.png 12345678901234567890", "line 2: expected"),
        ("a.png 0\nb.png 100000000", "needs 100000001 classes, and there are 2 samples"),
        ("a.png 1\nb.png 2", "line 1: label 1 is the smallest; labels count from 0"),
        ("a.png 0\n\nb.png -1", "line 3: label -1"),
        ("a.png 0\nb.png 1.0", "line 2: expected"),
        ("a.png,0\nb.png,1", "line 1: expected"),
    ],
)
def test_labels_that_are_none_are_refused_with_their_line(lines, words, tmp_path):
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "train.txt").write_text(lines)
    with pytest.raises(DataError, match=words):
        load_dataset(DataConfig(source="list", train_list=tmp_path / "train.txt"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_of_any_editor_are_read(encoding, end, tmp_path):
    for name in ("a", "b c", "d"):
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    text = end.join(["a.png 0", "b c.png\t1", "  d.png   1 ", "a.png 0", "d.png 0", ""])
    (tmp_path / "train.txt").write_bytes(text.encode(encoding))
    config = DataConfig(source="list", train_list=tmp_path / "train.txt", val_per_class=0, test_per_class=0)
    dataset = load_dataset(config)
    assert dataset.train.labels.tolist() == [0, 1, 1, 0, 0]
    (note,) = (note for note in dataset.notes if "second time" in note)
    assert "2 line(s) name an image for the second time, 1 of them with another label" in note
    assert "'a.png' in line 4" in note
    (tmp_path / "names.txt").write_bytes(end.join(["cat", "dog", ""]).encode(encoding))
    assert load_dataset(config.model_copy(update={"class_names": tmp_path / "names.txt"})).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([[0], [1]]), None),
        (np.array([True, False]), r"got bool \(2,\); save labels.astype"),
        (np.array([0.0, 1.0]), r"got float64 \(2,\); save labels.astype"),
        (np.eye(2), r"save labels.argmax\(1\)"),
        (np.array([0, 10**9]), "needs 1000000001 classes"),
        (np.array([0, 2**63], np.uint64), "needs"),
    ],
)
def test_arrays_of_labels_are_squeezed_or_refused_with_the_fix(labels, words, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    extra = {"class_names": ["a", "b"]} if words and "argmax" in words else {}
    np.savez(tmp_path / "a.npz", images=images, labels=labels, **extra)
    config = DataConfig(source="npz", path=tmp_path / "a.npz", val_per_class=0, test_per_class=0)
    if words is None:
        assert load_dataset(config).counts.tolist() == [1, 1]
        return
    with pytest.raises(DataError, match=words):
        load_dataset(config)


def test_objects_in_an_npz_are_refused_without_a_hint_how_to_run_them(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object), labels=np.array([0]))
    with pytest.raises(DataError, match="it holds Python objects") as caught:
        load_dataset(DataConfig(source="npz", path=tmp_path / "a.npz"))
    assert "allow_pickle" not in str(caught.value)


def test_class_names_beside_a_folder_are_refused_not_ignored(tmp_path):
    write_images(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"data\.class_names: source folder has class names of its own"):
        load_dataset(DataConfig(source="folder", path=tmp_path, class_names=tmp_path / "names.txt"))


def float_image(path: Path, low: float, high: float) -> Path:
    Image.fromarray(np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)).save(path)
    return path


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1), (0, 1.5), (0, np.nan), (0, np.inf)])
def test_floating_point_pixels_without_a_known_range_are_refused(low, high, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(DataError, match=r"a.tif: unreadable image \((floating|pixels)"):
        read_image(float_image(tmp_path / "a.tif", low, high))


def test_floating_point_pixels_from_0_to_1_are_scaled(tmp_path):
    image = read_image(float_image(tmp_path / "a.tif", 0, 1))
    assert (image.getpixel((0, 0)), image.getpixel((7, 7))) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("name", ["srational2.jpg", "badexififd.jpg"])
def test_of_broken_exif_only_the_orientation_matters(name):
    assert read_image(IMAGES / name).size == (32, 32)


def test_warnings_of_decoders_carry_the_name_of_the_file():
    with pytest.warns(UserWarning, match=r"shortifd\.jpg: Corrupt EXIF"):
        read_image(IMAGES / "shortifd.jpg")


def test_images_of_one_colour_are_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    images[2] = 7
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 0, 1, 1]))
    config = DataConfig(source="npz", path=tmp_path / "a.npz", val_per_class=0, test_per_class=0)
    assert "1 training image(s) are one colour: image 2" in load_dataset(config).notes


@pytest.mark.parametrize("cell", ["=1+1", "+SUM(A1)", "-2+3", "@x", "\tx", "\rx", "=cmd|' /C calc'!A0"])
def test_no_cell_of_a_csv_file_is_a_formula(cell):
    (row,) = csv.reader(io.StringIO(csv_line([cell, 1])))
    assert row == [f"'{cell}", "1"]


def test_numbers_and_names_with_line_ends_stay_what_they_are_in_csv():
    cells = ["-1.5", "+3e-05", "a\nb", "a\rb", 'a"b', "−2", "a=b"]
    (row,) = csv.reader(io.StringIO(csv_line(cells), newline=""))
    assert row == cells


def test_control_sequences_never_reach_a_terminal(tmp_path, capfd):
    assert printable("a\x1b[2Jb\x9bc\udce9\u202e\n") == "a\\x1b[2Jb\\x9bc\\udce9\\u202e\n"
    Talk().say("a\x1b]0;x\x07b")
    Talk().error("a\x1b]0;x\x07b")
    evil = tmp_path / "evil\x1b[2J.yaml"
    assert invoke(["config", str(evil)]) != 0
    assert "\x1b" not in capfd.readouterr().err


def test_names_in_a_card_are_shown_as_they_are():
    assert markdown("<img src=x> [a](b) `c` | d_e") == "&lt;img src=x&gt; \\[a\\](b) \\`c\\` \\| d\\_e"


@pytest.mark.parametrize(("ending", "kind"), [(".jfif", "JPEG"), (".JPG", "JPEG"), (".avif", "AVIF")])
def test_rarer_endings_of_images_are_read_or_named(ending, kind, tmp_path):
    file = tmp_path / f"a{ending}"
    try:
        Image.new("RGB", (8, 8), (200, 10, 10)).save(file, kind)
    except (KeyError, OSError):  # a Pillow without AVIF
        file.write_bytes(b"\0\0\0\x1cftypavif")
        with pytest.raises(DataError, match=r"a\.avif: unreadable image \(not an image that Pillow knows"):
            read_image(file)
        return
    assert is_image_name(file.name)
    assert read_image(file).size == (8, 8)
