"""Plans of what is made of a run: report, progress, export, labels."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import cache
from cache import CacheError, refuse_unwritable
from pipeline.errors import DataError
from pipeline.prepared import Prepared, Write, replaced_or_new
from pipeline.report.ablation import read_ablations
from pipeline.report.html import asked, study_of
from pipeline.report.progress import FILE, trainings


def plan_report(run: Path | Sequence[Path], *, out: Path | None = None) -> Prepared:
    """What `write_report` would do; raises what it would raise before it draws."""
    runs, folder = asked(run, out)
    told: dict[Path, str] = {}
    numbers: list[dict[str, Any]] = []
    for path in runs:
        study = study_of(path)
        if study is None:
            names = [document["name"] for document in read_ablations(path)]
            told[path] = f"{path}: ablations {', '.join(names)}"
            numbers.append({"run": str(path), "ablations": names})
            continue
        for backbone in study.backbones:
            _ = backbone.heads
        rows = sum(len(backbone.rows) for backbone in study.backbones)
        told[path] = f"{path}: {len(study.backbones)} backbone(s), {rows:,} rows; selected: {study.first.selected}"
        numbers.append({"run": str(path), "backbones": len(study.backbones), "rows": rows})
    refuse_unwritable(folder)
    writes = tuple(Write(folder / name, None, replaced_or_new(folder / name)) for name in ("report.html", "figures"))
    if len(runs) == 1:
        return Prepared("report", {}, {"run": next(iter(told.values()))}, numbers[0], writes)
    return Prepared("report", {}, {"runs": "; ".join(told.values())}, {"runs": numbers}, writes)


def plan_progress(runs: Sequence[Path], *, out: Path) -> Prepared:
    """What `compare_progress` would do; raises what it would raise before it draws."""
    found = {run: trainings(run) for run in runs}
    for run, of_run in found.items():
        if not of_run:
            why = "no such folder; give runs, or the folders of trainings" if not run.is_dir() else f"no {FILE} in it; "
            raise DataError(
                f"{run}: {why}" + ("" if not run.is_dir() else "train with --set backbone.diagnose_every=1")
            )
    refuse_unwritable(out)
    facts = {"compares": ", ".join(f"{run} ({len(of_run)} training(s))" for run, of_run in found.items())}
    writes = tuple(Write(out / name, None, replaced_or_new(out / name)) for name in ("progress.png", "progress.csv"))
    return Prepared("progress", {}, facts, {"runs": [str(run) for run in runs]}, writes)


def plan_export(
    run: Path | str, *, to: str | None = None, out: Path, lam: float | None = None, method: str | None = None
) -> Prepared:
    """What `export_model`, or of a store `cache.export`, would do; raises what it would raise before it writes."""
    if "://" in str(run) or (Path(run) / "zarr.json").is_file():
        return _of_store(run, to or "npy", out)
    from pipeline.backbone.build import network_facts
    from pipeline.backbone.checkpoint import checkpoint_bytes
    from pipeline.deploy.export import settled

    study, kind, checkpoint = settled(Path(run), to=to or "timm", out=out, lam=lam, method=method)
    refuse_unwritable(out)
    network = network_facts(checkpoint.config.backbone, checkpoint.model)
    told = f"{network['network']}, {network['parameters']:,} parameters, {len(checkpoint.class_names):,} classes"
    head = {"method": kind.method, "lam": kind.lam}
    facts = {"model": f"{told}; weights of {checkpoint.path}", "head": f"{kind} of {study.first.results_path}"}
    numbers: dict[str, Any] = {"run": str(run), "to": to or "timm", "network": network, "head": head}
    return Prepared(
        "export", {}, facts, numbers, (Write(out, checkpoint_bytes(checkpoint.model), replaced_or_new(out)),)
    )


def _of_store(store: Path | str, to: str, out: Path) -> Prepared:
    try:
        opened = cache.open_cache(store)
    except CacheError as error:
        raise DataError(str(error)) from error
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: already holds something; choose another --out, or remove it")
    refuse_unwritable(out)
    itemsize = 4 if opened.dtype == "float32" or (to == "npy" and opened.dtype == "bfloat16") else 2
    rows = sum(opened.rows(split) for split in opened.splits)
    shapes = [(opened.views(s), opened.rows(s), opened.width) for s in opened.splits]
    size = itemsize * sum(prod(shape) for shape in shapes) + 16 * rows + 4 * len(opened.counts) * (opened.width + 1)
    told = ", ".join(f"{s} {opened.views(s)} × {opened.rows(s):,} × {opened.width}" for s in opened.splits)
    return Prepared(
        "export", {}, {"store": f"{opened.path}: {told}, {opened.dtype}"}, {"store": str(opened.path), "to": to},
        (Write(out, size, "new"),),
    )  # fmt: skip


def plan_predict(
    model: Path, images: Sequence[Path | str], *, out: Path | None, batch_size: int, compare: bool, device: str
) -> Prepared:
    """What labelling would do; raises what it would raise before it reads the first image."""
    from pipeline.deploy.inference_model import load_model
    from pipeline.deploy.predict import counted, find_images
    from pipeline.distributed import choose_device

    notes: list[str] = []
    paths = find_images(images, notes.append)
    loaded = load_model(model, device=device)
    if out:
        refuse_unwritable(out.parent)
    heads = "the rebalanced head and that of stage 1" if compare else "the rebalanced head"
    where, batches = str(choose_device(device)), -(-len(paths) // batch_size)
    facts = {
        "model": f"{model}: {len(loaded.class_names):,} classes; {heads}",
        "images": f"{counted(len(paths))} in {batches:,} batch{'' if batches == 1 else 'es'}, by {where}",
    }
    numbers: dict[str, Any] = {"images": len(paths), "batches": batches, "classes": len(loaded.class_names)}
    writes = () if out is None else (Write(out, None, replaced_or_new(out)),)
    return Prepared("predict", {}, facts, numbers | {"device": where, "compare": compare}, writes, tuple(notes))
