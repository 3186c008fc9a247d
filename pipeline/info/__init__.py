"""Kind, key facts and origin of an artefact: runs, checkpoints, stores, results, heads, exported models, configurations."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cache
from cache import CacheError, open_cache
from pipeline.errors import ConfigError, DataError
from pipeline.info.artefact import EXPECTED, Artefact, Facts, size_on_disk, try_json
from pipeline.info.results import document, heads, kept, progress, reproduction
from pipeline.info.stores import plain_files, samples_text, skipped_of, store
from pipeline.info.trained import EXTERNAL_BACKBONE, checkpoint, exported, training
from pipeline.method_names import PROBE
from pipeline.paths import holds_runs, near
from pipeline.results.documents import read_record
from pipeline.text import Shown

__all__ = ["Artefact", "Verified", "describe", "verify"]
STARTS = ("stage 1", PROBE)
REPORT = "report.html"  # is put into any folder that is reported on


@dataclass(frozen=True)
class Verified(Shown):
    """A store of which every byte was read and found right.

    Arguments:
        chunks: of features, in all splits and views.
        skipped: split → ids of samples without features.
    """

    store: Path | str
    digest: str
    chunks: int
    skipped: dict[str, list[int]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "store": str(self.store),
            "digest": self.digest,
            "chunks": self.chunks,
            "damaged": [],
            "skipped": self.skipped,
        }

    def __str__(self) -> str:
        first_line = (
            f"{self.store}: whole; {self.chunks} chunks of features read, every checksum holds; digest {self.digest}"
        )
        return "\n".join(
            [first_line, *(f"skipped {split}: {samples_text(ids)}" for split, ids in self.skipped.items())]
        )


def verify(path: Path | str) -> Verified:
    """Reads a whole sealed store against its checksums; DataError lists what is damaged and how to repair it."""
    try:
        if damaged := cache.verify(path):
            damage_lines = "\n".join(f"  {damage}" for damage in damaged)
            again = f"repair it: the same `pipeline dump-features … --out {path}` computes just these again"
            raise DataError(f"{path}: {len(damaged)} damaged file(s)\n{damage_lines}\n{again}")
        opened = open_cache(path)
        chunks = sum(len(opened.chunks(split, view)) for split in opened.splits for view in range(opened.views(split)))
        return Verified(path, opened.digest, chunks, skipped_of(opened))
    except CacheError as error:
        raise DataError(str(error)) from error


def describe(path: Path | str) -> Artefact:
    """Describe the artefact at a path, at the URL of a store, or the shipped configuration of that name.

    Raises DataError where it is missing, damaged or nothing of ours, naming what could have been given.
    """
    if isinstance(path, str):
        return store(path)
    if not path.exists():
        return _shipped(path)
    if path.is_dir():
        tell = next((tell for recognises, tell in _FOLDERS if recognises(path)), None)
    else:
        tell = _FILES.get(path.name) or _FILES.get(path.suffix)
    if tell is None and path.is_dir() and (advice := holds_runs(path)):
        raise DataError(advice)
    if tell is None:
        raise DataError(f"{path}: not an artefact of this program; expected {EXPECTED}")
    try:
        artefact = tell(path)
        return replace(artefact, facts={"size": size_on_disk(path), **artefact.facts})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not as this version writes it ({error!r}); expected {EXPECTED}") from error
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; change its permissions") from error


def _shipped(path: Path) -> Artefact:
    """Describe the shipped configuration of a name; DataError where there is none."""
    from pipeline.config import find_config

    try:
        return _config(find_config(str(path)))
    except ConfigError as error:
        raise DataError(f"{path}: no such file or folder{near(path)}; expected {EXPECTED}") from error


def _config(path: Path) -> Artefact:
    from pipeline.config import (  # a tenth of info's time
        is_rebalance_only,
        load_config,
        make_rebalance_config,
        read_tree,
    )

    try:
        tree = read_tree(path)
        if is_rebalance_only(tree):  # as the ablations are
            settings = make_rebalance_config(tree, str(path)).model_dump(mode="json", exclude_unset=True)
            variants = [variant["name"] for variant in settings.pop("variants", ())]
            return Artefact(path, "settings of stage 2", settings | ({"variants": variants} if variants else {}))
        config = load_config(path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    sections = config.model_dump(mode="json", exclude_defaults=True)
    facts = {"name": config.name, "run": str(config.run_dir), **{k: v for k, v in sections.items() if k != "name"}}
    return Artefact(path, "configuration", facts)


def _run(path: Path) -> Artefact:
    """A run: which of its parts are there, how large they are, and its result."""
    facts: Facts = {}
    seeds = sorted((p.name for p in path.glob("seed-*") if p.is_dir()), key=lambda name: (len(name), name))
    for part in [path, *(path / s for s in seeds)]:
        name = "" if part == path else f"{part.name}/"
        for file, kind in _PARTS.items():
            if (part / file).exists():
                part_kind = EXTERNAL_BACKBONE if file == "backbone/last.pt" and _is_external(part) else kind
                facts[f"{name}{file}"] = f"{part_kind}, {size_on_disk(part / file)}"
    facts |= {
        f"ablations/{p.name}": "ablation" for p in sorted(path.glob("ablations/*")) if (p / "ablation.json").is_file()
    }
    results_path = next((p for p in (path / "results.json", path / "rebalance" / "results.json") if p.is_file()), None)
    if results_path:
        result_facts = document(results_path).facts
        facts |= {key: result_facts[key] for key in (*STARTS, "selected", "its test accuracy") if key in result_facts}
    records = [read_record(p) for p in (path / "run.json", *sorted(path.glob("**/backbone/run.json")))]
    record: Facts = next(filter(None, records), {})
    return Artefact(path, f"run of {len(seeds)} backbones" if seeds else "run", facts, _as_rebalanced(record, path))


def _as_rebalanced(record: Facts, run: Path) -> Facts:
    """Return the record of a run with the settings of stage 2 that its results were made with, which may be others."""
    settings, config = read_record(run / "rebalance" / "run.json").get("config"), record.get("config")
    return record | {"config": config | {"rebalance": settings}} if settings and isinstance(config, dict) else record


def _reproduced(path: Path) -> Artefact:
    """The folder of `pipeline reproduce`."""
    artefact = reproduction(path / "reproduction.json")
    return replace(artefact, path=path, facts=artefact.facts | {"kept": sorted(p.name for p in path.glob("keep/*"))})


def _is_external(run: Path) -> bool:
    """Return true where a run's backbone was not trained in it."""
    return read_record(run / "backbone" / "run.json").get("command") == "dump-features"


