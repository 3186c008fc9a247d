"""The files of a backbone worth keeping when its machine is given back: tables, heads, clean view of its features."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from cache import Cache, open_cache, write_durably
from pipeline.results.files import header

KINDS = (".json", ".jsonl", ".csv", ".png", ".safetensors")


def keep_files(place: Path, folder: Path, *, documents: Iterable[str]) -> None:
    """Copy the named folders under `place`, the training curve and the clean view into `folder`, a few tens of MB.

    Checkpoints and augmented views are left out: they take hundreds of MB, and the same command makes them again.
    """
    for name in documents:
        for file in sorted(p for p in (place / name).iterdir() if p.suffix in KINDS):
            target = folder / name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for name in ("metrics.jsonl", "run.json"):
        if (place / "backbone" / name).is_file():
            shutil.copyfile(place / "backbone" / name, folder / name)
    write_durably(folder / "clean.safetensors", clean_view(open_cache(place / "features.zarr")))


def clean_view(store: Cache) -> bytes:
    """Return a safetensors file: features (N, D) float16 of view 0 and labels of every split, counts, and the stage-1 head."""
    weight, bias = store.classifier
    arrays: dict[str, np.ndarray] = {"weight": weight, "bias": bias, "counts": store.counts}
    for split in store.splits:
        arrays[f"{split}_features"] = store.read(split, 0).astype(np.float16)
        arrays[f"{split}_labels"] = store.labels(split).astype(np.uint16)
    facts = {"digest": store.digest, "network": store.provenance.get("network"), "class_names": list(store.class_names)}
    return save(arrays, {"header": json.dumps(header("features", {})), "facts": json.dumps(facts)})
