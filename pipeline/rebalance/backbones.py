"""Several backbones of one configuration: one choice of λ for all of them, and what it gives as mean ± std over them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import DataError

MEASURES = ("all", "many", "medium", "few", "ece")
Setting = tuple[str, str | None, float | None]


def combine(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One results document over the backbones' own (each as `rebalance` writes it, batch-order seeds within).

    A setting's score is its mean over batch orders, per backbone; the choice is the setting of the same method with the
    highest mean validation accuracy over backbones; only then are the test scores of the chosen setting averaged.
    Rows carry the mean and NAME_std (sample standard deviation over backbones) with n. DataError where the backbones have no
    λ in common.
    """
    scores = {split: [_by_setting(d["results"], split) for d in documents] for split in ("val", "test")}
    method, loss = documents[0]["selected"]["method"], documents[0]["selected"]["loss"]
    common = [s for s in scores["val"][0] if all(s in of_one for of_one in scores["val"])]
    candidates = [s for s in common if s[:2] == (method, loss) and (s[2] is None or s[2] > 0)]
    if not candidates:
        raise DataError("the backbones have no λ in common; give a list such as --set rebalance.lam=0.05,0.1,0.2")
    chosen = choose({s: [of_one[s]["all"] for of_one in scores["val"]] for s in candidates})
    searched = any(d["selected"]["chosen_on"] for d in documents) or len(candidates) > 1
    rows = [
        {
            "method": s[0],
            "loss": s[1],
            "lam": s[2],
            "seed": None,
            "split": split,
            **_spread([o[s] for o in scores[split]]),
        }
        for split in ("val", "test")
        for s in common
        if all(s in of_one for of_one in scores[split])
    ]
    tested = [o.get(chosen) for o in scores["test"]]
    first = documents[0]
    return {
        "store": [d["store"] for d in documents],
        "fingerprint": [d["fingerprint"] for d in documents],
        "backbones": len(documents),
        "baseline": _spread([d["baseline"] for d in documents]),
        "selected": {
            "method": chosen[0],
            "loss": chosen[1],
            "lam": chosen[2],
            "chosen_on": first["selected"]["chosen_on"] or "val" if searched else None,
            **_spread([t for t in tested if t is not None]),
            "n": len(documents),
            "n_of": "backbones",
        },
        "results": rows,
        "timing": {key: sum(d["timing"][key] for d in documents) for key in first["timing"]},
        **{key: first[key] for key in ("network",) if key in first},
    }


def choose(validation: Mapping[Setting, Sequence[float | None]]) -> Setting:
    """The setting with the highest mean validation score over backbones; the smallest λ among equals."""
    return max(validation, key=lambda s: (np.mean([v for v in validation[s] if v is not None]), -(s[2] or 0)))


def _by_setting(rows: Sequence[Mapping[str, Any]], split: str) -> dict[Setting, dict[str, float | None]]:
    found: dict[Setting, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            found[row["method"], row["loss"], row["lam"]].append(row)
    return {setting: {m: _mean([r[m] for r in of]) for m in MEASURES} for setting, of in found.items()}


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
