"""Several backbones of one configuration: one choice of λ for all of them, and what it gives as mean ± std over them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.rebalance.selection import select

MEASURES = ("all", "many", "medium", "few", "ece")
Setting = tuple[str, str | None, float | None]


def combine(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One results document over the backbones' own (each as `rebalance` writes it, batch-order seeds within).

    A setting's score is its mean over batch orders, per backbone; the choice is the setting of the same method with the
    highest mean validation accuracy over backbones; only then are the test scores of the chosen setting averaged.
    Rows carry the mean and NAME_std (sample standard deviation over backbones) with n. DataError where the backbones have no
    λ in common.
    """
    first = documents[0]
    splits = sorted({row["split"] for row in first["results"]}, key=("kfold", "val", "test").index)
    scores = {split: [_by_setting(d["results"], split) for d in documents] for split in splits}
    on = first["selected"]["chosen_on"] or splits[0]
    common = [s for s in scores[on][0] if all(s in of_one for of_one in scores[on])]
    method, loss = first["selected"]["method"], first["selected"]["loss"]
    candidates = sorted((s for s in common if s[:2] == (method, loss) and s[2] != 0), key=lambda s: s[2] or 0)
    if not candidates:
        raise DataError("the backbones have no λ in common; give a list such as --set rebalance.lam=0.05,0.1,0.2")
    searched = len(candidates) > 1
    if searched and on == "test":
        raise DataError("no validation split to choose λ on; give one λ, or set rebalance.select_on=kfold")
    choice = select(np.array([[of_one[s]["all"] for of_one in scores[on]] for s in candidates], np.float64))
    chosen = candidates[choice.index]
    rows = [
        _facts(s) | {"seed": None, "split": split} | _spread([of_one[s] for of_one in scores[split]])
        for split in splits
        for s in common
        if all(s in of_one for of_one in scores[split])
    ]
    tested = [of_one[chosen] for of_one in scores.get("test", []) if chosen in of_one]
    return {
        "store": [d["store"] for d in documents],
        "fingerprint": [d["fingerprint"] for d in documents],
        "backbones": len(documents),
        "baseline": _spread([d["baseline"] for d in documents]),
        "selected": {
            **_facts(chosen),
            "chosen_on": on if searched else None,
            **_spread(tested),
            "n": len(documents),
            "n_of": "backbones",
        },
        "results": rows,
        "timing": {key: sum(d["timing"][key] for d in documents) for key in first["timing"]},
        "within_one_se": [_facts(candidates[i]) for i in choice.within_one_se] if searched else [],
        **{key: first[key] for key in ("network", "settings", "notes") if key in first},
    }


def _by_setting(rows: Sequence[Mapping[str, Any]], split: str) -> dict[Setting, dict[str, float | None]]:
    found: dict[Setting, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            found[row["method"], row["loss"], row["lam"]].append(row)
    return {setting: {m: _mean([r[m] for r in of]) for m in MEASURES} for setting, of in found.items()}


def _facts(setting: Setting) -> dict[str, Any]:
    return dict(zip(("method", "loss", "lam"), setting, strict=True))


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every measure over backbones; None for an empty group."""
    out: dict[str, Any] = {"n": len(rows)}
    for measure in MEASURES:
        values = [r[measure] for r in rows if r[measure] is not None]
        out[measure] = _mean(values)
        out[f"{measure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
