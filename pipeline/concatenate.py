"""Features of the same images by several encoders, side by side in one store, each feature standardised."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import Cache, open_cache
from pipeline.dump_prepare import as_data_error
from pipeline.errors import DataError
from pipeline.probe import SETTINGS as PROBE_SETTINGS
from pipeline.probe import fit_probe
from pipeline.provenance import provenance


def concatenated_folder(stores: Sequence[Path | str]) -> Path:
    """Return the folder of the concatenation beside the first store's: runs/x/lite0 and runs/x/lite2 give runs/x/lite0+lite2."""
    places = [Path(store).parent if Path(store).name == "features.zarr" else Path(store) for store in map(str, stores)]
    return places[0].parent / "+".join(place.name.removesuffix(".zarr") for place in places)


def concatenate_stores(stores: Sequence[Path | str], out: Path | str, *, overwrite: bool = False) -> str:
    """Return the digest of a sealed store that holds the features of several stores side by side, (N, D1 + D2 + …).

    Each feature is standardised by its mean and standard deviation over the clean training features, so that no encoder
    outweighs another by its scale. A linear probe on them is the head that stage 2 starts from. A store that is there and was
    made of the same stores is completed.

    Raises: DataError: the stores differ in their images, labels, classes or views, or `out` holds another store.
    """
    with as_data_error():
        opened = [open_cache(store) for store in stores]
    first = opened[0]
    for other in opened[1:]:
        _refuse_other_images(first, other)
    scales = [_mean_and_scale(store) for store in opened]
    networks = [store.provenance.get("network") or {} for store in opened]
    width = sum(store.width for store in opened)
    facts = {
        "network": " + ".join(str(n.get("network", "unknown")) for n in networks),
        "parameters": sum(int(n.get("parameters", 0)) for n in networks),
        "feature_width": width,
    }
    record: dict[str, Any] = {"network": facts, "made_from": {"stores": [str(store.path) for store in opened]}}
    if "config" in first.provenance:
        record["config"] = first.provenance["config"]
    dataset = {"dataset": first.fingerprint["dataset"]} if "dataset" in first.fingerprint else {}
    with (
        as_data_error(),
        cache.create_store(
            out,
            overwrite=overwrite,
            splits={
                split: cache.StoreSplit(first.views(split), first.labels(split), first.ids(split))
                for split in first.splits
            },
            width=width,
            dtype="float16",
            weight=None,
            bias=None,
            class_names=first.class_names,
            counts=np.bincount(first.labels("train"), minlength=len(first.class_names)),
            fingerprint={**dataset, "concatenated": [store.digest for store in opened], "probe": PROBE_SETTINGS},
            provenance=provenance(command="rebalance", **record),
        ) as writer,
    ):
        for chunk in writer.missing():
            rows = np.arange(chunk.start, chunk.stop)
            parts = [
                (store.read_rows(chunk.split, rows, chunk.view).astype(np.float32) - mean) / scale
                for store, (mean, scale) in zip(opened, scales, strict=True)
            ]
            features = np.concatenate(parts, axis=1)
            writer.write(chunk, features, absent=np.flatnonzero(np.isnan(features).any(1)).tolist())
        choice: dict[str, Any] = {}
        if not writer.has_classifier:

            def blocks(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                labels = torch.from_numpy(first.labels(split))
                for chunk in writer.layout.chunks_of(split, 0):
                    features = torch.from_numpy(writer.read(chunk)).float()
                    valid = ~features[:, 0].isnan()
                    yield features[valid], labels[chunk.start : chunk.stop][valid]

            probe = fit_probe(
                partial(blocks, "train"),
                classes=len(first.class_names),
                width=width,
                validation=partial(blocks, "val") if "val" in first.splits else None,
            )
            writer.set_classifier(probe.weight, probe.bias)
            choice = {"head": str(probe), "probe": probe.to_dict()}
        return writer.seal(facts=choice)


def _refuse_other_images(first: Cache, other: Cache) -> None:
    """Raise DataError where two stores are not of the same images, labels and views."""
    differences = {
        "their splits": (first.splits, other.splits),
        "their class names": (first.class_names, other.class_names),
        "the fingerprints of their images": (first.fingerprint.get("dataset"), other.fingerprint.get("dataset")),
    }
    for split in set(first.splits) & set(other.splits):
        differences |= {
            f"the number of {split} samples": (first.rows(split), other.rows(split)),
            f"the views of {split}": (first.views(split), other.views(split)),
            f"the ids of {split}": (first.ids(split).tolist(), other.ids(split).tolist()),
            f"the labels of {split}": (first.labels(split).tolist(), other.labels(split).tolist()),
        }
    names = [name for name, (a, b) in differences.items() if a != b]
    if names:
        raise DataError(
            f"{other.path}: cannot stand beside {first.path}: they differ in {names[0]}; dump both from the same images with the "
            "same views, such as --encoder lite0,lite2"
        )


def _mean_and_scale(store: Cache) -> tuple[np.ndarray, np.ndarray]:
    """Return mean (D,) and standard deviation (D,) of the clean training features, 1 where a feature is constant."""
    number, total, squares = 0, np.zeros(store.width), np.zeros(store.width)
    for chunk in store.chunks("train"):
        features = store.read_chunk(chunk).astype(np.float64)
        features = features[~np.isnan(features[:, 0])]
        number, total, squares = number + len(features), total + features.sum(0), squares + (features**2).sum(0)
    mean = total / number
    variance = squares / number - mean**2
    scale = np.where(variance > 1e-10 * (variance + mean**2), np.sqrt(np.maximum(variance, 0)), 1.0)
    return mean.astype(np.float32), scale.astype(np.float32)
