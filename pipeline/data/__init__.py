"""Images, labels, class names and counts from every supported source."""

import bisect
from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.config import DataConfig
from pipeline.data import huggingface, sources
from pipeline.data.dataset import Dataset, Split, check_classes
from pipeline.data.names import class_names_from
from pipeline.data.subset import SUBSET_SPLIT, class_sizes, held_out_sizes, hold_out, long_tail
from pipeline.errors import ConfigError
from pipeline.metrics import unmeasured

SOURCES = {
    "digits": sources.digits,
    "cifar10": sources.cifar,
    "cifar100": sources.cifar,
    "npz": sources.npz,
    "folder": sources.folder,
    "list": sources.image_list,
    "huggingface": huggingface.huggingface,
}

__all__ = ["Dataset", "Split", "load_dataset"]


def load_dataset(config: DataConfig, *, resize: bool = True) -> Dataset:
    """Return the images of a configuration: long-tailed as configured, with validation and test splits.

    Validation is the source's own, else what the subset left over, else held out of training as `held_out_sizes` has it;
    a test split that is missing is held out the same way, and a note says so.

    Arguments:
        resize: whether images in memory get the size data.image_size; a frozen encoder's are resized batch by batch.
    Raises:
        DataError: names the file, sample or class that is wrong.
        ConfigError: an impossible subset.
    """
    if config.class_names is not None and config.source not in ("list", "huggingface"):
        raise ConfigError(
            f"data.class_names: source {config.source} has class names of its own; leave the file out, or rename there"
        )
    source = SOURCES[config.source](config)
    names = class_names_from(source.class_names, str(config.path or config.hub or config.train_list or config.source))
    classes, notes = len(names), list(source.notes)
    train, val, test = source.train, source.val, source.test
    sizes = np.bincount(train.labels, minlength=classes)
    if test is None and config.test_per_class != 0:
        per_class = config.test_per_class if config.subset == "none" else _of_subset(config.test_per_class)
        train, test = _held_out(train, held_out_sizes(sizes, per_class), config.subset_seed, "test", notes)
    if config.subset != "none":
        pool = np.bincount(train.labels, minlength=classes)
        train, left = _subset(config, train, classes)
        if config.max_per_class is None and pool.max() > pool.min():
            notes.append(
                f"data.max_per_class is not set: the smallest class has {pool.min()} images, so {len(train)} of "
                f"{pool.sum()} are kept; set it to keep more of the larger ones"
            )
        val = val or left
    elif val is None and config.val_per_class != 0:
        if config.val_per_class is not None:
            sizes = np.bincount(train.labels, minlength=classes)  # a fifth of what is left
        train, val = _held_out(
            train, held_out_sizes(sizes, config.val_per_class), config.subset_seed + 1, "validation", notes
        )
    notes += filter(None, (one_colour_note(s, name) for name, s in (("training", train), ("test", test))))
    dataset = check_classes(Dataset(config.source, names, train, val, test, tuple(notes)))
    for name, split in (("validation", val), ("test", test)):
        if split:
            remarks = unmeasured(np.bincount(split.labels, minlength=classes), names, name)
            dataset = replace(dataset, notes=(*dataset.notes, *remarks))
    if resize and config.image_size is not None:
        dataset = _resized(dataset, config.image_size)
    return dataset


def one_colour_note(split: Split | None, name: str) -> str:
    """Return a note on images in memory that are one colour from edge to edge; an empty text where none is."""
    if split is None or split.images is None or not len(split):
        return ""
    pixels = split.images.reshape(len(split), -1, 3)
    constant = np.flatnonzero((pixels == pixels[:, :1]).all((1, 2)))
    first = ", ".join(split.name_of(row) for row in constant[:3])
    return f"{len(constant)} {name} image(s) are one colour: {first}" if len(constant) else ""


def _held_out(train: Split, sizes: np.ndarray, seed: int, split: str, notes: list[str]) -> tuple[Split, Split | None]:
    """Return what stays and what is held out, None where that is nothing, and note it."""
    keep, held_out = hold_out(train.labels, sizes, seed=seed)
    notes.append(f"no {split} split: {len(held_out)} training images were held out as one")
    return train.take(keep), train.take(held_out) if len(held_out) else None


def _of_subset(per_class: int | None) -> int:
    """Return the images of each class that a subset has in a split of its own."""
    return SUBSET_SPLIT if per_class is None else per_class


def _subset(config: DataConfig, pool: Split, classes: int) -> tuple[Split, Split | None]:
    available = np.bincount(pool.labels, minlength=classes)
    val_per_class = _of_subset(config.val_per_class)
    spare = val_per_class if config.subset == "step" else 0  # every class of a step subset keeps its validation images
    largest = config.max_per_class or int(available.min()) - spare
    if largest < 1:
        raise ConfigError(
            f"data.subset={config.subset}: the smallest class has {available.min()} images, none left to draw"
        )
    sizes_of = partial(class_sizes, classes=classes, imbalance=config.imbalance_factor, shape=config.subset)
    sizes = sizes_of(largest=largest)
    short = np.flatnonzero(sizes > available)
    if len(short):
        most = bisect.bisect_left(
            range(1, largest + 1), True, key=lambda n: bool((sizes_of(largest=n) > available).any())
        )
        raise ConfigError(
            f"data.max_per_class={largest}: class {short[0]} would need {sizes[short[0]]} images and has {available[short[0]]}; "
            + (f"set it to {most} or less" if most else "no size fits: the classes are not in the order of their sizes")
        )
    selected, left = long_tail(pool.labels, sizes, val_per_class=val_per_class, seed=config.subset_seed)
    return pool.take(selected), pool.take(left) if len(left) else None


def _resized(dataset: Dataset, size: int) -> Dataset:
    """The data set with in-memory images resized to size × size (antialiased bilinear); files are resized when read."""
    import torch
    from torchvision.transforms.v2 import functional

    def resize(split: Split | None) -> Split | None:
        if split is None or split.images is None or split.images.shape[1:3] == (size, size):
            return split
        chunks = np.array_split(split.images, max(1, len(split) // 4096))
        done = [
            functional.resize(torch.from_numpy(c).permute(0, 3, 1, 2), [size, size], antialias=True) for c in chunks
        ]
        return replace(split, images=torch.cat(done).permute(0, 2, 3, 1).contiguous().numpy())

    train = resize(dataset.train)
    assert train is not None
    return replace(dataset, train=train, val=resize(dataset.val), test=resize(dataset.test))
