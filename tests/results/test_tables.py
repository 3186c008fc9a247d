"""Heads, means and tables print the same everywhere."""

import csv
import io

import pytest

from pipeline.results.files import csv_text
from pipeline.results.head_id import HeadId
from pipeline.results.mean_std import MeanStd, mean_std, means_and_stds, over_rows
from pipeline.results.table import Column, Line, Table


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (HeadId("baseline"), "linear probe"),
        (HeadId("cb", "cb"), "CB loss only"),
        (HeadId("iwb", "cb", 0.15), "iwb, λ = 0.15"),
        (HeadId("iwb", "ce", 0.15), "iwb with CE loss, λ = 0.15"),
        (HeadId("iwb", "cb", 0.0), "equal norms (λ = 0)"),
        (HeadId("iwb-la", "la", 0.6, 0.02, (("means", 0.25),)), "iwb-la, λ = 0.6"),
        (HeadId("tau-norm", values=(("tau", 0.7),)), "tau-norm"),
    ],
)
def test_a_head_has_one_name_and_comes_back_from_its_keys(head, name):
    assert head.name("linear probe") == name
    assert HeadId.from_dict(head.to_dict() | {"parameters": head.parameters}) == head
    assert head.matches(head.to_dict() | {"seed": 3, "split": "test"})


def test_a_head_of_format_0_1_gets_its_name_of_today():
    assert HeadId.of_row({"method": "best", "loss": "la", "lam": 0.6}).method == "iwb-la"
    assert str(HeadId("iwb", "cb", 0.1, 0.005, seed=2)) == "iwb, λ = 0.1, lr = 0.005, seed = 2"


def test_mean_and_sample_deviation():
    """By hand: 40 and 42 have mean 41 and deviation √2."""
    assert mean_std([40.0, None, 42.0]) == MeanStd(41.0, pytest.approx(2**0.5), 2)
    assert means_and_stds([{"all": 40.0}, {"all": 42.0}], ["all"]) == {"all": 41.0, "all_std": pytest.approx(2**0.5)}
    assert str(over_rows([{"all": 41.2, "all_std": 0.3}], "all")) == "41.2 ± 0.3"
    assert (str(MeanStd(None)), MeanStd(-0.25, 0.1).text(2)) == ("–", "−0.25 ± 0.10")


def test_a_table_is_the_same_in_every_form():
    table = Table([Column("head"), Column("All", "5 classes")], [Line(["a|<b>", MeanStd(41.2, 0.3)], strong=True)])
    assert table.markdown() == "| head | All |\n|---|---|\n| a\\|<b> | 41.2 ± 0.3 |"
    assert "<th>All<small>5 classes</small></th>" in table.html()
    assert "<tr class=chosen><th>a|&lt;b&gt;</th><td>41.2<small> ± 0.3</small></td></tr>" in table.html()
    assert table.csv() == "head,All\na|<b>,41.2 ± 0.3\n"
    assert "41.2 ± 0.3" in str(table)


@pytest.mark.parametrize("cell", ["a\rb", "a\nb", 'a"b', "a,b", " a "])
def test_every_text_comes_back_from_a_csv_file(cell):
    text = csv_text([{"name": cell, "n": None}, {"name": "x", "more": 1.5}])
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["name"] for row in rows] == [cell, "x"]
    assert (rows[0]["n"], rows[1]["more"]) == ("", "1.5")
