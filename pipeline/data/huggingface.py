"""Data sets as HuggingFace `datasets` opens them: parquet, Arrow, `save_to_disk`, image folders, and names on the Hub."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DataConfig, nearest
from pipeline.data.arrow import ArrowColumn, ArrowRows, read_table
from pipeline.data.dataset import DataSource, Split, check_labels, listed_names
from pipeline.errors import ConfigError, DataError

SPLITS = {"train": ("train", "training"), "val": ("validation", "val", "valid", "dev"), "test": ("test", "testing")}
UNUSED = "none"  # as the name of a split: there is one, and it shall not be used


@dataclass(frozen=True)
class Rows:
    """One split as found: its Arrow files and what its columns mean (`datasets.Features`)."""

    files: tuple[str, ...]
    features: Mapping[str, Any]


def huggingface(config: DataConfig) -> DataSource:
    """The data set at data.path or, named data.hub, on the Hub; what is no Arrow file becomes one in the library's cache.

    Columns of images and labels are found by their types or named by data.image_column and data.label_column. No image is
    decoded. Raises ConfigError for what a setting can mend, DataError for what is wrong with the data.
    """
    datasets = _library()
    origin = str(config.hub or config.path)
    available = _open(config, datasets, origin)
    requested = {"train": config.train_split, "val": config.val_split, "test": config.test_split}
    names = choose_splits(tuple(available), requested, origin)
    train = available[names["train"]]
    image = choose_column(train.features, "image", config.image_column, _image_kinds(datasets), origin)
    label = choose_column(train.features, "label", config.label_column, _label_kinds(datasets), origin)
    for name in names.values():
        if missing := [column for column in (image, label) if column not in available[name].features]:
            raise DataError(
                f"{origin}, {name}: no column {missing[0]}, which train has; it has {_shown(available[name].features)}"
            )
    columns = {s: read_table(available[name].files)[label] for s, name in names.items()}
    for s, name in names.items():
        _refuse_missing(columns[s], f"{origin}, {name}", label, s)
    classes = _class_names(train.features[label], columns["train"], config, origin)
    root = config.path.expanduser().absolute() if config.path else Path()
    splits: dict[str, Split] = {}
    for s, name in names.items():
        split_classes = getattr(available[name].features[label], "names", None)
        if split_classes is not None and tuple(split_classes) != classes and config.class_names is None:
            raise DataError(f"{origin}, {name}: its {label} names other classes than that of train; make the two alike")
        labels = _numbers(columns[s], classes, f"{origin}, {name}, column {label}")
        reader = ArrowColumn(available[name].files, image, f"{origin}, {name}", root if root.is_dir() else root.parent)
        rows = np.arange(len(labels))
        splits[s] = Split(labels=labels, ids=rows, stored=ArrowRows(reader, rows))
    return DataSource(class_names=classes, train=splits["train"], val=splits.get("val"), test=splits.get("test"))


def choose_splits(available: tuple[str, ...], requested: Mapping[str, str | None], origin: str) -> dict[str, str]:
    """train, val, test → the split that it is; ConfigError where one that was asked for, or any for training, is not there.

    Not asked for, a split is known by its usual names; a single split of whatever name is the training split.
    """
    selected: dict[str, str] = {}
    for s, name in requested.items():
        if name is not None and name != UNUSED and name not in available:
            raise ConfigError(f"data.{s}_split={name}: {origin} has {', '.join(available)}{nearest(name, available)}")
        usual = next((candidate for candidate in SPLITS[s] if candidate in available), None)
        if (selection := usual if name is None else name) and selection != UNUSED:
            selected[s] = selection
    if "train" not in selected and requested["train"] is None and len(available) == 1:
        selected = {"train": available[0]}
    if "train" not in selected:
        raise ConfigError(
            f"{origin} has {', '.join(available)}; say with --set data.train_split=NAME which one to train on"
        )
    if len(set(selected.values())) < len(selected):
        settings = ", ".join(f"data.{s}_split={name}" for s, name in selected.items())
        raise ConfigError(f"{settings}: the same images for two purposes; {origin} has {', '.join(available)}")
    return selected


def choose_column(
    features: Mapping[str, Any],
    content: str,
    named: str | None,
    kinds: tuple[Callable[[Any], bool], ...],
    origin: str,
) -> str:
    """The column named, else the only one of the first kind of which there are any; ConfigError otherwise.

    Of several columns of the last kind, plain numbers and text, one called as what is sought is meant.
    """
    key = f"data.{content}_column"
    if named is not None:
        if named not in features:
            raise ConfigError(f"{key}={named}: {origin} has {_shown(features)}{nearest(named, features)}")
        if not any(fits(features[named]) for fits in kinds):
            raise ConfigError(f"{key}={named}: holds no {content}s; {origin} has {_shown(features)}")
        return named
    candidates: list[str] = next(filter(None, ([n for n, f in features.items() if fits(f)] for fits in kinds)), [])
    if content in candidates and kinds[-1](features[content]):
        return content
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ConfigError(
            f"{origin}: {len(candidates)} columns may hold the {content}s: {', '.join(candidates)}; "
            f"choose one with --set {key}={candidates[0]}"
        )
    raise ConfigError(f"{origin}: no column of {content}s; it has {_shown(features)}")


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "data.source=huggingface needs one more package: pip install 'iwb-pipeline[huggingface]'"
        ) from None
    return datasets


def _open(config: DataConfig, datasets: Any, origin: str) -> dict[str, Rows]:
    """Split → its rows, of whatever lies there."""
    path = config.path.expanduser() if config.path else None
    if path is not None and not path.exists():
        raise DataError(f"{path}: no such file or folder; set data.path, or data.hub to a name on the Hub")
    try:
        with _bars_for_people(datasets):
            if path is None:
                loaded = datasets.load_dataset(config.hub, name=config.hub_config, keep_in_memory=False)
            elif path.is_file() and path.suffix == ".arrow":
                return _arrow_files([path], datasets)
            elif path.is_file():
                kind = {".parquet": "parquet", ".pq": "parquet"}.get(path.suffix.lower())
                if kind is None:
                    raise DataError(f"{path}: neither .parquet nor .arrow; give such a file or a folder of them")
                loaded = datasets.load_dataset(kind, data_files={"train": str(path)}, keep_in_memory=False)
            elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(path), keep_in_memory=False)
            elif arrows := sorted(path.glob("*.arrow")):
                return _arrow_files(arrows, datasets)
            else:
                loaded = datasets.load_dataset(str(path), keep_in_memory=False)
    except DataError:
        raise
    except Exception as error:  # the library and what it calls raise a dozen kinds
        damaged = _damaged_parquet(path) if path else None
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        if path is None:
            raise DataError(f"data.hub={origin}: cannot be had ({cause}); without a network, set data.path") from error
        raise DataError(f"{damaged or path}: cannot be read as a data set ({cause})") from error
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    return {
        name: Rows(tuple(f["filename"] for f in split.cache_files), split.features) for name, split in splits.items()
    }


def _arrow_files(files: list[Path], datasets: Any) -> dict[str, Rows]:
    """NAME.arrow and NAME-00000-of-00002.arrow are of split NAME; a lone file is what there is, whatever its name."""
    shards: dict[str, list[str]] = {}
    for file in files:
        name = re.sub(r"-\d+-of-\d+$", "", file.stem) if len(files) > 1 else "train"
        shards.setdefault(name, []).append(str(file))
    schemas = {name: read_table(tuple(paths)).schema for name, paths in shards.items()}
    return {
        name: Rows(tuple(paths), datasets.Features.from_arrow_schema(schemas[name])) for name, paths in shards.items()
    }


def _damaged_parquet(path: Path) -> Path | None:
    """The first file that cannot be read to its end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
        try:
            with pq.ParquetFile(file) as opened:
                for _ in opened.iter_batches():
                    pass
        except (pa.ArrowException, OSError):
            return file
    return None


