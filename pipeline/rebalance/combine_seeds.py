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
from pipeline.results.selection import Choice, select


def combine(documents: Sequence[Mapping[str, Any]], hits: Sequence[Hits] = ()) -> dict[str, Any]:
    """One results document over the backbones' own (each as `rebalance` writes it, batch-order seeds within).

    A setting's score is its mean over batch orders, per backbone; the choice is the candidate of all backbones with the
    highest mean score over them on the split they chose on; only then are the test scores of the chosen setting averaged.
    Rows carry the mean and NAME_std (sample standard deviation over backbones) with n. hits: what each backbone got right
    on the test split, for the differences between rows. Where methods were tuned, each backbone's own setting of a method
    stands for it. DataError where the backbones have no candidate in common.
    """
    together = chosen_by_backbones([d.get("chosen", ()) for d in documents])
    documents, hits = under_one_name(documents, hits)
    first = documents[0]
    candidates, choice, on = choose(documents)
    chosen = candidates[choice.index]
    against: dict[str, Any] = {role: setting.to_dict() for role, setting in REFERENCES.items()}
    if on and choice.runner_up is not None:
        against["runner_up"] = candidates[choice.runner_up].to_dict()
    splits = sorted({row["split"] for row in first["results"]}, key=("kfold", "val", "test").index)
    scores = {split: [_by_setting(d["results"], split) for d in documents] for split in splits}
    rows = [
        s.to_dict()
        | {"seed": None, "split": split, "n": len(documents)}
        | means_and_stds([of_one[s] for of_one in scores[split]])
        for split in splits
        for s in scores[split][0]
        if all(s in of_one for of_one in scores[split])
    ]
    tested = [of_one[chosen] for of_one in scores.get("test", []) if chosen in of_one]
    return {
        "store": [d["store"] for d in documents],
        "fingerprint": [d["fingerprint"] for d in documents],
        "backbones": len(documents),
        "baseline": {"n": len(documents)} | means_and_stds([d["baseline"] for d in documents]),
        "selected": {
            **chosen.to_dict(),
            "chosen_on": on,
            **means_and_stds(tested),
            "n": len(documents),
            "n_of": "backbones",
        },
        "candidates": [s.to_dict() for s in candidates],
        "results": rows,
        "timing": {key: sum(d["timing"][key] for d in documents) for key in first["timing"]},
        "within_one_se": [candidates[i].to_dict() for i in choice.within_one_se] if on else [],
        "differences": differences(chosen.to_dict(), against, hits) if hits else None,
        "chosen": together,
        "notes": combined_notes(documents, chosen, candidates) if on else shared_notes(documents),
        **{key: first[key] for key in ("network", "settings") if key in first},
    }


def combined_notes(documents: Sequence[Mapping[str, Any]], chosen: HeadId, candidates: Sequence[HeadId]) -> list[str]:
    """Return the notes of all backbones, and whether the λ chosen for all of them lies at the border of its grid."""
    lams = [head.lam for head in candidates]
    border = [] if documents[0].get("chosen") else border_notes(chosen.lam, lams, auto=set(AUTO) <= set(lams))
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
    whole = len(documents)
    return [
        note if len(numbers) == whole else f"backbone {', '.join(map(str, numbers))} of {whole}: {note}"
        for note, numbers in about.items()
    ]


def under_one_name(
    documents: Sequence[Mapping[str, Any]], hits: Sequence[Hits]
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Hits]]:
    """The same, λ None in the rows that stand for a method whose tuned λ differs between backbones."""
    lams = [{c["method"]: c["lam"] for c in d.get("chosen", ())} for d in documents]
    differing = {method for method in lams[0] if len({of_one.get(method) for of_one in lams}) > 1}

    def renamed(rows: Sequence[Mapping[str, Any]], own: Mapping[str, float | None]) -> list[dict[str, Any]]:
        stand_for = [row["method"] in differing and row["lam"] == own[row["method"]] for row in rows]
        return [dict(row) | ({"lam": None} if it else {}) for row, it in zip(rows, stand_for, strict=True)]

    keys = ("results", "candidates")
    found = [dict(d) | {k: renamed(d.get(k, ()), own) for k in keys} for d, own in zip(documents, lams, strict=True)]
    return found, [replace(h, heads=renamed(h.heads, own)) for h, own in zip(hits, lams, strict=False)]


def chosen_by_backbones(each: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What tuning chose for each method in all backbones: `0.005 | 0.01` where they differ, the mean of the scores."""
    found = []
    for first in each[0]:
        mine = [c for of_one in each for c in of_one if c["method"] == first["method"]]
        own = [({} if c["lam"] is None else {"λ": c["lam"]}) | c["parameters"] for c in mine]
        told = {k: v[0] if len(set(v)) == 1 else " | ".join(map(str, v)) for k in own[0] if (v := [o[k] for o in own])}
        alike = len({c["lam"] for c in mine}) == 1
        facts = {"lam": first["lam"] if alike else None, "score": mean_std(c["score"] for c in mine).mean}
        border = list(dict.fromkeys(b for c in mine for b in c["border"]))
        parameters = {k: v for k, v in told.items() if k != "λ" or not alike}
        found.append(dict(first) | facts | {"parameters": parameters, "border": border})
    return found


def choose(documents: Sequence[Mapping[str, Any]]) -> tuple[list[HeadId], Choice, str | None]:
    """(candidates of every backbone, the choice among them, the split it was made on: None for a single candidate)."""
    each = [[HeadId.of_row(c) for c in d["candidates"]] for d in documents]
    candidates = [s for s in each[0] if all(s in others for others in each)]
    if not candidates:
        raise DataError("the backbones have no λ in common; give a list such as --set rebalance.lam=0.05,0.1,0.2")
    if len(candidates) == 1:
        return candidates, Choice(0, math.nan, math.nan, ()), None
    on = documents[0]["selected"]["chosen_on"]
    scores = [_by_setting(d["results"], on) for d in documents]
    means = np.array([[of_one[s]["all"] for of_one in scores] for s in candidates], np.float64)
    return candidates, select(means, methods=[s.method for s in candidates]), on


def _by_setting(rows: Sequence[Mapping[str, Any]], split: str) -> dict[HeadId, dict[str, float | None]]:
    found: dict[HeadId, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            found[HeadId.of_row(row)].append(row)
    return {setting: {m: mean_std(r[m] for r in of).mean for m in MEASURES} for setting, of in found.items()}
