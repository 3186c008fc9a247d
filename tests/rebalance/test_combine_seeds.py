import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.rebalance.combine_seeds import combine, tuned_settings
from pipeline.results.differences import Hits


def row(method, lam, seed, split, value, few=None):
    loss = None if method == "baseline" else "cb"
    scores = {"all": value, "many": value, "medium": None, "few": few, "ece": 5.0}
    return {"method": method, "loss": loss, "lam": lam, "seed": seed, "split": split} | scores


def document(val, test, *, store="a"):
    """val and test: λ → accuracies of two batch orders."""
    rows = [row("iwb", lam, seed, "val", v) for lam, values in val.items() for seed, v in enumerate(values)]
    rows += [
        row("iwb", lam, seed, "test", v, few=v - 10) for lam, values in test.items() for seed, v in enumerate(values)
    ]
    baseline = {"all": 40.0, "many": 60.0, "medium": None, "few": 10.0, "ece": 3.0}
    selected = {"method": "iwb", "loss": "cb", "lam": 0.1, "chosen_on": "val"}
    timing = {"load_s": 1.0, "fit_s": 2.0, "heads": 4}
    return {
        "store": store,
        "fingerprint": store,
        "baseline": baseline,
        "selected": selected,
        "candidates": [{"method": "iwb", "loss": "cb", "lam": lam} for lam in val if lam],
        "results": rows,
        "timing": timing,
    }


def test_backbones_may_tune_different_hyperparameters():
    facts = {"method": "cb", "loss": "cb", "lam": None, "border": [], "trials": 11}
    first = facts | {"score": 40.0, "parameters": {"lr": 0.1, "views": "clean"}}
    second = facts | {"score": 42.0, "parameters": {"lr": 0.1, "weight_decay": 0.03}}
    (joint,) = tuned_settings([[first], [second]])
    assert joint["parameters"] == {"lr": 0.1, "views": "clean | default", "weight_decay": "default | 0.03"}
    assert joint["score"] == 41.0


def test_one_lambda_is_chosen_on_the_mean_validation_over_backbones():
    """By hand: λ .1 has means (50 + 40)/2 = 45 and λ .2 (46 + 46)/2 = 46, though the first backbone alone prefers .1."""
    first = document({0.0: [90, 90], 0.1: [50, 50], 0.2: [45, 47]}, {0.1: [1, 1], 0.2: [50, 52]})
    second = document({0.0: [90, 90], 0.1: [39, 41], 0.2: [46, 46]}, {0.1: [99, 99], 0.2: [54, 56]}, store="b")
    combined = combine([first, second])
    selected = combined["selected"]
    assert (selected["lam"], selected["chosen_on"], selected["n"], selected["n_of"]) == (0.2, "val", 2, "backbones")
    assert selected["all"] == pytest.approx(53)  # (51 + 55) / 2 on the test split
    assert selected["all_std"] == pytest.approx(2 * 2**0.5)  # sample standard deviation of 51 and 55
    assert selected["few"] == pytest.approx(43)
    assert selected["medium"] is None
    assert combined["baseline"]["all"] == 40
    assert combined["baseline"]["all_std"] == 0
    assert combined["timing"] == {"load_s": 2.0, "fit_s": 4.0, "heads": 8}


def test_the_test_split_does_not_move_the_choice():
    val = {0.1: [50, 50], 0.2: [40, 40]}
    for test in ({0.1: [0, 0], 0.2: [99, 99]}, {0.1: [99, 99], 0.2: [0, 0]}):
        assert combine([document(val, test)] * 2)["selected"]["lam"] == 0.1


def test_methods_compete_over_all_backbones_and_differences_are_of_the_same_samples():
    """By hand: cb has the best mean validation, (44 + 46)/2, though the first backbone alone chose iwb."""
    documents = [document({0.1: [a, a]}, {0.1: [50, 50]}) for a in (45, 43)]
    for d, val, test in zip(documents, (44, 46), (60, 62), strict=True):
        d["candidates"].append({"method": "cb", "loss": "cb", "lam": None})
        d["results"] += [row("cb", None, 0, "val", val), row("cb", None, 0, "test", test)]
    heads = [{"method": m, "loss": None if m == "baseline" else "cb", "lam": None} for m in ("baseline", "cb")]
    heads.append({"method": "iwb", "loss": "cb", "lam": 0.1})
    right = np.array([[0, 0, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
    hits = [Hits(heads, right, np.array([0, 0, 1, 1]), np.array([150, 9])) for _ in documents]
    combined = combine(documents, hits)
    assert (combined["selected"]["method"], combined["selected"]["all"]) == ("cb", 61)
    rows = {r["against"]: r for r in combined["differences"]["rows"]}
    assert rows.keys() == {"baseline", "runner_up"}  # cb less cb says nothing
    assert (rows["baseline"]["many"]["difference"], rows["runner_up"]["few"]["difference"]) == (100, 50)
    assert rows["runner_up"]["lam"] == 0.1


def test_one_setting_is_not_chosen():
    selected = combine([document({0.1: [50]}, {0.1: [40]})] * 2)["selected"]
    assert (selected["chosen_on"], selected["all"]) == (None, 40)


def test_only_lambdas_that_every_backbone_tried_count():
    first = document({0.1: [50, 50], 0.3: [60, 60]}, {0.1: [1, 1], 0.3: [1, 1]})
    second = document({0.1: [50, 50], 0.2: [70, 70]}, {0.1: [1, 1], 0.2: [1, 1]})
    assert combine([first, second])["selected"]["lam"] == 0.1
    with pytest.raises(DataError, match="no λ in common"):
        combine([document({0.3: [1]}, {0.3: [1]}), document({0.2: [1]}, {0.2: [1]})])


def test_notes_are_of_all_backbones_and_of_the_lambda_selected_for_all():
    """The first backbone prefers λ 0.5, the largest; all together 0.2, which lies inside the grid."""
    scores = ({0.1: [40, 40], 0.2: [44, 44], 0.5: [45, 45]}, {0.1: [40, 40], 0.2: [46, 46], 0.5: [41, 41]})
    documents = [document(val, {lam: [50, 50] for lam in val}) for val in scores]
    border = "the selected λ, 0.5, is the largest of those given: larger ones may do as well or better, and --lam … tries them"
    documents[0]["notes"] = ["1 class(es) without a test image", border]
    documents[1]["notes"] = ["1 class(es) without a test image", "few rests on 3 test image(s)"]
    combined = combine(documents)
    assert combined["selected"]["lam"] == 0.2
    assert combined["notes"] == ["1 class(es) without a test image", "backbone 2 of 2: few rests on 3 test image(s)"]


def test_a_lambda_selected_for_all_border_notes_of_the_grid_is_noted():
    val = {0.1: [40, 40], 0.2: [44, 44], 0.5: [45, 45]}
    combined = combine([document(val, val)] * 2)
    (note,) = combined["notes"]
    assert note.startswith("the selected λ, 0.5, is the largest of those given")
