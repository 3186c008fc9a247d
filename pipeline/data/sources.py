"""One function per source: what it holds, before any subset is drawn."""

import os
import unicodedata
import zipfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.dataset import DataSource, Split, check_labels, listed_names
from pipeline.data.files import FileNames
from pipeline.data.images import EXTENSIONS
from pipeline.errors import DataError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def digits(config: DataConfig) -> DataSource:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey: 40 test and 20 validation images a class, the rest a pool."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = as_rgb(np.round(bunch.images * (255 / 16)).astype(np.uint8), "digits")
    labels = bunch.target.astype(np.int64)
    random = np.random.RandomState(0)
    parts: dict[str, list[np.ndarray]] = {"test": [], "val": [], "train": []}
    for c in range(10):
        order = np.flatnonzero(labels == c)
        random.shuffle(order)
        for name, rows in zip(parts, np.split(order, [40, 60]), strict=True):
            parts[name].append(rows)
    train, val, test = (_rows(images, labels, np.concatenate(parts[name])) for name in ("train", "val", "test"))
    return DataSource(class_names=tuple("0123456789"), train=train, val=val, test=test)


def cifar(config: DataConfig) -> DataSource:
    """CIFAR-10 or CIFAR-100 from torchvision's files under data.path (default ./data), downloaded when asked."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.source]
    root = config.path or Path("data")
    try:
        train = kind(root, train=True, download=config.download)
        test = kind(root, train=False, download=False)
    except RuntimeError as error:
        raise DataError(
            f"{config.source}: not found or damaged under {root}; fetch it with --set data.download=true, or name its folder "
            "with --set data.path=DIR"
        ) from error
    except OSError as error:
        raise DataError(
            f"{config.source}: the download into {root} failed ({error}); fetch the files by hand and set data.path"
        ) from error
    every = [_rows(s.data, np.array(s.targets, dtype=np.int64), np.arange(len(s.data))) for s in (train, test)]
    return DataSource(class_names=tuple(train.classes), train=every[0], test=every[1])


def npz(config: DataConfig) -> DataSource:
    """Arrays in one .npz: train_images, train_labels, optional val_*, test_*, class_names; or images, labels.

    Images uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W). `train_index` and the like become the ids where present.
    """
    path = _required(config.path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; set data.path to an .npz with train_images and train_labels")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as .npz ({error}); it must hold plain arrays, class_names as text, not Python objects"
        ) from error
    prefix = "train_" if "train_images" in arrays else ""
    if f"{prefix}images" not in arrays or f"{prefix}labels" not in arrays:
        raise DataError(
            f"{path}: needs train_images and train_labels (or images and labels); found {', '.join(arrays) or 'nothing'}"
        )
    labels = arrays[f"{prefix}labels"]
    if "class_names" in arrays:
        names = tuple(str(n) for n in arrays["class_names"])
    else:
        top = int(labels.max()) if labels.size and np.issubdtype(labels.dtype, np.integer) else 0
        names = tuple(str(c) for c in range(top + 1))

    def split(prefix: str) -> Split | None:
        if f"{prefix}images" not in arrays:
            return None
        origin = f"{path} ({prefix}labels)"
        images = as_rgb(arrays[f"{prefix}images"], f"{path} ({prefix}images)")
        if f"{prefix}labels" not in arrays:
            raise DataError(f"{path}: {prefix}images without {prefix}labels")
        labels = check_labels(arrays[f"{prefix}labels"], len(names), origin)
        if len(labels) != len(images):
            raise DataError(f"{origin}: {len(labels)} labels for {len(images)} images")
        ids = arrays.get(f"{prefix}index", np.arange(len(labels))).astype(np.int64)
        if ids.shape != labels.shape:
            raise DataError(f"{path} ({prefix}index): {ids.shape} for {len(labels)} images")
        return Split(labels=labels, ids=ids, images=images)

    train = split(prefix)
    assert train is not None
    shapes = {
        s.images.shape[1:] for s in (train, split("val_"), split("test_")) if s is not None and s.images is not None
    }
    if len(shapes) > 1:
        raise DataError(f"{path}: splits differ in image size: {sorted(shapes)}; save them at one size")
    return DataSource(class_names=names, train=train, val=split("val_"), test=split("test_"))


def folder(config: DataConfig) -> DataSource:
    """PATH/train/CLASS/*.jpg and the like, with optional val and test; or PATH/CLASS/*.jpg, to be split."""
    root = _required(config.path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.path to a folder with train/CLASS/*.jpg or CLASS/*.jpg")
    places = {s: next((root / n for n in names if (root / n).is_dir()), None) for s, names in SPLIT_FOLDERS.items()}
    if places["train"] is None:
        if places["val"] or places["test"]:
            raise DataError(f"{root}: has {places['val'] or places['test']} but no train folder")
        places = {"train": root, "val": None, "test": None}
    train_root = places["train"]
    assert train_root is not None
    names = tuple(_folders(train_root))
    if not names:
        raise DataError(f"{train_root}: no class folders in it; expected {train_root}/CLASS/*.jpg")
    notes: list[str] = []
    splits = {s: _class_folders(root, place, names, notes) if place else None for s, place in places.items()}
    assert splits["train"] is not None
    return DataSource(
        class_names=names, train=splits["train"], val=splits["val"], test=splits["test"], notes=tuple(notes)
    )


def image_list(config: DataConfig) -> DataSource:
    """Lines `relative/path label` (ImageNet-LT, iNaturalist2018, Places-LT), paths relative to data.path or the list's folder."""
    lists = {"train": config.train_list, "val": config.val_list, "test": config.test_list}
    splits = {
        s: _read_list(path, (config.path or path.parent).expanduser()) for s, path in lists.items() if path is not None
    }
    classes = int(splits["train"].labels.max()) + 1
    names = tuple(str(c) for c in range(classes))
    if config.class_names is not None:
        names = listed_names(config.class_names)
    for s, split in splits.items():
        check_labels(split.labels, len(names), str(lists[s]))
    return DataSource(class_names=names, train=splits["train"], val=splits.get("val"), test=splits.get("test"))


def as_rgb(images: np.ndarray, origin: str) -> np.ndarray:
    """Images (N, H, W, 3) uint8 from (N, H, W), (N, H, W, 1) or (N, H, W, 3); DataError for anything else."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(
            f"{origin}: expected uint8 of shape (N, H, W, 3) or (N, H, W), got {images.dtype} {images.shape}"
        )
    if 0 in images.shape:
        raise DataError(f"{origin}: no images in it ({images.shape})")
    images = images[..., None] if images.ndim == 3 else images
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else np.ascontiguousarray(images)


def _rows(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Split:
    return Split(labels=labels[rows], ids=rows.astype(np.int64), images=images[rows])


def _required(path: Path | None) -> Path:
    assert path is not None  # the configuration has checked it
    return path.expanduser()


def _folders(place: Path) -> list[str]:
    with os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(root: Path, place: Path, names: Sequence[str], notes: list[str]) -> Split:
    folders = _folders(place)
    alike = {
        unicodedata.normalize("NFC", name): name for name in folders
    }  # é is one letter or two, as who packed them has it
    folder_of = {
        name: name if name in folders else alike.get(unicodedata.normalize("NFC", name), name) for name in names
    }
    folder_names = set(folder_of.values())
    strangers = [name for name in folders if name not in folder_names]
    if strangers:
        raise DataError(
            f"{place}: class folder {strangers[0]} is not among the training classes; rename it or add it to train"
        )
    images, labels = FileNames(), array("q")
    ignored: list[str] = []
    again: list[str] = []
    for label, name in enumerate(names):
        read: set[str] = set()
        for folder, below, files in os.walk(place / folder_of[name], followlinks=True):
            below.sort()
            relative, real = os.path.relpath(folder, root), os.path.realpath(folder)
            if real in read:
                below.clear()
                again.append(relative)
                continue
            read.add(real)
            for file in sorted(files):
                if file.startswith("."):
                    continue
                if os.path.splitext(file)[1].lower() in EXTENSIONS:
                    images.append(os.path.join(relative, file))
                    labels.append(label)
                else:
                    ignored.append(os.path.join(relative, file))
    if ignored:
        notes.append(
            f"{len(ignored)} file(s) under {place} are no images by their ending and were left out: {', '.join(ignored[:3])}"
        )
    if again:
        notes.append(
            f"{len(again)} folder(s) under {place} lead to one of their class that was read already and were left out: "
            f"{', '.join(again[:3])}"
        )
    if not labels:
        raise DataError(f"{place}: no images in its class folders (known endings: {' '.join(sorted(EXTENSIONS))})")
    return Split(labels=np.array(labels, dtype=np.int64), ids=np.arange(len(labels)), stored=images.below(root))


def _read_list(path: Path, root: Path) -> Split:
    names, labels = FileNames(), array("q")
    try:
        with open(path.expanduser(), encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                name, _, label = line.strip().rpartition(" ")
                if not name or not label.lstrip("-").isdigit():
                    raise DataError(
                        f"{path}, line {number}: expected `relative/path label`, got {line.rstrip()[:80]!r}"
                    )
                names.append(name.strip())
                labels.append(int(label))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); set data.train_list and the like"
        ) from error
    if not labels:
        raise DataError(f"{path}: no lines in it; expected `relative/path label`")
    files = names.below(root).sized()
    missing = files.missing
    if len(missing):
        raise DataError(
            f"{path}: {len(missing)} of {len(files)} files are missing under {root}, the first is "
            f"{files.relative(missing[0])}; set data.path to the folder that the paths are relative to"
        )
    return Split(labels=np.array(labels, dtype=np.int64), ids=np.arange(len(labels)), stored=files)
