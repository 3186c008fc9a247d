"""Every sentence of the recommendation, from numbers to words."""

import pytest

from pipeline.results.recommendation import recommendation

HEAD = {"method": "ensemble", "loss": None, "lam": None}
IWB, CB = {"method": "iwb", "loss": "cb", "lam": 0.3}, {"method": "cb", "loss": "cb", "lam": None}


def interval(difference, low, high):
    return {"difference": difference, "low": low, "high": high}


def document(**changes):
    """A results document of the fewest keys, with some of them changed."""
    rows = [
        {"against": "baseline", "all": interval(5.31, 4.6, 5.9), "many": interval(-7.5, -8.5, -6.4)}
        | {"medium": interval(7.5, 6.5, 8.5), "few": interval(17.5, 16.2, 18.8)},
        {"against": "cb", "all": interval(0.3, -0.1, 0.7), "many": None, "medium": None, "few": None},
        {"against": "balanced_logistic_regression", "all": interval(0.6, 0.2, 1.0)},
    ]
    pair = {"first": IWB, "second": CB, "all": interval(0.4, 0.2, 0.7), "few": interval(1.4, 0.9, 2.0)}
    curve = {0.1: 40.2, 0.2: 40.9, 0.3: 40.4}
    base = {
        "fingerprint": {},
        "selected": HEAD | {"chosen_on": "val", "all": 41.62, "few": 21.4},
        "differences": {"rows": rows, "pairs": [pair]},
        "results": [
            {"method": "iwb", "loss": "cb", "lam": lam, "split": "val", "all": value} for lam, value in curve.items()
        ],
        "selection": {"split": "val", "median_per_class": 20.0, "classes_without": [], "standard_error": 1.1},
    }
    return base | changes


def test_the_sentences_of_a_result():
    assert recommendation(document()) == [
        "Take the head “ensemble”: averaged over classes it is right on 41.6 % of the test images, of few-shot classes 21.4 %.",
        "Its difference in points, with 95 % intervals: +5.3 [4.6, 5.9] over stage 1, +0.3 [−0.1, 0.7] over CB loss only, "
        "+0.6 [0.2, 1.0] over balanced logistic regression; it cannot be told from CB loss only.",
        "It pays for that with many-shot classes −7.5 [−8.5, −6.4].",
        "λ makes no difference on these features: from 0.1 to 0.3 the score moves by 0.7 points, less than its standard error "
        "of 1.1.",
        "Beside the class-balanced loss, each at its own best setting, the norm term of IWB adds +0.4 [0.2, 0.7], few-shot "
        "+1.4 [0.9, 2.0].",
    ]


def test_lambda_matters_where_the_curve_moves_by_more_than_its_error():
    selection = {"split": "val", "median_per_class": 20.0, "classes_without": [], "standard_error": 0.5}
    (sentence,) = [s for s in recommendation(document(selection=selection)) if "λ" in s]
    assert sentence == "λ matters on these features: from 0.1 to 0.3 the score moves by 0.7 points, best at 0.2."


@pytest.mark.parametrize(
    ("column", "words"),
    [(interval(0.1, -0.2, 0.4), "adds nothing that can be measured: +0.1"), (interval(-0.6, -0.9, -0.3), "costs −0.6")],
)
def test_the_norm_term_may_add_nothing_or_cost(column, words):
    pair = {"first": IWB, "second": CB, "all": column, "few": None}
    changed = document(differences={"rows": [], "pairs": [pair]})
    assert any(f"the norm term of IWB {words}" in sentence for sentence in recommendation(changed))


def test_few_validation_images_and_classes_without_one_are_told():
    names = [f"class {i}" for i in range(7)]
    selection = {"split": "val", "median_per_class": 6.0, "classes_without": names, "standard_error": 3.04}
    sentences = recommendation(document(selection=selection))
    assert (
        "Validation has 6 images a class (median): scores have a standard error of 3.0 points, and smaller differences cannot "
        "be seen; 12 images a class would be better." in sentences
    )
    assert (
        "7 class(es) have no image to choose on (class 0, class 1, class 2, class 3, class 4 and 2 more): the choice knows "
        "nothing of them." in sentences
    )


@pytest.mark.parametrize("seen", [False, True])
def test_classes_that_are_chosen_on_by_their_training_images_are_named(seen):
    facts = {"median_per_class": 40.0, "classes_without": [], "classes_on_folds": ["a", "b"], "encoder_saw_folds": seen}
    selection = {"split": "val", "standard_error": 1.0} | facts
    optimistic = ", which is optimistic, since the encoder has seen these images" if seen else ""
    assert (
        "2 class(es) have no validation image (a, b): they are scored on their training images, by heads that are fitted "
        f"without these{optimistic}." in recommendation(document(selection=selection))
    )


def test_a_given_head_and_results_of_an_older_version():
    selected = IWB | {"chosen_on": None, "all": 41.0, "few": None}
    given = document(selected=selected, selection={}, differences=None, results=[])
    assert recommendation(given) == [
        "The head “iwb, λ = 0.3”: averaged over classes it is right on 41.0 % of the test images."
    ]
