"""The rows of reproduction.json: one head each, the accuracy here and the paper's. Pure functions of documents."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.reproduce.paper import GROUPS, Accuracies, Published, variant_accuracies
from pipeline.results.mean_std import mean_std, means_and_stds

Row = dict[str, Any]
METHODS = "methods"  # the table in which every method is tuned for itself
ONE_BACKBONE = "batch orders of one backbone"
ONCE = "one training, nothing repeated"


def row(
    *,
    table: str,
    name: str,
    facts: Mapping[str, Any],
    spread: Mapping[str, Any],
    n: int,
    n_of: str,
    views: str,
    time_s: float,
    command: str,
    selection: Mapping[str, Any],
    paper: Accuracies | None,
    less_cb: Mapping[str, Any] | None = None,
    less_cb_of: str | None = None,
) -> Row:
    """Return one row, accuracies in % as {many, medium, few, all}; its `difference` is ours − paper.

    Arguments:
        facts: config, network, parameters, width and device of the backbone.
        spread: measures and NAME_std.
        selection: the values selected on validation, empty where nothing was.
        less_cb: the difference from the row less_cb_of, which is class-balanced loss alone, with the interval of a paired
            bootstrap over test samples.
    """
    measured = {g: _rounded(spread[g]) for g in GROUPS}
    return {
        "table": table,
        "row": name,
        "command": command,
        **{k: facts[k] for k in ("config", "data", "network", "parameters", "width")},
        "views": views,
        "device": facts["device"],
        "time_s": round(time_s, 1),
        "n": n,
        "n_of": n_of,
        "chosen": dict(selection),
        "ours": measured,
        "ours_std": {g: _rounded(spread[f"{g}_std"]) for g in GROUPS},
        "paper": paper,
        "difference": difference(measured, paper),
        "less_cb": less_cb,
        "less_cb_of": less_cb_of,
    }


def difference(measured: Mapping[str, float | None], paper: Accuracies | None) -> dict[str, float | None] | None:
    """Return measured − paper for each group that both have; None where the paper prints nothing."""
    if paper is None:
        return None
    pairs = {g: (measured[g], paper.get(g)) for g in GROUPS}
    return {g: None if a is None or b is None else _rounded(a - b) for g, (a, b) in pairs.items()}


def method_rows(
    document: Mapping[str, Any],
    facts: Mapping[str, Any],
    published: Published | None,
    *,
    command: str,
    stage_1: Mapping[str, Any],
) -> list[Row]:
    """Return a row for every method of a comparison at the setting selected for it, and for equal norms (iwb at λ = 0).

    Arguments:
        document: of `rebalance --method all`.
        stage_1: command, time_s and device of the training, for its head.
    """
    views = views_of(document["settings"])
    selected = {c["method"]: c for c in document["chosen"]}
    settings = [("baseline", None, None)] + [(c["method"], c["loss"], c["lam"]) for c in selected.values()]
    settings.append(("iwb", document["settings"]["loss"], 0.0))
    rows = []
    for setting in dict.fromkeys(settings):
        method, _, lam = setting
        tested = _tested(document["results"], setting)
        trained = tested[0]["seed"] is not None
        equal = method == "iwb" and lam == 0.0 and selected.get("iwb", {}).get("lam") != 0.0
        baseline = method == "baseline"
        name = "CE (stage 1)" if baseline else "equal norms (λ 0)" if equal else method
        entry = {} if equal or method not in selected else selected[method]
        rows.append(
            row(
                table=METHODS,
                name=name,
                facts={**facts, "device": stage_1["device"]} if baseline else facts,
                spread=means_and_stds(tested),
                n=len(tested),
                n_of=ONE_BACKBONE if trained else ONCE,
                views="clean" if method in ("baseline", "iwb-la") or not trained else views,
                time_s=stage_1["time_s"] if baseline else document["timing"]["total_s"],
                command=stage_1["command"] if baseline else command,
                selection=_selection(entry.get("lam"), entry.get("parameters", {})),
                paper=None if published is None or equal else published.methods.get(method),
            )
        )
    return rows


def ablation_rows(
    table: str,
    document: Mapping[str, Any],
    facts: Mapping[str, Any],
    published: Published | None,
    *,
    command: str,
    curves: bool = False,
) -> list[Row]:
    """Return a row for every variant of an ablation; with curves also one for every λ of a variant that has several."""
    shared: Row = {"table": table, "facts": facts, "command": command}
    shared["time_s"] = document["timing"]["total_s"]
    rows = []
    for variant in document["rows"]:
        trained = any(h["seed"] is not None for h in document["heads"] if h["variant"] == variant["name"])
        views = views_of({**document["settings"], **variant["set"]}) if trained else "clean"
        common: Row = shared | {"views": views, "n_of": ONE_BACKBONE if trained else ONCE}
        rows.append(
            row(
                **common,
                name=variant["name"],
                spread=variant,
                n=variant["n"],
                selection=_selection(variant["lam"], {}) if variant["chosen_on"] else {},
                paper=variant_accuracies(published, variant),
                less_cb=variant["less_alone"],
                less_cb_of=variant.get("against"),
            )
        )
        heads = [h for h in document["heads"] if h["variant"] == variant["name"]]
        settings = dict.fromkeys((h["method"], h["loss"], h["lam"]) for h in heads)
        if not curves or len(settings) < 2:
            continue
        with_cb = variant["loss"] == "cb"
        for setting in sorted(settings, key=lambda s: s[2]):
            tested = _tested(heads, setting)
            paper = published.lams.get(setting[2]) if published and with_cb else None
            name = f"{variant['name']}, λ {setting[2]:g}"
            rows.append(
                row(**common, name=name, spread=means_and_stds(tested), n=len(tested), selection={}, paper=paper)
            )
    return rows


def over_backbones(rows: Sequence[Sequence[Row]], *, command: str) -> list[Row]:
    """Return the rows of several backbones as one: mean and sample standard deviation; each backbone has its own selection.

    Rows that not every backbone has are left out; seconds add up. One backbone's rows stay as they are.
    """
    if len(rows) == 1:
        return list(rows[0])
    backbones = [{(r["table"], r["row"]): r for r in backbone_rows} for backbone_rows in rows]
    combined = []
    for key, template in backbones[0].items():
        if not all(key in backbone for backbone in backbones):
            continue
        repeats = [backbone[key] for backbone in backbones]
        accuracies = {g: mean_std(r["ours"][g] for r in repeats) for g in GROUPS}
        means = {g: _rounded(value.mean) for g, value in accuracies.items()}
        stds = {g: _rounded(value.std) for g, value in accuracies.items()}
        selection = {k: _joined([r["chosen"].get(k) for r in repeats]) for k in template["chosen"]}
        combined.append(
            template
            | {"command": command, "n": len(repeats), "n_of": "backbones", "ours": means, "ours_std": stds}
            | {"time_s": round(math.fsum(r["time_s"] for r in repeats), 1), "chosen": selection}
            | {"difference": difference(means, template["paper"]), "less_cb": _mean_less_cb(repeats)}
        )
    return combined


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return `rows` with every table of a configuration that is in `new` replaced by the new one."""
    tables = {(r["config"], r["table"]) for r in new}
    return [r for r in rows if (r["config"], r["table"]) not in tables] + list(new)


def views_of(settings: Mapping[str, Any]) -> str:
    """Return the views that a head was fitted on."""
    return "clean" if settings["views"] == "clean" else f"{settings['views_stored'] - 1} augmented"


def _tested(rows: Sequence[Mapping[str, Any]], setting: tuple) -> list[Mapping[str, Any]]:
    return [r for r in rows if r["split"] == "test" and (r["method"], r["loss"], r["lam"]) == setting]


def _selection(lam: float | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return ({} if lam is None else {"lam": lam}) | dict(parameters)


def _mean_less_cb(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the mean over backbones, without the interval, which covers sampling of the test images only."""
    if any(r["less_cb"] is None for r in rows):
        return None
    by_group = {g: [r["less_cb"][g] for r in rows] for g in GROUPS}
    return {
        g: None
        if None in v
        else {"difference": float(np.mean([d["difference"] for d in v])), "low": None, "high": None}
        for g, v in by_group.items()
    }


def _joined(values: Sequence[Any]) -> Any:
    return values[0] if len(set(map(str, values))) == 1 else " | ".join(map(str, values))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
