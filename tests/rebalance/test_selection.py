"""λ as typed, and the choice among settings."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.rebalance.candidates import count_lam, parse_lam
from pipeline.rebalance.folds import stratified_folds
from pipeline.rebalance.selection import AUTO, border_notes, refine
from pipeline.results.selection import select


@pytest.mark.parametrize(
    ("text", "lams"),
    [
        ("0.05", (0.05,)),
        (" 0.1,0.05, 0.1", (0.05, 0.1)),
        ("0", (0.0,)),
        ("1e-2,1", (0.01, 1.0)),
        ("0.01:1:log:3", (0.01, 0.1, 1.0)),
        ("0.1:0.5:lin:5", (0.1, 0.2, 0.3, 0.4, 0.5)),
        ("0:1:lin:3,0.25", (0.0, 0.25, 0.5, 1.0)),
        ("auto", None),
    ],
)
def test_lambdas_as_typed(text, lams):
    assert parse_lam(text) == lams


def test_a_grid_of_32():
    grid = parse_lam("0.01:0.5:log:32")
    assert len(grid) == 32
    assert (grid[0], grid[-1]) == (0.01, 0.5)
    assert parse_lam(",".join(map(str, grid))) == grid


@pytest.mark.parametrize("text", ["0.05", "0.1,0.05", "0:1:lin:11", "0.01:0.5:log:32,0.7", "0.3:0.4:lin:2"])
def test_lambdas_are_counted_without_being_made(text):
    assert count_lam(text) == len(parse_lam(text))


def test_counting_needs_no_memory():
    assert count_lam("0:1:lin:100000000000000") == 10**14


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1.5", "1.5"),
        ("-0.1", "-0.1"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("", "nothing"),
        ("0.1,,0.2", "nothing"),
        ("abc", "abc"),
        ("0:0.5:log:4", "0:0.5:log:4"),
        ("0.5:0.1:lin:4", "0.5:0.1:lin:4"),
        ("0.1:0.5:lin:1", "0.1:0.5:lin:1"),
        ("0.1:0.5:cubic:4", "0.1:0.5:cubic:4"),
        ("0.1:0.5:log", "0.1:0.5:log"),
        ("0.1:2:log:4", "2"),
        ("Auto", "Auto"),
    ],
)
def test_what_is_no_lambda_is_named_with_the_valid_forms(text, named):
    with pytest.raises(ConfigError, match=r"\[0, 1\].*0\.01:0\.5:log:32") as error:
        parse_lam(text)
    assert named in str(error.value)


@pytest.mark.parametrize("best", AUTO)
def test_refining_a_clear_best_stays_between_its_neighbours_and_adds_only_new_lambdas(best):
    fine = refine(AUTO, [best])
    at = AUTO.index(best)
    low, high = AUTO[max(at - 1, 0)], AUTO[min(at + 1, len(AUTO) - 1)]
    assert len(fine) == 7
    assert all(low < lam < high for lam in fine)
    assert not set(fine) & set(AUTO)


def test_refining_what_cannot_be_told_apart_spreads_over_all_of_it():
    """Every factor between neighbours is at most 2 where the coarse grid has 2.5, instead of seven λ around one of them."""
    every = sorted({*AUTO, *refine(AUTO, AUTO)})
    assert max(b / a for a, b in pairwise(every)) < 1.75
    between = refine(AUTO, [0.05, 0.1, 0.2])
    assert (min(between), max(between)) == (0.025, 0.24)


def test_the_highest_mean_is_chosen_and_the_first_among_equals():
    assert select(np.array([[50.0, 40.0], [46.0, 46.0], [45.0, 47.0]])).index == 1
    assert select(np.array([[40.0], [41.0], [39.0]])).index == 1


def test_one_standard_error_by_hand():
    choice = select(np.array([[40.0, 44.0], [41.9, 42.3], [39.0, 41.0], [38.0, 41.9]]))  # means 42, 42.1, 40, 39.95
    assert choice.index == 1
    assert choice.score == pytest.approx(42.1)
    assert choice.standard_error == pytest.approx(0.2)  # std .2828 over √2
    assert choice.within_one_se == (0, 1)
    wider = select(np.array([[42.0], [45.0], [41.0]]), sampling_error=[9.0, 3.0, 9.0])
    assert (wider.standard_error, wider.within_one_se) == (3.0, (0, 1))
    both = select(np.array([[40.0, 44.0], [42.0, 46.0]]), sampling_error=[0.0, 1.5])
    assert both.standard_error == pytest.approx(2.5)  # 2 over orders, 1.5 over samples


def test_the_runner_up_is_of_another_method_where_there_is_one():
    scores = np.array([[50.0], [49.0], [40.0], [41.0]])
    assert select(scores).runner_up == 1
    assert select(scores, methods=["iwb", "iwb", "cb", "ce"]).runner_up == 3
    assert select(scores, methods=["iwb"] * 4).runner_up == 1
    assert select(scores[:1]).runner_up is None


def test_no_test_split_can_be_given():
    assert list(inspect.signature(select).parameters) == ["val_scores", "sampling_error", "methods", "preferred"]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(2, 5))
def test_folds_are_stratified_and_hold_out_no_single_sample(labels, folds):
    labels = np.array(labels)
    fold = stratified_folds(labels, folds=folds)
    for c in np.unique(labels):
        mine = fold[labels == c]
        sizes = np.bincount(mine[mine >= 0], minlength=folds)
        if len(mine) == 1:
            assert mine[0] == -1
        else:
            assert sizes.sum() == len(mine)
            assert sizes.max() - sizes.min() <= 1
            assert len(mine) > sizes.max(), "every fold leaves the class something to fit on"
    assert (fold == stratified_folds(labels, folds=folds)).all()


@pytest.mark.parametrize(
    ("lam", "told"), [(0.05, "smallest"), (0.4, "largest"), (0.1, None), (1.0, None), (None, None), (0.0, None)]
)
def test_a_selected_lam_border_notes_of_the_sweep_is_told(lam, told):
    notes = border_notes(lam, [None, 0.0, 0.05, 0.1, 0.4, *([1.0] if lam == 1 else [])])
    assert [told in note for note in notes] == [True] * (told is not None)
    assert border_notes(0.05, [0.05]) == []


@pytest.mark.parametrize(
    ("lam", "auto", "said", "others"),
    [
        (0.01, True, "the smallest that auto tries: smaller ones", "0.001:0.02:log:8"),
        (0.01, False, "the smallest of those given: smaller ones", "0.001:0.02:log:8"),
        (0.2, False, "the largest of those given: larger ones", "0.1:1:log:8"),
    ],
)
def test_what_is_told_border_notes_names_lams_beyond_it(lam, auto, said, others):
    (note,) = border_notes(lam, [None, 0.0, 0.01, 0.02, 0.1, 0.2], auto=auto)
    assert said in note
    assert f"--lam {others} tries them" in note
    tried = parse_lam(others)
    assert tried[0] < lam < tried[-1]
