"""The recommendation of stage 2 in whole sentences, each a pure function of the numbers in the results document."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.method_names import start_name
from pipeline.results.head_id import HeadId
from pipeline.results.mean_std import difference

Document = Mapping[str, Any]
REFERENCE_NAMES = {
    "cb": "CB loss only",
    "balanced_logistic_regression": "balanced logistic regression",
}
GROUP_NAMES = {"many": "many-shot", "medium": "medium-shot", "few": "few-shot"}
ENOUGH = 20  # validation images of a class


def recommendation(document: Document) -> list[str]:
    """Return sentences on what to take, what it gains, whether λ and the norm term matter, and what validation can tell.

    Arguments:
        document: what `rebalance --json` prints, or the combination of several backbones' documents.
    """
    sentences = [
        selected_sentence(document),
        gain_sentence(document),
        *loss_sentences(document),
        *lam_sentences(document),
        *norm_term_sentences(document),
        *validation_sentences(document),
    ]
    return [sentence for sentence in sentences if sentence]


def selected_sentence(document: Document) -> str:
    """Return which head to take and its test accuracy."""
    selected, start = document["selected"], start_name(document.get("fingerprint"))
    if selected["all"] is None:
        return ""
    few = "" if selected["few"] is None else f", of few-shot classes {selected['few']:.1f} %"
    name = HeadId.of_row(selected).name(start)
    verb = "Take the head" if selected["chosen_on"] else "The head"
    return f"{verb} “{name}”: averaged over classes it is right on {selected['all']:.1f} % of the test images{few}."


def gain_sentence(document: Document) -> str:
    """Return how far the selected head is above the start, CB loss only and balanced logistic regression, with intervals."""
    rows = {row["against"]: row["all"] for row in (document.get("differences") or {"rows": ()})["rows"]}
    names = {"baseline": start_name(document.get("fingerprint"))} | REFERENCE_NAMES
    parts = [f"{difference(rows[role])} over {name}" for role, name in names.items() if rows.get(role)]
    if not parts:
        return ""
    unclear = [name for role, name in names.items() if rows.get(role) and rows[role]["low"] <= 0 <= rows[role]["high"]]
    listed = f"Its difference in points, with 95 % intervals: {', '.join(parts)}"
    return f"{listed}; it cannot be told from {' and '.join(unclear)}." if unclear else f"{listed}."


def lam_sentences(document: Document) -> list[str]:
    """Return whether λ matters: whether the curve of iwb on the selecting split moves by more than a standard error."""
    split, error = document["selected"]["chosen_on"], document.get("selection", {}).get("standard_error")
    curve: dict[float, list[float]] = {}
    for row in document["results"]:
        if row["method"] == "iwb" and row["split"] == split and row["lam"] and row["all"] is not None:
            curve.setdefault(row["lam"], []).append(row["all"])
    if len(curve) < 3 or not error:
        return []
    scores = [sum(of_seeds) / len(of_seeds) for of_seeds in curve.values()]
    span, low, high = max(scores) - min(scores), min(curve), max(curve)
    if span <= error:
        return [
            f"λ makes no difference on these features: from {low:g} to {high:g} the score moves by {span:.1f} points, less than "
            f"its standard error of {error:.1f}."
        ]
    best = max(curve, key=lambda lam: sum(curve[lam]) / len(curve[lam]))
    return [
        f"λ matters on these features: from {low:g} to {high:g} the score moves by {span:.1f} points, best at {best:g}."
    ]


def norm_term_sentences(document: Document) -> list[str]:
    """Return whether the norm term adds to its loss, each at its own best setting."""
    pairs = (document.get("differences") or {}).get("pairs", ())
    for pair in pairs:
        first, second = HeadId.of_row(pair["first"]), HeadId.of_row(pair["second"])
        if (first.method, second.method) == ("iwb", "cb") and pair["all"]:
            low, high = pair["all"]["low"], pair["all"]["high"]
            verdict = "adds" if low > 0 else "costs" if high < 0 else "adds nothing that can be measured:"
            few = f", few-shot {difference(pair['few'])}" if pair.get("few") else ""
            return [
                f"Beside the class-balanced loss, each at its own best setting, the norm term of IWB {verdict} "
                f"{difference(pair['all'])}{few}."
            ]
    return []


def loss_sentences(document: Document) -> list[str]:
    """Return which groups of classes the selected head is worse on than the head it starts from."""
    rows = (document.get("differences") or {"rows": ()})["rows"]
    against = next((row for row in rows if row["against"] == "baseline"), None)
    lost = [
        f"{name} classes {difference(against[group])}"
        for group, name in GROUP_NAMES.items()
        if against and against[group] and against[group]["high"] < 0
    ]
    return [f"It pays for that with {' and '.join(lost)}."] if lost else []


def validation_sentences(document: Document) -> list[str]:
    """Return what the samples that were chosen on can and cannot tell."""
    facts = document.get("selection") or {}
    if "median_per_class" not in facts:
        return []
    sentences = []
    per_class, error = facts["median_per_class"], facts["standard_error"]
    if facts["split"] == "val" and per_class < ENOUGH and math.isfinite(error):
        sentences.append(
            f"Validation has {per_class:g} images a class (median): scores have a standard error of {error:.1f} points, and "
            f"smaller differences cannot be seen; {2 * per_class:g} images a class would be better."
        )
    if on_folds := facts.get("classes_on_folds"):
        optimistic = (
            ", which is optimistic, since the encoder has seen these images" if facts["encoder_saw_folds"] else ""
        )
        sentences.append(
            f"{len(on_folds)} class(es) have no validation image ({listed(on_folds)}): they are scored on their training "
            f"images, by heads that are fitted without these{optimistic}."
        )
    if without := facts["classes_without"]:
        sentences.append(
            f"{len(without)} class(es) have no image to choose on ({listed(without)}): the choice knows nothing of them."
        )
    return sentences


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
