"""Every check of a dump before its first image, and the description of what it would do."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import CacheError, Foreseen, Layout, chunk_rows, is_url
from pipeline.backbone.arithmetic import Arithmetic, computes_bfloat16
from pipeline.backbone.build import classifier
from pipeline.backbone.checkpoint import Checkpoint, checkpoint_bytes
from pipeline.backbone.encoder import encoding_arithmetic
from pipeline.config import Config
from pipeline.data import Dataset, load_dataset
from pipeline.distributed import Ranks, planned_ranks
from pipeline.dump_source import Source, find_source, source_of
from pipeline.errors import DataError
from pipeline.prepared import Prepared, Write, data_facts, device_numbers, device_text
from pipeline.probe import SETTINGS as PROBE_SETTINGS
from pipeline.provenance import provenance
from pipeline.unreadable import Rows, readable_now, skipped_before

AT_CHANCE = "; the checkpoint's own head is at chance"  # ends the fingerprint's text on a probe that took its place
STATES = {
    "new": "new",
    "sealed": "complete, nothing is missing",
    "open": "unfinished, goes on",
    "damaged": "damaged chunks are computed again",
    "replaced": "what is there is replaced",
}


@dataclass(frozen=True, eq=False)
class PreparedDump:
    """A dump that has passed every check that needs no look into the chunks of its store.

    Arguments:
        store: the arguments of `cache.create_store`; empty on ranks other than the first.
        ranks: the processes that encode, or would.
        arithmetic: the formats in which they do, the same on all of them.
    """

    source: Source
    dataset: Dataset
    store: dict[str, Any]
    ranks: Ranks
    overwrite: bool
    arithmetic: Arithmetic

    @functools.cached_property
    def description(self) -> Prepared:
        """Return what the dump would do; every chunk that is there is read for it.

        Raises: DataError: a store that was made otherwise, or that another process writes.
        """
        source, config = self.source, self.source.config
        with as_data_error():
            store = cache.foresee_store(
                source.out, overwrite=self.overwrite, skipping=config.dump.on_error == "skip", **self.store
            )
        saved_backbone: tuple[Write, ...] = ()
        if source.keep_in and not (source.keep_in / "last.pt").is_file():
            saved_backbone = (Write(source.keep_in / "last.pt", checkpoint_bytes(source.backbone.model), "new"),)
        return _description(
            config, self.dataset, store, out=source.out, ranks=self.ranks, network=source.backbone.network,
            precision=self.arithmetic.precision_name, arithmetic=str(self.arithmetic), extra_writes=saved_backbone,
        )  # fmt: skip


def prepare_dump(
    backbone: Checkpoint | Path | str | None,
    config: Config | None = None,
    *,
    out: Path | str | None = None,
    own_images: bool = False,
    settings: Sequence[str] = (),
    model: str | None = None,
    key_map: Path | None = None,
    probe: bool = False,
    device: str = "auto",
    world: int = 1,
    overwrite: bool = False,
    say: Callable[[str], object] = lambda line: None,
    images: Dataset | None = None,
    keep_in: Path | None = None,
    ranks: Ranks | None = None,
) -> PreparedDump:
    """Return the dump that `dump_features` would execute, checked; nothing is written.

    Arguments: those of `dump_features`; world: processes that would encode; ranks: those that are running, where they
        are; device and world do not count then.
    Raises: what `dump_features` raises.
    """
    planned = ranks or planned_ranks(device, world)
    running = ranks or Ranks(0, 1, planned.device)
    if not isinstance(backbone, Checkpoint):
        source = find_source(
            None if backbone is None else Path(backbone), config, out=out, own_images=own_images, settings=settings,
            model=model, key_map=key_map, probe=probe, overwrite=overwrite, ranks=running, say=say,
        )  # fmt: skip
    else:
        source = source_of(backbone, config, out=out, images=images, keep_in=keep_in)
    dataset = running.together(
        lambda: source.images or load_dataset(source.config.data, resize=not source.config.backbone.frozen)
    )
    running.together(lambda: refuse_misfit(dataset, source.backbone))
    proposal = running.together(
        lambda: _arithmetic(source, planned.device, overwrite=overwrite) if running.first else None
    )
    arithmetic = running.gathered(proposal)[0]  # a trial on every rank could end differently
    assert arithmetic is not None
    store = running.together(
        lambda: (
            _store_arguments(source, dataset, arithmetic, ranks=planned, overwrite=overwrite) if running.first else {}
        )
    )
    return PreparedDump(source, dataset, store, planned, overwrite, arithmetic)


def _arithmetic(source: Source, device: torch.device, *, overwrite: bool) -> Arithmetic:
    """Return the formats in which the dump computes: those that the store was begun with, else what is fastest here."""
    try:
        recorded = None if overwrite else cache.open_writer(source.out).provenance
    except CacheError:  # who makes or continues the store says why
        recorded = None
    backbone = source.backbone
    return encoding_arithmetic(backbone.model, backbone.transform.size, device, source.config.dump, recorded=recorded)


def describe_unmade(
    config: Config, dataset: Dataset, *, out: Path | str, ranks: Ranks, network: dict[str, Any]
) -> Prepared:
    """Return what the dump of a backbone that is not trained yet would do.

    Arguments:
        network: the facts of the backbone, with its `feature_width`.
    """
    itemsize = 4 if config.dump.dtype == "float32" else 2
    splits = tuple((n, config.dump.views if n == "train" else 1, len(split)) for n, split in dataset.splits.items())
    width = network["feature_width"]
    layout = Layout(
        splits, width, len(dataset.class_names), config.dump.dtype, chunk_rows(width=width, itemsize=itemsize)
    )
    if is_url(out):
        state = "made when the backbone is there"
    elif (Path(out) / "zarr.json").is_file():
        state = "there: kept if it is of the backbone that comes out, else refused"
    else:
        state = "new"
    store = Foreseen("new", layout, tuple(layout.chunks()))
    precision = "float32"
    if computes_bfloat16(ranks.device):
        precision = "bfloat16" if ranks.device.type == "cuda" else "float32 or bfloat16, by a timed trial"
    return _description(
        config, dataset, store, out=out, ranks=ranks, network=network, precision=precision, arithmetic=precision,
        state=state,
    )  # fmt: skip


def _description(
    config: Config,
    dataset: Dataset,
    store: Foreseen,
    *,
    out: Path | str,
    ranks: Ranks,
    network: dict[str, Any],
    precision: str,
    arithmetic: str,
    state: str = "",
    extra_writes: tuple[Write, ...] = (),
) -> Prepared:
    """Return the description of a dump.

    Arguments:
        precision, arithmetic: of the encoder; the latter with memory format and images a forward pass.
        state: of the store, by default the one that was found.
        others: files that would be written beside the store.
    """
    layout, images = store.layout, sum(chunk.rows for chunk in store.missing)
    entire = store.state in ("new", "replaced")
    chunk_bytes = {split: layout.features(split).chunk_bytes for split, _, _ in layout.splits}
    missing_bytes = layout.bytes if entire else sum(chunk_bytes[chunk.split] + 4 for chunk in store.missing)
    total = len(layout.chunks())
    present = f": {total - len(store.missing):,} of {total:,} chunks are there" if not entire and images else ""
    batches = sum(ceil(chunk.rows / config.dump.batch_size) for chunk in store.missing)
    return Prepared(
        command="dump-features",
        config=config.model_dump(mode="json", include={"name", "data", "dump"}),
        facts={
            **data_facts(dataset),
            "network": f"{network['network']}, {network['parameters']:,} parameters",
            "encodes": f"{images:,} images ({layout.views('train')} training view(s)) in {batches:,} batches of "
            f"{config.dump.batch_size}; {layout.width} features each, {layout.dtype}, {len(store.missing):,} chunks",
            "on": device_text(ranks, arithmetic),
        },
        numbers={
            "dataset": dataset.summary(),
            "network": network,
            "images": images,
            "batches": batches,
            "chunks": len(store.missing),
            "store_bytes": layout.bytes,
            **device_numbers(ranks, precision),
        },
        writes=(Write(out, missing_bytes, state or STATES[store.state] + present), *extra_writes),
        notes=dataset.notes,
    )


def fingerprint(
    backbone: Checkpoint, config: Config, dataset: Dataset, *, skipped: Rows, probe: str | None
) -> dict[str, Any]:
    """Return all that decides the features, up to rounding; stores that differ in any of it are different stores.

    Batch size, device, precision and threads only round differently: a dump may go on with a smaller batch or elsewhere.

    Arguments:
        skipped: rows without features; whatever becomes of their images, the rest stays the same.
        probe: how the head was fitted, None for the backbone's own.
    """
    return {
        "dataset": dataset.fingerprint_without(skipped),
        "checkpoint": backbone.weights_digest,
        "network": backbone.network["network"],
        "transform": json.dumps(backbone.transform.to_dict(), sort_keys=True),
        "views": config.dump.views,
        "seed": config.dump.seed,
        "dtype": config.dump.dtype,
        **({"probe": probe} if probe else {}),
    }


def refuse_misfit(dataset: Dataset, backbone: Checkpoint) -> None:
    """Raise DataError unless classes and input size of the backbone are those of the data set."""
    if dataset.class_names != backbone.class_names:
        mismatches = [(a, b) for a, b in zip(backbone.class_names, dataset.class_names, strict=False) if a != b]
        detail = ", the first that differs: {!r} against {!r}".format(*mismatches[0]) if mismatches else ""
        raise DataError(
            f"{backbone.path}: trained on {len(backbone.class_names)} classes, the data has "
            f"{len(dataset.class_names)}{detail}; give the configuration it was trained with, train again, or take its encoder "
            "alone: --checkpoint FILE --probe"
        )
    if backbone.config.backbone.frozen:
        return  # its images are resized batch by batch
    for name, split in dataset.splits.items():
        if split.images is not None and split.images.shape[1:3] != backbone.transform.size:
            trained, present = ("×".join(map(str, size)) for size in (backbone.transform.size, split.images.shape[1:3]))
            raise DataError(f"{backbone.path}: trained on {trained} images, {name} has {present}; set data.image_size")


def _store_arguments(
    source: Source, dataset: Dataset, arithmetic: Arithmetic, *, ranks: Ranks, overwrite: bool
) -> dict[str, Any]:
    """Return the arguments of `cache.create_store`; raise DataError where skipped images may not be skipped again."""
    backbone, config, out = source.backbone, source.config, source.out
    head = classifier(backbone.model)
    weight, bias = _arrays(head) if backbone.head_is_final else (None, None)
    probe = _recorded_probe(backbone, out, overwrite=overwrite) or (PROBE_SETTINGS if backbone.probe else None)
    skipped = {} if overwrite else skipped_before(out, dataset)
    return {
        "splits": {
            name: cache.StoreSplit(config.dump.views if name == "train" else 1, split.labels, split.ids)
            for name, split in dataset.splits.items()
        },
        "width": head.in_features,
        "dtype": config.dump.dtype,
        "weight": weight,
        "bias": bias,
        "class_names": dataset.class_names,
        "counts": dataset.counts,
        "fingerprint": fingerprint(backbone, config, dataset, skipped=skipped, probe=probe),
        "provenance": provenance(
            command="dump-features",
            config=config.model_dump(mode="json"),
            device=str(ranks.device),
            precision=arithmetic.precision_name,
            memory_format=arithmetic.memory_format,
            micro_batch=arithmetic.micro_batch,
            ranks=ranks.world,
            threads=torch.get_num_threads(),
            seed=config.dump.seed,
            dataset=dataset.summary(),
            network=backbone.network,
            made_from={
                "checkpoint": str(backbone.path),
                "weights": backbone.weights_digest,
                "epoch": backbone.epoch,
                **(backbone.external or {}),
            },
        ),
        "retry": readable_now(skipped, dataset, store=out, may_skip=config.dump.on_error == "skip"),
    }


def _recorded_probe(backbone: Checkpoint, out: Path | str, *, overwrite: bool) -> str | None:
    """Return how the head in a store was fitted, where this backbone leads to such a head; it may be another version's way."""
    if overwrite or backbone.head_is_final:
        return None
    try:
        text = cache.open_writer(out).fingerprint.get("probe")
    except CacheError:  # who makes or continues the store says why
        return None
    return text if isinstance(text, str) and text.endswith(AT_CHANCE) != backbone.probe else None


def _arrays(head: torch.nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    weight = head.weight.detach().cpu().numpy()
    return weight, np.zeros(len(weight), np.float32) if head.bias is None else head.bias.detach().cpu().numpy()


@contextmanager
def as_data_error() -> Iterator[None]:
    """Raise an error of the store as the error that ends a command."""
    try:
        yield
    except CacheError as error:
        ending = DataError(str(error))
        ending.exit_code = error.exit_code
        raise ending from error
