"""What holds results: of rebalancing, ablations, tries, reproductions, benchmarks; and the heads."""

import csv
import json
from pathlib import Path

from pipeline.errors import DataError
from pipeline.info.artefact import Artefact, Facts, accuracies_of, beside, prefixed, read_json, try_json
from pipeline.info.trained import checkpoint
from pipeline.method_names import start_name
from pipeline.paths import STAGE1_HEAD
from pipeline.results.documents import read_ablation, read_choice, read_results, read_sweep
from pipeline.results.head_id import HeadId
from pipeline.results.heads import read_scorers

CHOSEN_ON = {"val": "chosen on validation", "kfold": "chosen on held-out folds"}


def results(path: Path) -> Artefact:
    found = read_results(path)
    chosen, timing = found["selected"], found.get("timing", {})
    tuned = [f"{c['method']}: {c['trials']} trials, {c['score']:.1f} %" for c in found.get("chosen", ())]
    of = f"{chosen['n']} backbones" if "backbones" in found else f"{chosen['n']} batch order(s) of one backbone"
    facts = {
        "store": found["store"],
        start_name(found.get("fingerprint")): accuracies_of(found["baseline"]),
        "selected": f"{_selected(chosen)}; mean over {of}",
        "its test accuracy": accuracies_of(chosen),
        "tuned, best on the choosing split": tuned or None,
        "rows": len(found["results"]),
        "λ": sorted({row["lam"] for row in found["results"] if row.get("lam") is not None}),
        "fitted": f"{timing['heads']} heads in {timing['fit_s']:.2f} s" if timing.get("heads") else None,
        "fingerprint": None if isinstance(found.get("fingerprint"), list) else found.get("fingerprint"),
    }
    return Artefact(path, "rebalancing results", facts, beside(path))


def choice(path: Path) -> Artefact:
    """selection.json: what was chosen, on what, before the test split was read; of an ablation, of each variant."""
    found = read_choice(path)
    if isinstance(found, list):
        chosen: Facts = {f"  {one['name']}": _scored(one, one) for one in found}
    else:
        chosen = {"selected": _scored(found["selected"], found)}
    return Artefact(path, "choice before the test split was read", chosen, beside(path))


def _selected(chosen: Facts) -> str:
    return f"{HeadId.from_dict(chosen)} ({CHOSEN_ON.get(chosen.get('chosen_on') or '', 'given')})"


def _scored(chosen: Facts, said: Facts) -> str:
    score = f"{said['score']:.1f} ± {said['standard_error']:.1f} % there" if "score" in said else ""
    near = f"{len(said['within_one_se'])} settings within one standard error" if said["within_one_se"] else ""
    return "; ".join(filter(None, (_selected(chosen), score, near)))


def heads(path: Path) -> Artefact:
    if path.name == STAGE1_HEAD:
        return _stage_1_head(path)
    try:
        scorers = read_scorers(path)
    except DataError:
        if path.name == "heads.safetensors":
            raise
        return _hits(path) or checkpoint(path)
    described, weight = [what for what, _ in scorers], scorers[0][1].arrays[0]
    named: dict[str, int] = {}
    for head in described:
        name = HeadId.of_row(head).name()
        named[name] = named.get(name, 0) + 1
    facts = {
        "heads": len(described),
        "weight": f"{len(described)} × {weight.shape[0]} classes × {weight.shape[1]} features, {weight.dtype}",
        "seeds": sorted({head["seed"] for head in described if head.get("seed") is not None}),
        "kinds": [f"{name}: {count}" if count > 1 else name for name, count in named.items()],
    }
    return Artefact(path, "rebalanced heads", facts, beside(path))


def _stage_1_head(path: Path) -> Artefact:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            classes, width = file.get_slice("weight").get_shape()
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); run `pipeline export` again") from error
    facts = {"weight": f"{classes} classes × {width} features", "of": "the exported model in the same folder"}
    return Artefact(
        path, "head before rebalancing", facts, try_json(path.with_name("config.json")).get("provenance", {})
    )


def _hits(path: Path) -> Artefact | None:
    """Of a file that is one of hits, which samples and heads."""
    from pipeline.results.differences import read_hits

    try:
        found = read_hits(path)
    except DataError:
        return None
    facts = {"test images": f"{len(found.labels):,}", "heads": len(found.heads)}
    return Artefact(path, "which test images each head got right", facts, beside(path))


