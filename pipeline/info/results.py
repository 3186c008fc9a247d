"""Description of results: rebalancing, ablations, tries, reproductions, benchmarks; and of heads."""

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
    document = read_results(path)
    selected, timing = document["selected"], document.get("timing", {})
    tuned = [f"{c['method']}: {c['trials']} trials, {c['score']:.1f} %" for c in document.get("chosen", ())]
    repeated = (
        f"{selected['n']} backbones" if "backbones" in document else f"{selected['n']} batch order(s) of one backbone"
    )
    facts = {
        "store": document["store"],
        start_name(document.get("fingerprint")): accuracies_of(document["baseline"]),
        "selected": f"{_selected(selected)}; mean over {repeated}",
        "its test accuracy": accuracies_of(selected),
        "tuned, best on the choosing split": tuned or None,
        "rows": len(document["results"]),
        "λ": sorted({row["lam"] for row in document["results"] if row.get("lam") is not None}),
        "fitted": f"{timing['heads']} heads in {timing['fit_s']:.2f} s" if timing.get("heads") else None,
        "fingerprint": None if isinstance(document.get("fingerprint"), list) else document.get("fingerprint"),
    }
    return Artefact(path, "rebalancing results", facts, beside(path))


def choice(path: Path) -> Artefact:
    """selection.json: what was chosen, on what, before the test split was read; of an ablation, of each variant."""
    document = read_choice(path)
    if isinstance(document, list):
        selected: Facts = {f"  {variant['name']}": _scored(variant, variant) for variant in document}
    else:
        selected = {"selected": _scored(document["selected"], document)}
    return Artefact(path, "choice before the test split was read", selected, beside(path))


def _selected(head: Facts) -> str:
    return f"{HeadId.from_dict(head)} ({CHOSEN_ON.get(head.get('chosen_on') or '', 'given')})"


def _scored(head: Facts, choice_facts: Facts) -> str:
    score = (
        f"{choice_facts['score']:.1f} ± {choice_facts['standard_error']:.1f} % there" if "score" in choice_facts else ""
    )
    near = (
        f"{len(choice_facts['within_one_se'])} settings within one standard error"
        if choice_facts["within_one_se"]
        else ""
    )
    return "; ".join(filter(None, (_selected(head), score, near)))


def heads(path: Path) -> Artefact:
    if path.name == STAGE1_HEAD:
        return _stage_1_head(path)
    try:
        scorers = read_scorers(path)
    except DataError:
        if path.name == "heads.safetensors":
            raise
        return _hits(path) or checkpoint(path)
    described, weight = [entry for entry, _ in scorers], scorers[0][1].arrays[0]
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
    """Describe a file of hits; None where it is none."""
    from pipeline.results.differences import read_hits

    try:
        hits = read_hits(path)
    except DataError:
        return None
    facts = {"test images": f"{len(hits.labels):,}", "heads": len(hits.heads)}
    return Artefact(path, "which test images each head got right", facts, beside(path))


def ablation(path: Path) -> Artefact:
    """ablation.json: what each variant chose, and its accuracy."""
    document = read_ablation(path)
    most = max(row["n"] for row in document["rows"])
    rows = {f"  {row['name']}": f"{_chosen(row)}: {accuracies_of(row)}" for row in document["rows"]}
    facts = {
        "store": document["store"],
        "network": document["network"],
        "variants": f"{len(rows)}, each chosen for itself; test accuracy, mean over {most} batch order(s)",
        **rows,
        "fitted": f"{document['timing']['heads']} heads in {document['timing']['fit_s']:.2f} s",
        "digest": document["digest"],
        **prefixed(document["fingerprint"]),
    }
    return Artefact(path, "ablation", facts, beside(path))


def tries(path: Path) -> Artefact:
    """tries.json of `train-backbone --try`."""
    document = read_sweep(path)
    selected, seeds = document["selected"], document["seeds"]
    rows = {f"  {row['name']}": accuracies_of(row) for row in document["tries"]}
    facts = {
        "settings": f"{len(rows)}, {len(seeds)} seed(s) each ({', '.join(map(str, seeds))}); validation accuracy",
        **rows,
        "selected": f"{selected['name']}, {'chosen on validation' if selected['chosen_on'] else 'given'}",
        "its checkpoint": selected["checkpoint"],
        "notes": document["notes"] or None,
    }
    return Artefact(path, "settings tried in stage 1", facts, document.get("provenance", {}))


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
        source_facts = json.loads(file.metadata()["facts"])
        sizes = {n: file.get_slice(n).get_shape() for n in file.keys() if n.endswith("_features")}  # noqa: SIM118
    facts = {
        "tables": sorted(p.name for p in path.iterdir() if p.is_dir()),
        "features": ", ".join(
            f"{name.removesuffix('_features')} {n:,} × {width}" for name, (n, width) in sizes.items()
        ),
        "network": source_facts["network"],
        "classes": f"{len(source_facts['class_names']):,}",
        "digest of the store": source_facts["digest"],
    }
    return Artefact(path, "kept of a reproduction", facts, beside(path / "clean.safetensors"))


def bench(path: Path) -> Artefact:
    """A result of `pipeline bench`: each measure against its target."""
    document = read_json(path)
    marks = {True: "met", False: "MISSED", None: "no target"}
    facts: Facts = {
        f"  {m['name']}": f"{m['value']:g} {m['unit']}".strip()
        + (f", target {'≤' if m['at_most'] else '≥'} {m['target']:g}" if m["target"] is not None else "")
        + f" ({marks[m['met']]})"
        for m in document["measures"]
    }
    machine = document["machine"]
    on = {k: machine[k] for k in ("processor", "cpus", "threads", "load") if k in machine}
    return Artefact(
        path, f"bench {document['name']}", {"on": on, **facts, "took": f"{document['seconds']:.0f} s"}, machine
    )


def progress(path: Path) -> Artefact:
    """The folder of `pipeline progress`."""
    lines = (path / "progress.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    runs = list(dict.fromkeys(row[next(iter(row))] for row in rows))
    return Artefact(path, "progress of trainings compared", {"compares": runs, "rows": len(rows)}, {})


def _chosen(row: Facts) -> str:
    return HeadId.of_row(row).name() + (f" (chosen on {row['chosen_on']})" if row.get("chosen_on") else "")
