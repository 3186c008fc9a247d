"""What an artefact is and what made it: runs, checkpoints, stores, results, heads, exported models, configurations."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cache
from cache import Cache, CacheError, Writer, open_cache, open_writer
from pipeline.config import find_config, load_config
from pipeline.errors import ConfigError, DataError
from pipeline.heads import read_scorers
from pipeline.method_names import PROBE, start_name
from pipeline.report.source import read_results
from pipeline.shown import Shown

EXPECTED = (
    "a run's folder, a checkpoint (last.pt), a feature store (features.zarr), results.json, heads.safetensors, run.json, "
    "the folder of `pipeline export`, or a configuration (.yaml)"
)
BROUGHT = "backbone brought along"
STARTS = ("stage 1", PROBE)
MADE = (
    "created",
    "argv",
    "git",
    "platform",
    "device",
    "ranks",
    "threads",
    "precision",
    "seed",
    "made_from",
    "versions",
)
NAMED = {"train": "training", "val": "validation"}
Facts = dict[str, Any]


@dataclass(frozen=True)
class Artefact(Shown):
    """What `describe` found: the kind of thing, its key facts, and what made it."""

    path: Path | str
    kind: str
    facts: Facts
    made: Facts = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "kind": self.kind, "facts": self.facts, "provenance": self.made}

    def __str__(self) -> str:
        made = {key: self.made[key] for key in MADE if self.made.get(key) is not None}
        if "argv" in made:
            made["argv"] = " ".join(made["argv"])
        lines = _lines(self.facts) + ([("made by", "")] if made else []) + [(f"  {k}", v) for k, v in _lines(made)]
        width = max((len(name) for name, _ in lines), default=0)
        return "\n".join(
            [f"{self.path}: {self.kind}", *(f"  {name:<{width}}  {text}".rstrip() for name, text in lines)]
        )


@dataclass(frozen=True)
class Verified(Shown):
    """A store of which every byte was read and found right; skipped: split → ids of samples without features."""

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
        whole = (
            f"{self.store}: whole; {self.chunks} chunks of features read, every checksum holds; digest {self.digest}"
        )
        return "\n".join([whole, *(f"skipped {split}: {_samples(ids)}" for split, ids in self.skipped.items())])


def verify(path: Path | str) -> Verified:
    """Reads a whole sealed store against its checksums; DataError lists what is damaged and how to repair it."""
    try:
        if damaged := cache.verify(path):
            listed = "\n".join(f"  {damage}" for damage in damaged)
            again = f"repair it: the same `pipeline dump-features … --out {path}` computes just these again"
            raise DataError(f"{path}: {len(damaged)} damaged file(s)\n{listed}\n{again}")
        store = open_cache(path)
        chunks = sum(len(store.chunks(split, view)) for split in store.splits for view in range(store.views(split)))
        return Verified(path, store.digest, chunks, _skipped(store))
    except CacheError as error:
        raise DataError(str(error)) from error


def describe(path: Path | str) -> Artefact:
    """What lies at a path, URL of a store, or shipped configuration of that name, and what made it.

    Raises DataError where it is missing, damaged or nothing of ours, naming what could have been given.
    """
    if isinstance(path, str):
        return _store(path)
    if not path.exists():
        try:
            return _config(find_config(str(path)))
        except ConfigError as error:
            raise DataError(f"{path}: no such file or folder; expected {EXPECTED}") from error
    if path.is_dir():
        tell = next((tell for recognises, tell in _FOLDERS if recognises(path)), None)
    else:
        tell = _FILES.get(path.name) or _FILES.get(path.suffix)
    if tell is None:
        raise DataError(f"{path}: not an artefact of this program; expected {EXPECTED}")
    try:
        return tell(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not as this version writes it ({error!r}); expected {EXPECTED}") from error


def _store(path: Path | str) -> Artefact:
    """A sealed store through its own reader; of one that is not, how far it has come."""
    try:
        writer = open_writer(path)
        if not writer.sealed:
            return _open_store(path, writer)
        store = open_cache(path)
    except CacheError as error:
        raise DataError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable feature store ({error}); expected {EXPECTED}") from error
    sizes = {s: f"{store.rows(s):,} samples, {store.views(s)} view(s)" for s in store.splits}
    facts = {"state": "sealed", **sizes, "features": f"{store.width} wide, {store.dtype}"}
    facts |= {f"skipped {split}": _samples(ids) for split, ids in _skipped(store).items()}
    return Artefact(
        path,
        "feature store",
        {
            **facts,
            **_classes(store.class_names, store.counts.tolist()),
            **_prefixed(store.fingerprint),
            "digest": store.digest,
        },
        store.provenance,
    )


def _skipped(store: Cache) -> dict[str, list[int]]:
    """Split → ids of the samples without features, splits that have such."""
    skipped = {split: store.ids(split)[store.skipped(split)].tolist() for split in store.splits}
    return {split: ids for split, ids in skipped.items() if ids}


def _samples(ids: list[int], most: int = 10) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return f"{len(ids)} unreadable image(s), left out wherever features are used: sample {', '.join(map(str, ids[:most]))}{more}"


def _open_store(path: Path | str, writer: Writer) -> Artefact:
    layout, chunks, place = writer.layout, writer.chunks, writer.place
    attributes = json.loads(place.read("zarr.json")[0])["attributes"]
    there = len({f"{chunk.array}/{chunk.key}" for chunk in chunks}.intersection(place.names()))
    sizes = {s: f"{rows:,} samples, {views} view(s)" for s, views, rows in layout.splits}
    facts = {
        "state": f"open: {there} of {len(chunks)} chunks are there; the same pipeline dump-features goes on with it",
        **sizes,
        "features": f"{layout.width} wide, {layout.dtype}",
        **_classes(attributes["class_names"], attributes["counts"]),
        **_prefixed(attributes["fingerprint"]),
    }
    return Artefact(path, "feature store, unfinished", facts, attributes["provenance"])


def _checkpoint(path: Path) -> Artefact:
    from pipeline.backbone.checkpoint import read, weights_digest

    state = read(path)
    network, data = state["network"], state["dataset"]
    done = "complete" if state["complete"] else f"unfinished, step {state['step_in_epoch']} of the next epoch"
    brought = state.get("brought")
    best = f"{state['best']:.2f} %" if state["best"] is not None else None
    facts = {
        "network": f"{network['network']}, {network['parameters']:,} parameters, {network['feature_width']}-d features",
        "trained": None if brought else f"{state['epoch']} of {state['config']['backbone']['epochs']} epochs, {done}",
        "trained with": None if brought else _choices(state["config"]["backbone"]),
        "best validation accuracy (mean over classes)": best,
        "head": None
        if brought is None
        else f"{PROBE}, fitted when features are dumped"
        if state["probe"]
        else "its own",
        **_classes(state["class_names"], state["counts"]),
        "of them left out": _left_out(path, state["epoch"]),
        "dataset": f"{data['name']}, fingerprint {data['fingerprint']}",
        "input": state["transform"],
        "weights digest": weights_digest(state["model"]),
    }
    return Artefact(path, BROUGHT if state.get("brought") else "stage-1 checkpoint", facts, state["provenance"])


def _choices(settings: dict[str, Any]) -> str | None:
    """Loss, sampler and average of stage 1; None where all are as always."""
    told = [f"loss {settings['loss']}"] if settings.get("loss", "ce") != "ce" else []
    told += [f"{s} sampling"] if (s := settings.get("sampler", "instance")) != "instance" else []
    told += [f"weights averaged with decay {d:g}"] if (d := settings.get("ema", 0)) else []
    return ", ".join(told) or None


def _training(folder: Path) -> Artefact:
    """The last checkpoint of a training, the one before it where that cannot be read, and how its history ends."""
    from pipeline.backbone.checkpoint import Damaged, previous_of
    from pipeline.backbone.events import accuracies, pace
    from pipeline.backbone.folder import read_history

    last, damage = folder / "last.pt", None
    try:
        found = _checkpoint(last)
    except Damaged as error:
        if not previous_of(last).is_file():
            raise
        found, damage = _checkpoint(previous_of(last)), str(error)
    facts: Facts = {"damaged": damage, **found.facts}
    if history := read_history(folder):
        end = history[-1]
        facts["last epoch told"] = f"{end['epoch']}, loss {end['loss']:.4f}; {pace(end)}"
        facts |= {f"its {name} accuracy": accuracies(end, split) for split, name in NAMED.items()}
        known = [line for line in history if line.get("val_accuracy") is not None]
        if known:
            best = max(known, key=lambda line: line["val_accuracy"])
            facts["best epoch told"] = f"{best['epoch']}, validation {accuracies(best, 'val')}"
    return Artefact(found.path, found.kind, facts, found.made)


def _left_out(checkpoint: Path, epoch: int) -> str | None:
    """What the history beside a checkpoint says of unreadable images in its last epoch; None where there were none."""
    from pipeline.backbone.folder import read_history

    lines = read_history(checkpoint.parent)
    left_out = next((line.get("left_out") for line in lines if line.get("epoch") == epoch), None)
    return f"{left_out}, which could not be read in epoch {epoch}" if left_out else None


def _results(path: Path) -> Artefact:
    found = read_results(path)
    chosen, timing = found["selected"], found.get("timing", {})
    lam = "" if chosen.get("lam") is None else f", λ = {chosen['lam']:g}"
    on = {"val": "chosen on validation", "kfold": "chosen on held-out folds"}.get(chosen.get("chosen_on"), "given")
    loss = f", loss {chosen['loss']}" if chosen.get("loss") else ""
    own = "".join(f", {k} {_text(v)}" for k, v in chosen.get("parameters", {}).items())
    tuned = [f"{c['method']}: {c['trials']} trials, {c['score']:.1f} %" for c in found.get("chosen", ())]
    of = f"{chosen['n']} backbones" if "backbones" in found else f"{chosen['n']} batch order(s) of one backbone"
    facts = {
        "store": found["store"],
        start_name(found.get("fingerprint")): _accuracies(found["baseline"]),
        "selected": f"{chosen['method']}{loss}{lam}{own} ({on}); mean over {of}",
        "its test accuracy": _accuracies(chosen),
        "tuned, best on the choosing split": tuned or None,
        "rows": len(found["results"]),
        "λ": sorted({row["lam"] for row in found["results"] if row.get("lam") is not None}),
        "fitted": f"{timing['heads']} heads in {timing['fit_s']:.2f} s" if timing.get("heads") else None,
        "fingerprint": None if isinstance(found.get("fingerprint"), list) else found.get("fingerprint"),
    }
    return Artefact(path, "rebalancing results", facts, _beside(path))


def _heads(path: Path) -> Artefact:
    try:
        scorers = read_scorers(path)
    except DataError:
        if path.name == "heads.safetensors":
            raise
        return _checkpoint(path)  # says how weights from elsewhere are taken
    heads, weight = [what for what, _ in scorers], scorers[0][1].arrays[0]
    named: dict[str, int] = {}
    for head in heads:
        told = [head["loss"]] if head.get("loss") else []
        told += [f"λ = {head['lam']:g}"] if head.get("lam") is not None else []
        name = head["method"] + (f" ({', '.join(told)})" if told else "")
        named[name] = named.get(name, 0) + 1
    facts = {
        "heads": len(heads),
        "weight": f"{len(heads)} × {weight.shape[0]} classes × {weight.shape[1]} features, {weight.dtype}",
        "seeds": sorted({head["seed"] for head in heads if head.get("seed") is not None}),
        "kinds": [f"{name}: {count}" if count > 1 else name for name, count in named.items()],
    }
    return Artefact(path, "rebalanced heads", facts, _beside(path))


def _run_json(path: Path) -> Artefact:
    document = _json(path)
    if "argv" not in document:
        raise DataError(f"{path}: says nothing of what made it; expected {EXPECTED}")
    stages = {f"{stage} took": f"{entry['seconds']:.1f} s" for stage, entry in document.get("stages", {}).items()}
    return Artefact(path, f"record of pipeline {document.get('command', '')}".rstrip(), stages, document)


def _export(path: Path) -> Artefact:
    document = _json(path / "config.json")
    facts = {
        "network": document["architecture"],
        "weights": document["weights"],
        "head": document["head"],
        "input": document["transform"],
        **_classes(document["class_names"], document["counts"]),
    }
    return Artefact(path, "exported model", facts, document.get("provenance", {}))


def _config(path: Path) -> Artefact:
    try:
        config = load_config(path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    sections = config.model_dump(mode="json", exclude_defaults=True)
    facts = {"name": config.name, "run": str(config.run_dir), **{k: v for k, v in sections.items() if k != "name"}}
    return Artefact(path, "configuration", facts)


def _run(path: Path) -> Artefact:
    """A run: which of its parts are there, and its result."""
    facts: Facts = {}
    seeds = sorted(p.name for p in path.glob("seed-*") if p.is_dir())
    for part in [path, *(path / s for s in seeds)]:
        name = "" if part == path else f"{part.name}/"
        for file, kind in _PARTS.items():
            if (part / file).exists():
                facts[f"{name}{file}"] = BROUGHT if file == "backbone/last.pt" and _was_brought(part) else kind
    results = next((p for p in (path / "results.json", path / "rebalance" / "results.json") if p.is_file()), None)
    if results:
        told = _results(results).facts
        wanted = (*STARTS, "selected", "its test accuracy")
        facts |= {key: told[key] for key in wanted if key in told}
    records = [_try_json(p) for p in (path / "run.json", *sorted(path.glob("**/backbone/run.json")))]
    made: Facts = next(filter(None, records), {})
    return Artefact(path, f"run of {len(seeds)} backbones" if seeds else "run", facts, made)


def _was_brought(run: Path) -> bool:
    """Whether a run's backbone was not trained in it."""
    return _try_json(run / "backbone" / "run.json").get("command") == "dump-features"


