"""Several backbones of one configuration: one choice of λ for all of them, and what it gives as mean ± std over them."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.rebalance.candidates import REFERENCES
from pipeline.rebalance.selection import AUTO, SELECTED_LAM, border_notes
from pipeline.results.differences import Hits, differences
from pipeline.results.head_id import HeadId
from pipeline.results.mean_std import MEASURES, mean_std, means_and_stds
from pipeline.results.recommendation import recommendation
from pipeline.results.selection import Choice, select


def combine(documents: Sequence[Mapping[str, Any]], hits: Sequence[Hits] = ()) -> dict[str, Any]:
    """Return one results document of several backbones.

    The score of a head is its mean over batch orders, for each backbone; the choice is the candidate of all backbones with
    the highest mean score over them on the split they chose on; only then are the test scores of the selected head averaged.
    Rows have the mean and NAME_std (sample standard deviation over backbones) with n. Where methods were tuned, each
    backbone's tuned setting stands for the method.

    Arguments:
        documents: one of each backbone, as `rebalance` writes it.
        hits: the correct test samples of each backbone, for the differences between rows.
    Raises: DataError: the backbones have no candidate in common.
    """
    tuned = tuned_settings([d.get("chosen", ()) for d in documents])
    documents, hits = under_one_name(documents, hits)
    first = documents[0]
    candidates, choice, chosen_on = choose(documents)
    selected = candidates[choice.index]
    against: dict[str, Any] = {role: setting.to_dict() for role, setting in REFERENCES.items()}
    if chosen_on and choice.runner_up is not None:
        against["runner_up"] = candidates[choice.runner_up].to_dict()
    splits = sorted({row["split"] for row in first["results"]}, key=("kfold", "val", "test").index)
    best = {row["method"]: HeadId.of_row(row).to_dict() for row in tuned}
    pairs = [(best["iwb"], best["cb"])] if {"iwb", "cb"} <= best.keys() else []
    if "logistic-balanced" in best:
        against["balanced_logistic_regression"] = best["logistic-balanced"]
    scores = {split: [_by_setting(d["results"], split) for d in documents] for split in splits}
    rows = [
        s.to_dict()
        | {"seed": None, "split": split, "n": len(documents)}
        | means_and_stds([rows[s] for rows in scores[split]])
        for split in splits
        for s in scores[split][0]
        if all(s in rows for rows in scores[split])
    ]
    tested = [rows_of[selected] for rows_of in scores.get("test", []) if selected in rows_of]
    combined = {
        "store": [d["store"] for d in documents],
        "fingerprint": [d["fingerprint"] for d in documents],
        "backbones": len(documents),
        "baseline": {"n": len(documents)} | means_and_stds([d["baseline"] for d in documents]),
        "selected": {
            **selected.to_dict(),
            "chosen_on": chosen_on,
            **means_and_stds(tested),
            "n": len(documents),
            "n_of": "backbones",
        },
        "candidates": [s.to_dict() for s in candidates],
        "results": rows,
        "timing": {key: sum(d["timing"][key] for d in documents) for key in first["timing"]},
        "within_one_se": [candidates[i].to_dict() for i in choice.within_one_se] if chosen_on else [],
        "differences": differences(selected.to_dict(), against, hits, pairs) if hits else None,
        "selection": first["selection"] | {"standard_error": choice.standard_error} if first.get("selection") else {},
        "chosen": tuned,
        "notes": combined_notes(documents, selected, candidates) if chosen_on else shared_notes(documents),
        **{key: first[key] for key in ("network", "settings") if key in first},
    }
    return combined | {"recommendation": recommendation(combined)}


def combined_notes(documents: Sequence[Mapping[str, Any]], selected: HeadId, candidates: Sequence[HeadId]) -> list[str]:
    """Return the notes of all backbones, and one where the λ selected for all of them lies at the border of its grid."""
    lams = [head.lam for head in candidates]
    border = [] if documents[0].get("chosen") else border_notes(selected.lam, lams, auto=set(AUTO) <= set(lams))
    return shared_notes(documents) + border


def shared_notes(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each note once, with the backbones it is about where it is not about all of them.

    A note on the λ that one backbone selected for itself is left out: another λ may be selected for all of them.
    """
    about: dict[str, list[int]] = defaultdict(list)
    for number, document in enumerate(documents, 1):
        for note in document.get("notes", ()):
            if not note.startswith(SELECTED_LAM):
                about[note].append(number)
    total = len(documents)
    return [
        note if len(numbers) == total else f"backbone {', '.join(map(str, numbers))} of {total}: {note}"
        for note, numbers in about.items()
    ]


