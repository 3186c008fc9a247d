import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import load_dataset
from pipeline.data.images import read_image
from pipeline.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)


def write_images(root, sizes, size=(8, 8), split=None):
    """root/[split/]CLASS/N.png with a colour per class."""
    for label, (name, count) in enumerate(sizes.items()):
        place = root / split / name if split else root / name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = RANDOM.integers(0, 60, (*size, 3)) + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return DataConfig(source="npz", path=path)


def pictures(n, *shape):
    return RANDOM.integers(0, 256, (n, *(shape or (8, 8, 3))), dtype=np.uint8)


def test_npz_with_its_own_splits(tmp_path):
    labels, three = np.array([0, 1, 1, 2] * 5), np.arange(3)
    own = {"train_images": pictures(20), "train_labels": labels, "train_index": np.arange(100, 120)}
    held = {"val_images": pictures(3), "val_labels": three, "test_images": pictures(3), "test_labels": three}
    config = save_npz(tmp_path / "a.npz", **own, **held, class_names=np.array(["a", "b", "c"]))
    dataset = load_dataset(config)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.counts.tolist() == [5, 10, 5]
    assert dataset.train.ids.tolist() == list(range(100, 120))
    assert {n: len(s) for n, s in dataset.splits.items()} == {"train": 20, "val": 3, "test": 3}


def test_one_grey_set_is_split_and_said_so(tmp_path):
    images = pictures(100, 6, 5)
    dataset = load_dataset(save_npz(tmp_path / "a.npz", images=images, labels=np.repeat([0, 1], [80, 20])))
    assert {n: np.bincount(s.labels).tolist() for n, s in dataset.splits.items()} == {
        "test": [12, 3], "val": [12, 3], "train": [56, 14],
    }  # fmt: skip
    assert (dataset.train.images == images[dataset.train.ids][..., None]).all()
    assert len(dataset.notes) == 2
    assert "held out" in dataset.notes[0]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": pictures(3)}, ["needs train_images", "found pictures"]),
        ({"images": pictures(3), "labels": np.array([0, 1])}, ["2 labels for 3 images"]),
        ({"images": pictures(3).astype(float), "labels": np.array([0, 1, 1])}, ["uint8", "float64"]),
        ({"images": pictures(3), "labels": np.array([0.0, 1, 1])}, ["whole numbers"]),
        ({"images": pictures(3), "labels": np.array([0, -1, 1])}, ["label -1 of sample 1"]),
        (
            {"images": pictures(3), "labels": np.array([0, 5, 1]), "class_names": np.array(["a", "b"])},
            ["label 5 of sample 1", "0…1"],
        ),
        ({"images": pictures(3), "labels": np.array([0, 0, 2])}, ["without a training image: 1"]),
        ({"images": pictures(3), "labels": np.array([0, 0, 0])}, ["only one class"]),
        (
            {"images": pictures(3), "labels": np.array([0, 1, 1]), "class_names": np.array(["a", "b"], dtype=object)},
            ["plain arrays"],
        ),
        (
            {"train_images": pictures(3), "train_labels": np.array([0, 1, 1]), "test_images": pictures(3)},
            ["without test_labels"],
        ),
    ],
)
def test_a_wrong_npz_is_named(tmp_path, arrays, words):
    with pytest.raises(DataError) as error:
        load_dataset(save_npz(tmp_path / "a.npz", **arrays))
    assert all(
        word in str(error.value)
        for word in [*words, *(["a.npz"] if "class" not in words[0] and "image: 1" not in words[0] else [])]
    )


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"a\.npz: cannot be read"):
        load_dataset(DataConfig(source="npz", path=tmp_path / "a.npz"))
    with pytest.raises(DataError, match="no such file"):
        load_dataset(DataConfig(source="npz", path=tmp_path / "b.npz"))


def test_folder_with_splits(tmp_path):
    write_images(tmp_path, {"cat": 6, "dog": 3}, split="train")
    write_images(tmp_path, {"cat": 2, "dog": 2}, split="valid")
    write_images(tmp_path, {"cat": 1, "dog": 1}, split="test")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("x")
    (tmp_path / "train" / "dog" / "deeper").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "train" / "dog" / "deeper" / "x.JPG")
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert {n: np.bincount(s.labels).tolist() for n, s in dataset.splits.items()} == {
        "train": [6, 4],
        "val": [2, 2],
        "test": [1, 1],
    }
    assert "notes.txt" in dataset.notes[0]  # left out, but said so
    assert dataset.fingerprint_covers == "file contents"