def ablation(path: Path) -> Artefact:
    """ablation.json: what each variant chose, and its accuracy."""
    found = read_ablation(path)
    most = max(row["n"] for row in found["rows"])
    rows = {f"  {row['name']}": f"{_chosen(row)}: {accuracies_of(row)}" for row in found["rows"]}
    facts = {
        "store": found["store"],
        "network": found["network"],
        "variants": f"{len(rows)}, each chosen for itself; test accuracy, mean over {most} batch order(s)",
        **rows,
        "fitted": f"{found['timing']['heads']} heads in {found['timing']['fit_s']:.2f} s",
        "digest": found["digest"],
        **prefixed(found["fingerprint"]),
    }
    return Artefact(path, "ablation", facts, beside(path))


def tries(path: Path) -> Artefact:
    """tries.json of `train-backbone --try`."""
    found = read_sweep(path)
    chosen, seeds = found["selected"], found["seeds"]
    rows = {f"  {row['name']}": accuracies_of(row) for row in found["tries"]}
    facts = {
        "settings": f"{len(rows)}, {len(seeds)} seed(s) each ({', '.join(map(str, seeds))}); validation accuracy",
        **rows,
        "selected": f"{chosen['name']}, {'chosen on validation' if chosen['chosen_on'] else 'given'}",
        "its checkpoint": chosen["checkpoint"],
        "notes": found["notes"] or None,
    }
    return Artefact(path, "settings tried in stage 1", facts, found.get("provenance", {}))


def reproduction(path: Path) -> Artefact:
    """reproduction.json: how many rows of which tables, and how far they are from the paper's."""
    rows = read_json(path, list)
    tables: dict[str, int] = {}
    for row in rows:
        tables[f"{row['table']}, {row['config']}"] = tables.get(f"{row['table']}, {row['config']}", 0) + 1
    compared = sum(any(v is not None for v in (row.get("paper") or {}).values()) for row in rows)
    facts = {
        "rows": f"{len(rows)}, {compared} beside a number of the paper",
        **{f"  {table}": f"{n} rows" for table, n in tables.items()},
        "networks": sorted({str(row["network"]) for row in rows}),
        "devices": sorted({str(row["device"]) for row in rows}),
    }
    return Artefact(path, "reproduction of the paper's tables", facts, {})


def kept(path: Path) -> Artefact:
    """A folder under keep/ of `pipeline reproduce`: tables, heads and the clean view of a backbone's features."""
    from safetensors import safe_open

    with safe_open(path / "clean.safetensors", "np") as file:
        said = json.loads(file.metadata()["facts"])
        sizes = {n: file.get_slice(n).get_shape() for n in file.keys() if n.endswith("_features")}  # noqa: SIM118
    facts = {
        "tables": sorted(p.name for p in path.iterdir() if p.is_dir()),
        "features": ", ".join(
            f"{name.removesuffix('_features')} {n:,} × {width}" for name, (n, width) in sizes.items()
        ),
        "network": said["network"],
        "classes": f"{len(said['class_names']):,}",
        "digest of the store": said["digest"],
    }
    return Artefact(path, "kept of a reproduction", facts, beside(path / "clean.safetensors"))


def bench(path: Path) -> Artefact:
    """A result of `pipeline bench`: each measure against its target."""
    found = read_json(path)
    marks = {True: "met", False: "MISSED", None: "no target"}
    facts: Facts = {
        f"  {m['name']}": f"{m['value']:g} {m['unit']}".strip()
        + (f", target {'≤' if m['at_most'] else '≥'} {m['target']:g}" if m["target"] is not None else "")
        + f" ({marks[m['met']]})"
        for m in found["measures"]
    }
    machine = found["machine"]
    on = {k: machine[k] for k in ("processor", "cpus", "threads", "load") if k in machine}
    return Artefact(path, f"bench {found['name']}", {"on": on, **facts, "took": f"{found['seconds']:.0f} s"}, machine)


def progress(path: Path) -> Artefact:
    """The folder of `pipeline progress`."""
    lines = (path / "progress.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    runs = list(dict.fromkeys(row[next(iter(row))] for row in rows))
    return Artefact(path, "progress of trainings compared", {"compares": runs, "rows": len(rows)}, {})


def _chosen(row: Facts) -> str:
    return HeadId.of_row(row).name() + (f" (chosen on {row['chosen_on']})" if row.get("chosen_on") else "")
