"""The summaries of JSON documents: facts by name that stand in a document's header and that `pipeline info` prints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.method_names import start_name
from pipeline.results.head_id import HeadId

Facts = dict[str, Any]
CHOSEN_ON = {"val": "chosen on validation", "kfold": "chosen on held-out folds"}
LISTED = 12  # most classes whose names are all given


def results_summary(document: Facts) -> Facts:
    """Return stage 1, the selected head and the rows of results.json."""
    selected, timing, fingerprint = document["selected"], document.get("timing", {}), document.get("fingerprint")
    tuned = [f"{c['method']}: {c['trials']} trials, {c['score']:.1f} %" for c in document.get("chosen", ())]
    repetitions = "backbones" if "backbones" in document else "batch order(s) of one backbone"
    return {
        start_name(fingerprint): accuracies(document["baseline"]),
        "selected": f"{_selected(selected)}; mean over {selected['n']} {repetitions}",
        "its test accuracy": accuracies(selected),
        "tuned, best on the choosing split": tuned or None,
        "rows": len(document["results"]),
        "λ": sorted({row["lam"] for row in document["results"] if row.get("lam") is not None}),
        "fitted": f"{timing['heads']} heads in {timing['fit_s']:.2f} s"
        if {"heads", "fit_s"} <= timing.keys()
        else None,
        "fingerprint": None if isinstance(fingerprint, list) else fingerprint,
    }


def choice_summary(document: Facts) -> Facts:
    """Return what selection.json says was chosen; of an ablation, for each variant."""
    if "variants" in document:
        return {f"  {variant['name']}": _scored(variant, variant) for variant in document["variants"]}
    return {"selected": _scored(document["selected"], document)}


def ablation_summary(document: Facts) -> Facts:
    """Return what each variant chose, and its accuracy on the test split."""
    most, timing = max(row["n"] for row in document["rows"]), document["timing"]
    return {
        "network": document["network"],
        "variants": f"{len(document['rows'])}, each chosen for itself; test accuracy, mean over {most} batch order(s)",
        **{f"  {row['name']}": f"{_variant_head(row)}: {accuracies(row)}" for row in document["rows"]},
        "fitted": f"{timing['heads']} heads in {timing['fit_s']:.2f} s",
        "digest": document["digest"],
        **prefixed(document["fingerprint"]),
    }


def sweep_summary(document: Facts) -> Facts:
    """Return the validation accuracy of each setting that `train-backbone --try` trained."""
    selected, seeds = document["selected"], document["seeds"]
    return {
        "settings": f"{len(document['tries'])}, {len(seeds)} seed(s) each ({', '.join(map(str, seeds))}); "
        "validation accuracy",
        **{f"  {row['name']}": accuracies(row) for row in document["tries"]},
        "selected": f"{selected['name']}, {'chosen on validation' if selected['chosen_on'] else 'given'}",
        "its checkpoint": selected["checkpoint"],
        "notes": document["notes"] or None,
    }


def bench_summary(document: Facts) -> Facts:
    """Return each measure of `pipeline bench` against its target."""
    marks, machine = {True: "met", False: "MISSED", None: "no target"}, document["machine"]
    measures = {
        f"  {m['name']}": f"{m['value']:g} {m['unit']}".strip()
        + (f", target {'≤' if m['at_most'] else '≥'} {m['target']:g}" if m["target"] is not None else "")
        + f" ({marks[m['met']]})"
        for m in document["measures"]
    }
    machine_facts = {key: machine[key] for key in ("processor", "cpus", "threads", "load") if key in machine}
    return {"on": machine_facts, **measures, "took": f"{document['seconds']:.0f} s"}


def record_summary(document: Facts) -> Facts:
    """Return the seconds of each stage that a run.json records."""
    return {f"{stage} took": f"{entry['seconds']:.1f} s" for stage, entry in document.get("stages", {}).items()}


def export_summary(document: Facts) -> Facts:
    """Return network, head, input and classes of an exported model."""
    return {
        "network": document["architecture"],
        "weights": document["weights"],
        "head": document["head"],
        "input": document["transform"],
        **class_facts(document["class_names"], document["counts"]),
    }


def heads_summary(heads: Sequence[Mapping[str, Any]], classes: int, width: int) -> Facts:
    """Return number, shape, seeds and names of the heads of a heads.safetensors."""
    names = [HeadId.of_row(head).name() for head in heads]
    return {
        "heads": len(heads),
        "weight": f"{len(heads)} × {classes} classes × {width} features, float32",
        "seeds": sorted({head["seed"] for head in heads if head.get("seed") is not None}),
        "kinds": [f"{name}: {count}" if (count := names.count(name)) > 1 else name for name in dict.fromkeys(names)],
    }


SUMMARIES: dict[str, Callable[[Facts], Facts]] = {  # by the kind that stands in the header
    "results": results_summary,
    "choice": choice_summary,
    "ablation": ablation_summary,
    "sweep": sweep_summary,
    "bench": bench_summary,
    "record": record_summary,
    "export": export_summary,
}


def accuracies(row: Mapping[str, Any]) -> str:
    """Return `all 41.0 % (many 58.2, medium 41.1, few 20.7)` with the groups that exist."""
    groups = ", ".join(f"{g} {row[g]:.1f}" for g in ("many", "medium", "few") if row.get(g) is not None)
    overall = "–" if row.get("all") is None else f"{row['all']:.1f}"
    spread = f" ± {row['all_std']:.1f}" if row.get("all_std") is not None else ""
    return f"all {overall}{spread} % ({groups})"


def class_facts(names: Sequence[str], counts: Sequence[int], *, left_out: int = 0) -> Facts:
    """Return names and sizes of the classes.

    Arguments:
        left_out: number of the images that could not be read, nobody knows of which classes.
    """
    listed_names = list(names) if len(names) <= LISTED else [*names[:8], "…", *names[-3:]]
    sizes = " ".join(map(str, counts if len(counts) <= 20 else [*counts[:8], "…", *counts[-4:]]))
    total = sum(counts)
    read = f"{total - left_out:,} of {total:,}, the others could not be read; by class, with them: " if left_out else ""
    classes = f"{len(names):,} ({', '.join(listed_names)})"
    return {"classes": classes, "training images": f"{read}{sizes}" if left_out else f"{total:,} ({sizes})"}


def prefixed(fingerprint: Mapping[str, Any]) -> Facts:
    return {f"fingerprint {key}": value for key, value in fingerprint.items()}


def _selected(head: Facts) -> str:
    return f"{HeadId.from_dict(head)} ({CHOSEN_ON.get(head.get('chosen_on') or '', 'given')})"


def _scored(head: Facts, choice: Facts) -> str:
    score = f"{choice['score']:.1f} ± {choice['standard_error']:.1f} % there" if "score" in choice else ""
    near = f"{len(choice['within_one_se'])} settings within one standard error" if choice["within_one_se"] else ""
    return "; ".join(filter(None, (_selected(head), score, near)))


def _variant_head(row: Facts) -> str:
    return HeadId.of_row(row).name() + (f" (chosen on {row['chosen_on']})" if row.get("chosen_on") else "")