def _is_export(path: Path) -> bool:
    return "architecture" in _try_json(path / "config.json")


def _is_run(path: Path) -> bool:
    return any((path / part).exists() for part in _PARTS) or any(path.glob("seed-*/backbone"))


_PARTS = {
    "backbone/last.pt": "stage-1 checkpoint",
    "features.zarr": "feature store",
    "rebalance/results.json": "rebalancing results",
    "rebalance/heads.safetensors": "rebalanced heads",
    "report.html": "report",
}
_FOLDERS: list[tuple[Callable[[Path], bool], Callable[[Path], Artefact]]] = [
    (lambda p: (p / "zarr.json").is_file(), _store),
    (_is_export, _export),
    (_is_run, _run),
    (lambda p: (p / "last.pt").is_file(), _training),
    (lambda p: (p / "results.json").is_file(), lambda p: _results(p / "results.json")),
]
_FILES: dict[str, Callable[[Path], Artefact]] = {
    "results.json": _results,
    "run.json": _run_json,
    "config.json": lambda p: _export(p.parent) if _is_export(p.parent) else _run_json(p),
    "zarr.json": lambda p: _store(p.parent),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), _checkpoint),
    ".safetensors": _heads,
    ".yaml": _config,
    ".yml": _config,
}


def _classes(names: Any, counts: list[int]) -> Facts:
    shown = list(names) if len(names) <= 12 else [*names[:8], "…", *names[-3:]]
    sizes = counts if len(counts) <= 20 else [*counts[:8], "…", *counts[-4:]]
    said = f"{len(names):,} ({', '.join(shown)})"
    return {"classes": said, "training images": f"{sum(counts):,} ({' '.join(map(str, sizes))})"}


def _prefixed(fingerprint: Facts) -> Facts:
    return {f"fingerprint {key}": value for key, value in fingerprint.items()}


def _accuracies(row: Facts) -> str:
    """`all 41.0 % (many 58.2, medium 41.1, few 20.7)` with the groups that exist."""
    groups = ", ".join(f"{g} {row[g]:.1f}" for g in ("many", "medium", "few") if row.get(g) is not None)
    whole = "–" if row.get("all") is None else f"{row['all']:.1f}"
    spread = f" ± {row['all_std']:.1f}" if row.get("all_std") is not None else ""
    return f"all {whole}{spread} % ({groups})"


def _lines(facts: Facts) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in facts.items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _json(path: Path) -> Facts:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error}); expected {EXPECTED}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: not an artefact of this program; expected {EXPECTED}")
    return document


def _try_json(path: Path) -> Facts:
    try:
        return _json(path)
    except DataError:
        return {}


def _beside(path: Path) -> Facts:
    """What made a file, from the run.json in its folder."""
    return _try_json(path.with_name("run.json"))