@contextmanager
def _bars_for_people(datasets: Any) -> Iterator[None]:
    """The library's progress bars only at a terminal."""
    disabled = datasets.utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def _image_kinds(datasets: Any) -> tuple[Callable[[Any], bool], ...]:
    def encoded(feature: Any) -> bool:
        return isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()

    def binary(feature: Any) -> bool:
        return getattr(feature, "dtype", None) in ("binary", "large_binary")

    return (lambda feature: isinstance(feature, datasets.Image)), encoded, binary


def _label_kinds(datasets: Any) -> tuple[Callable[[Any], bool], ...]:
    def plain(feature: Any) -> bool:
        dtype = getattr(feature, "dtype", None) if isinstance(feature, datasets.Value) else None
        return dtype is not None and re.fullmatch(r"u?int\d+|(large_)?string", dtype) is not None

    return (lambda feature: isinstance(feature, datasets.ClassLabel)), plain


def _shown(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({getattr(f, 'dtype', None) or type(f).__name__})" for name, f in features.items())


def _refuse_missing(column: Any, origin: str, label: str, split: str) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(column):
        raise DataError(f"{origin}: no rows in it")
    none = pc.equal(column, "" if _is_text(column) else pa.scalar(-1, pa.int64()))
    rows = np.flatnonzero(pc.fill_null(none, True).to_numpy())
    if len(rows):
        rest = (
            "take such rows away" if split == "train" else f"leave the split out with --set data.{split}_split={UNUSED}"
        )
        raise DataError(
            f"{origin}: {len(rows)} of {len(column)} rows have no {label}, the first is row {rows[0]}; {rest}"
        )


def _is_text(column: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _class_names(feature: Any, column: Any, config: DataConfig, origin: str) -> tuple[str, ...]:
    """As data.class_names lists them, else those of the feature, the sorted texts, or the numbers up to the highest."""
    import pyarrow.compute as pc

    if config.class_names is not None and not _is_text(column):
        return listed_names(config.class_names)
    if names := getattr(feature, "names", None):
        return tuple(names)
    if _is_text(column):
        return tuple(sorted(pc.unique(column).to_pylist()))
    return tuple(str(c) for c in range(int(pc.max(column).as_py()) + 1))


def _numbers(column: Any, classes: tuple[str, ...], origin: str) -> np.ndarray:
    """(n,) int64 class of each row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _is_text(column):
        return check_labels(column.to_numpy(), len(classes), origin)
    labels = pc.fill_null(pc.index_in(column, value_set=pa.array(classes, column.type)), -1).to_numpy()
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        raise DataError(
            f"{origin}: row {unknown[0]} is {column[int(unknown[0])].as_py()!r}, a class that train does not have"
        )
    return labels.astype(np.int64)