def _is_export(path: Path) -> bool:
    return "architecture" in try_json(path / "config.json")


def _is_run(path: Path) -> bool:
    return any((path / part).exists() for part in _PARTS if part != REPORT) or any(path.glob("seed-*/backbone"))


def _inside(name: str, tell: Callable[[Path], Artefact]) -> tuple[Callable[[Path], bool], Callable[[Path], Artefact]]:
    """A folder that is what a file in it is."""
    return lambda p: (p / name).is_file(), lambda p: replace(tell(p / name), path=p)


_PARTS = {
    "backbone/last.pt": "stage-1 checkpoint",
    "features.zarr": "feature store",
    "rebalance/results.json": "rebalancing results",
    "rebalance/heads.safetensors": "rebalanced heads",
    REPORT: "report",
}
_FOLDERS: list[tuple[Callable[[Path], bool], Callable[[Path], Artefact]]] = [
    (lambda p: (p / "zarr.json").is_file(), store),
    (lambda p: (p / "store.json").is_file(), plain_files),
    (_is_export, exported),
    (lambda p: (p / "reproduction.json").is_file(), _reproduced),
    (lambda p: (p / "clean.safetensors").is_file(), kept),
    _inside("tries.json", document),
    (_is_run, _run),
    (lambda p: (p / "last.pt").is_file(), training),
    _inside("results.json", document),
    _inside("ablation.json", document),
    (lambda p: (p / "progress.csv").is_file(), progress),
    (lambda p: (p / REPORT).is_file(), lambda p: Artefact(p, "report", {})),
]
_FILES: dict[str, Callable[[Path], Artefact]] = {
    "config.json": lambda p: exported(p.parent) if _is_export(p.parent) else document(p),
    "zarr.json": lambda p: store(p.parent),
    "store.json": lambda p: plain_files(p.parent),
    **dict.fromkeys((".pt", ".pth", ".th", ".ckpt", ".bin", ".tar"), checkpoint),
    ".safetensors": heads,
    ".onnx": lambda p: exported(p.parent),
    ".yaml": _config,
    ".yml": _config,
    ".json": document,
}
