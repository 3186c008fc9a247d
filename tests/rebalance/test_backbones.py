import pytest

from pipeline.errors import DataError
from pipeline.rebalance.backbones import combine


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
        "results": rows,
        "timing": timing,
    }


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


def test_only_lambdas_that_every_backbone_tried_count():
    first = document({0.1: [50, 50], 0.3: [60, 60]}, {0.1: [1, 1], 0.3: [1, 1]})
    second = document({0.1: [50, 50], 0.2: [70, 70]}, {0.1: [1, 1], 0.2: [1, 1]})
    assert combine([first, second])["selected"]["lam"] == 0.1
    with pytest.raises(DataError, match="no λ in common"):
        combine([document({0.3: [1]}, {0.3: [1]}), document({0.2: [1]}, {0.2: [1]})])
