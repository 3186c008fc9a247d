"""One function per source: what it holds, before any subset is drawn."""

import os
import re
from array import array
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.dataset import DataSource, Split, check_labels, listed_names, numbered_names
from pipeline.data.files import FileNames
from pipeline.data.images import EXTENSIONS, is_image_name
from pipeline.data.names import class_names_from, holds_no_images, same_name, split_of
from pipeline.errors import DataError

LABEL = re.compile(r"-?[0-9]{1,9}")


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
    arrays = read_npz(path)
    prefix = "train_" if "train_images" in arrays else ""
    if f"{prefix}images" not in arrays or f"{prefix}labels" not in arrays:
        raise DataError(
            f"{path}: needs train_images and train_labels (or images and labels); found {', '.join(arrays) or 'nothing'}"
        )
    labels = arrays[f"{prefix}labels"]
    if "class_names" in arrays:
        names = class_names_from(arrays["class_names"].ravel().tolist(), f"{path} (class_names)")
    else:
        names = numbered_names(labels, f"{path} ({prefix}labels)")

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


def read_npz(path: Path, only: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz, or those with the given names; DataError where it holds anything but plain arrays."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if only is None or name in only}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types for damaged bytes
        raise DataError(
            f"{path}: cannot be read as .npz ({unreadable_reason(error)}); it must hold plain arrays, as numpy.savez writes "
            "them, class_names as text, not Python objects"
        ) from error


def unreadable_reason(error: Exception) -> str:
    """Return the reason why numpy could not read a file, without its advice on running what the file holds."""
    if isinstance(error, ValueError) and "pickle" in str(error):
        return "it holds Python objects"
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


def folder(config: DataConfig) -> DataSource:
    """PATH/train/CLASS/*.jpg and the like, with optional val and test; or PATH/CLASS/*.jpg, to be split."""
    root = _required(config.path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.path to a folder with train/CLASS/*.jpg or CLASS/*.jpg")
    places = split_folders(root)
    if "train" not in places:
        if places:
            raise DataError(
                f"{root}: has {next(iter(places.values()))} but no folder of training images, such as train"
            )
        places = {"train": root}
    train_root = places["train"]
    folders = _folders(train_root)
    if not folders:
        raise DataError(f"{train_root}: no class folders in it; expected {train_root}/CLASS/*.jpg")
    names = class_names_from(folders, str(train_root))
    notes: list[str] = []
    splits = {s: _class_folders(root, place, names, notes) for s, place in places.items()}
    loose = [name for place in {root, *places.values()} for name in _images_in(place)]
    if loose:
        notes.append(
            f"{len(loose)} image(s) lie beside the class folders and belong to no class: {', '.join(loose[:3])}"
        )
    return DataSource(
        class_names=names, train=splits["train"], val=splits.get("val"), test=splits.get("test"), notes=tuple(notes)
    )


def image_list(config: DataConfig) -> DataSource:
    """Lines `relative/path label` (ImageNet-LT, iNaturalist2018, Places-LT), paths relative to data.path or the list's folder."""
    lists = {"train": config.train_list, "val": config.val_list, "test": config.test_list}
    notes: list[str] = []
    splits = {
        s: _read_list(path, (config.path or path.parent).expanduser(), notes)
        for s, path in lists.items()
        if path is not None
    }
    train = splits["train"].labels
    if config.class_names is not None:
        names = listed_names(config.class_names)
    else:
        if train.min() == 1:
            line = _line_of(lists["train"], int(train.argmin()))
            raise DataError(
                f"{lists['train']}, line {line}: label 1 is the smallest; labels count from 0, take 1 from each"
            )
        names = numbered_names(train, str(lists["train"]))
    for s, split in splits.items():
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(names)))
        line_text = f", line {_line_of(lists[s], int(wrong[0]))}" if len(wrong) else ""
        check_labels(split.labels, len(names), f"{lists[s]}{line_text}")
    return DataSource(
        class_names=names, train=splits["train"], val=splits.get("val"), test=splits.get("test"), notes=tuple(notes)
    )


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
    """The names of folders that may hold images, sorted."""
    with os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if not holds_no_images(entry.name) and entry.is_dir())


def _images_in(place: Path) -> list[str]:
    """The paths of files right in a folder that are named as images, sorted."""
    with os.scandir(place) as entries:
        return sorted(entry.path for entry in entries if is_image_name(entry.name) and entry.is_file())


def split_folders(root: Path) -> dict[str, Path]:
    """Split → its folder, of those that there are; DataError where two have a name of the same split."""
    places: dict[str, Path] = {}
    for name in _folders(root):
        split = split_of(name)
        if split is not None and split in places:
            raise DataError(f"{places[split]} and {name} both look like the {split} split; rename or move one of them")
        if split is not None:
            places[split] = root / name
    return places


def _class_folders(root: Path, place: Path, names: Sequence[str], notes: list[str]) -> Split:
    folders = _folders(place)
    alike = {same_name(name): name for name in folders}
    folder_of = {name: name if name in folders else alike.get(same_name(name), name) for name in names}
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
            below[:] = sorted(name for name in below if not holds_no_images(name))
            relative, real = os.path.relpath(folder, root), os.path.realpath(folder)
            if real in read:
                below.clear()
                again.append(relative)
                continue
            read.add(real)
            for file in sorted(files):
                if file.startswith("."):
                    continue
                if is_image_name(file):
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of every line of a list that is not blank."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file; give a list with a line `relative/path label` per image")
    with open(path, encoding="utf-8-sig") as lines:
        yield from ((number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip())


def _line_of(path: Path | None, sample: int) -> int:
    """Return the number of the line of a sample of a list."""
    assert path is not None
    return next(number for nth, (number, _) in enumerate(_lines(path.expanduser())) if nth == sample)


def _read_list(path: Path, root: Path, notes: list[str]) -> Split:
    names, labels, hashes = FileNames(), array("q"), array("q")
    try:
        for number, line in _lines(path.expanduser()):
            name, label = [*line.rsplit(None, 1), ""][:2]
            if not LABEL.fullmatch(label):
                raise DataError(f"{path}, line {number}: expected `relative/path label`, got {line[:80]!r}")
            names.append(name)
            labels.append(int(label))
            hashes.append(hash(name))
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
    label_array = np.array(labels, dtype=np.int64)
    _, first, of_name = np.unique(np.array(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    again = np.flatnonzero(first[of_name] != np.arange(len(label_array)))
    if len(again):
        other = int((label_array[first[of_name]] != label_array)[again].sum())
        example = f"{files.relative(again[0])!r} in line {_line_of(path, int(again[0]))}"
        conflict = f", {other} of them with another label" if other else ""
        notes.append(f"{path}: {len(again)} line(s) name an image for the second time{conflict}, such as {example}")
    return Split(labels=label_array, ids=np.arange(len(labels)), stored=files)