def test_a_link_that_leads_back_adds_no_image(tmp_path):
    write_images(tmp_path, {"cat": 6, "dog": 4}, split="train")
    (tmp_path / "train/dog/loop").symlink_to("../dog")
    (tmp_path / "more").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "more/x.png")
    for name in ("first", "second"):
        (tmp_path / f"train/cat/{name}").symlink_to(tmp_path / "more")
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path, val_per_class=0, test_per_class=0))
    assert dataset.counts.tolist() == [7, 4]
    (note,) = (note for note in dataset.notes if "read already" in note)
    assert note.startswith("2 folder(s)")
    assert note.endswith("train/cat/second, train/dog/loop")


def test_a_name_is_the_same_in_whatever_unicode_form(tmp_path):
    composed, apart = "\u00c4pfel", "A\u0308pfel"
    write_images(tmp_path, {composed: 6, "dog": 4}, split="train")
    write_images(tmp_path, {apart: 2, "dog": 1}, split="test")
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path, val_per_class=0))
    assert dataset.class_names == ("dog", composed)
    assert np.bincount(dataset.test.labels).tolist() == [1, 2]


def test_folder_without_splits_is_split(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 6, "one": 1})
    dataset = load_dataset(DataConfig(source="folder", path=tmp_path))
    assert {n: np.bincount(s.labels, minlength=3).tolist() for n, s in dataset.splits.items()} == {
        "test": [2, 2, 0], "val": [2, 2, 0], "train": [6, 2, 1],
    }  # fmt: skip
    assert any("single training image: one" in note for note in dataset.notes)
    for split in ("validation", "test"):
        note = f"1 class(es) without a {split} image, left out of balanced {split} accuracy: one"
        assert note in dataset.notes


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(DataConfig(source="folder", path=tmp_path / "none"))
    with pytest.raises(DataError, match="no class folders"):
        load_dataset(DataConfig(source="folder", path=tmp_path))
    write_images(tmp_path, {"cat": 2, "dog": 2}, split="train")
    write_images(tmp_path, {"cow": 2}, split="val")
    with pytest.raises(DataError, match="class folder cow is not among the training classes"):
        load_dataset(DataConfig(source="folder", path=tmp_path))
    (tmp_path / "val" / "cow").rename(tmp_path / "val" / "cat")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="without a training image: empty"):
        load_dataset(DataConfig(source="folder", path=tmp_path))


def test_lists(tmp_path):
    write_images(tmp_path, {"a b": 10, "c": 5})
    lines = [f"a b/{i}.png 0" for i in range(10)] + [f"c/{i}.png 1" for i in range(5)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n\n")
    config = DataConfig(source="list", train_list=tmp_path / "train.txt", test_per_class=0)
    dataset = load_dataset(config)
    assert dataset.counts.tolist() == [8, 3]
    assert np.bincount(dataset.val.labels).tolist() == [2, 2]
    assert dataset.test is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png", ["line 1", "relative/path label"]),
        ("a.png 0\nb.png x", ["line 2"]),
        ("", ["no lines"]),
        ("a.png 0\nnowhere.png 1", ["1 of 2 files are missing", "nowhere.png", "data.path"]),
        ("a.png 0\na.png -1", ["label -1 of sample 1"]),
    ],
)
def test_a_wrong_list_is_named(tmp_path, text, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(DataError) as error:
        load_dataset(DataConfig(source="list", train_list=tmp_path / "train.txt"))
    assert all(word in str(error.value) for word in ["train.txt", *words]), str(error.value)


def test_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"data\.download=true"):
        load_dataset(DataConfig(source="cifar100", path=tmp_path))