def under_one_name(
    documents: Sequence[Mapping[str, Any]], hits: Sequence[Hits]
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Hits]]:
    """Return documents and hits with λ None in the rows of a tuned method whose λ differs between backbones."""
    lams = [{c["method"]: c["lam"] for c in d.get("chosen", ())} for d in documents]
    several = {method for method in lams[0] if len({by_method.get(method) for by_method in lams}) > 1}

    def renamed(rows: Sequence[Mapping[str, Any]], tuned: Mapping[str, float | None]) -> list[dict[str, Any]]:
        is_tuned = [row["method"] in several and row["lam"] == tuned[row["method"]] for row in rows]
        return [dict(row) | ({"lam": None} if flag else {}) for row, flag in zip(rows, is_tuned, strict=True)]

    keys = ("results", "candidates")
    changed = [dict(d) | {k: renamed(d.get(k, ()), lam) for k in keys} for d, lam in zip(documents, lams, strict=True)]
    return changed, [replace(h, heads=renamed(h.heads, lam)) for h, lam in zip(hits, lams, strict=False)]


def tuned_settings(backbones: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the tuned setting of each method: `0.005 | 0.01` where backbones differ, and the mean of the scores."""
    settings = []
    for first in backbones[0]:
        rows = [row for backbone in backbones for row in backbone if row["method"] == first["method"]]
        values = [({} if row["lam"] is None else {"λ": row["lam"]}) | row["parameters"] for row in rows]
        texts = {
            name: column[0] if len(set(column)) == 1 else " | ".join(map(str, column))
            for name in dict.fromkeys(name for point in values for name in point)
            if (column := [point.get(name, "default") for point in values])
        }
        one_lam = len({row["lam"] for row in rows}) == 1
        facts = {"lam": first["lam"] if one_lam else None, "score": mean_std(c["score"] for c in rows).mean}
        border = list(dict.fromkeys(b for c in rows for b in c["border"]))
        parameters = {name: text for name, text in texts.items() if name != "λ" or not one_lam}
        settings.append(dict(first) | facts | {"parameters": parameters, "border": border})
    return settings


def choose(documents: Sequence[Mapping[str, Any]]) -> tuple[list[HeadId], Choice, str | None]:
    """Return the candidates of every backbone, the choice among them and its split, None for a single candidate."""
    lists = [[HeadId.of_row(c) for c in d["candidates"]] for d in documents]
    candidates = [head for head in lists[0] if all(head in heads for heads in lists)]
    if not candidates:
        raise DataError("the backbones have no λ in common; give a list such as --set rebalance.lam=0.05,0.1,0.2")
    if len(candidates) == 1:
        return candidates, Choice(0, math.nan, math.nan, ()), None
    chosen_on = documents[0]["selected"]["chosen_on"]
    scores = [_by_setting(d["results"], chosen_on) for d in documents]
    means = np.array([[by_head[head]["all"] for by_head in scores] for head in candidates], np.float64)
    # all backbones are scored on the same samples, so that their number does not lower this error
    errors = [d.get("selection", {}).get("standard_error", 0.0) for d in documents]
    methods = [head.method for head in candidates]
    choice = select(
        means,
        sampling_error=[float(np.mean(errors))] * len(candidates),
        methods=methods,
        preferred=methods.index("ensemble") if "ensemble" in methods else None,
    )
    return candidates, choice, chosen_on


def _by_setting(rows: Sequence[Mapping[str, Any]], split: str) -> dict[HeadId, dict[str, float | None]]:
    grouped: dict[HeadId, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            grouped[HeadId.of_row(row)].append(row)
    return {setting: {m: mean_std(r[m] for r in group).mean for m in MEASURES} for setting, group in grouped.items()}