def test_cifar10_reads_torchvisions_files(tmp_path, monkeypatch):
    import pickle

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # the real check wants the real 170 MB
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(
            pickle.dumps({"data": RANDOM.integers(0, 256, (60, 3072), dtype=np.uint8), "labels": list(range(10)) * 6})
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {c}" for c in range(10)]}))
    monkeypatch.setitem(CIFAR10.meta, "md5", None)
    dataset = load_dataset(
        DataConfig(source="cifar10", path=tmp_path, subset="exponential", imbalance_factor=5, val_per_class=2)
    )
    assert dataset.counts[0] == 30
    assert dataset.counts[-1] == 6
    assert len(dataset.test) == 60
    assert dataset.train.images.shape[1:] == (32, 32, 3)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("P", 0, None),
        ("1", 1, (255, 255, 255)),
        ("I;16", 257 * 200, (200, 200, 200)),
        ("I;16", 257, (1, 1, 1)),
        ("I;16", 128, (0, 0, 0)),  # dark, but 16-bit all the same
        ("I", 257 * 200, (200, 200, 200)),
        ("LA", (50, 9), (50, 50, 50)),
    ],
)
def test_whatever_mode_becomes_rgb(tmp_path, mode, value, expected):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
    Image.new(mode, (4, 4), value).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    if expected:
        assert image.getpixel((2, 2)) == expected


def test_exif_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 8)


def test_unreadable_images_are_named(tmp_path):
    Image.fromarray(pictures(1, 64, 64, 3)[0]).save(tmp_path / "a.png")
    torn = (tmp_path / "a.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(torn[: len(torn) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("torn.png", "text.jpg", "missing.png"):
        with pytest.raises(DataError, match=f"{name}: unreadable image"):
            read_image(tmp_path / name)


def test_the_fingerprint_sees_one_pixel_one_label_and_one_file(tmp_path):
    images, labels = pictures(20), np.array([0, 1] * 10)
    first = load_dataset(save_npz(tmp_path / "a.npz", images=images, labels=labels))
    assert load_dataset(save_npz(tmp_path / "b.npz", images=images, labels=labels)).fingerprint == first.fingerprint
    images[int(first.train.ids[0]), 0, 0, 0] ^= 1
    assert load_dataset(save_npz(tmp_path / "c.npz", images=images, labels=labels)).fingerprint != first.fingerprint
    write_images(tmp_path / "f", {"a": 6, "b": 6})
    config = DataConfig(source="folder", path=tmp_path / "f")
    before = load_dataset(config).fingerprint
    raw = bytearray((tmp_path / "f/a/0.png").read_bytes())
    raw[-20] ^= 1
    (tmp_path / "f/a/0.png").write_bytes(raw)
    assert load_dataset(config).fingerprint != before


def test_resizing_arrays(tmp_path):
    config = save_npz(tmp_path / "a.npz", images=pictures(40), labels=np.array([0, 1] * 20)).model_copy(
        update={"image_size": 16}
    )
    dataset = load_dataset(config)
    assert {s.images.shape[1:] for s in dataset.splits.values()} == {(16, 16, 3)}


def save_unbalanced(path):
    labels = np.repeat(np.arange(3), [60, 30, 12])
    np.savez(path, train_images=np.zeros((len(labels), 4, 4, 3), np.uint8), train_labels=labels)


def test_a_subset_that_asks_too_much_is_told_the_most_that_fits(tmp_path):
    save_unbalanced(tmp_path / "a.npz")
    asked = {"source": "npz", "path": tmp_path / "a.npz", "subset": "exponential", "imbalance_factor": 10}
    with pytest.raises(ConfigError, match=r"class 0 would need 4000 images and has 58; set it to 58 or less"):
        load_dataset(DataConfig(**asked, max_per_class=4000, test_per_class=2))
    assert load_dataset(DataConfig(**asked, max_per_class=58, test_per_class=2)).counts.tolist() == [58, 18, 5]


def test_a_subset_of_unbalanced_data_says_what_it_keeps_if_nobody_said_how_much(tmp_path):
    save_unbalanced(tmp_path / "a.npz")
    step = DataConfig(source="npz", path=tmp_path / "a.npz", subset="step", imbalance_factor=2, val_per_class=2)
    assert any("smallest class has 10 images, so 16 of 82 are kept" in note for note in load_dataset(step).notes)
