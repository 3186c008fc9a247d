"""The page: right numbers, nothing from a network, nothing unescaped."""

import base64
import html
import json
import re

from pipeline.report import write_report
from pipeline.report.sections import summary
from pipeline.report.study import read_study
from pipeline.results.head_id import HeadId
from tests.small_run import made_run


def text_of(report):
    """What a reader sees of the page, images and style left out."""
    page = re.sub(r"<(style|script).*?</\1>|<img[^>]*>", "", report.path.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_page_is_one_file_with_its_images_inside(run, tmp_path):
    report = write_report(run, out=tmp_path)
    page = report.path.read_text(encoding="utf-8")
    packed = r'base64,[^"]*|(?<=<script type="text/plain" id="plotly">)[^<]*'
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(packed, "", page))
    inside = [base64.b64decode(data) for data in re.findall(r'data:image/png;base64,([^"]+)"', page)]
    assert inside == [path.read_bytes() for path in report.figures]
    assert len(inside) == 8
    assert set(re.findall(r'src="([a-z]+):', page)) == {"data"}


def test_the_table_has_the_measured_numbers_and_says_what_chose(run, tmp_path):
    document = json.loads((run / "rebalance" / "results.json").read_text())
    report = write_report(run, out=tmp_path)
    text, selected = text_of(report), document["selected"]
    assert (
        f"λ = {selected['lam']:g} was chosen on the validation split among 0.05, 0.1, 1, the test split unseen" in text
    )
    assert "not selected on" in text
    assert "2 batch orders of one backbone" in text
    for column in ("all", "many", "medium", "few", "ece"):
        assert report.rows[0][column] == document["baseline"][column]
        assert abs(report.rows[-1][column] - selected[column]) < 1e-9
        assert f"{selected[column]:.1f} ± {selected[f'{column}_std']:.1f}" in text
    names = [row["name"] for row in report.rows]
    assert names == [
        "stage 1",
        "CB loss only",
        "equal norms (λ = 0)",
        f"iwb, λ = {selected['lam']:g} (chosen on validation)",
    ]
    assert json.loads(json.dumps(report.to_dict()))["rows"] == list(report.rows)


def test_what_the_norm_term_adds_is_said_apart(run, tmp_path):
    rows = write_report(run, out=tmp_path).rows
    text = text_of(write_report(run, out=tmp_path))
    said = re.search(r"against CB loss only: (.*?) points", text)[1].replace("−", "-")
    for column, told in (part.split() for part in said.split(", ")):
        assert abs(float(told) - (rows[-1][column] - rows[1][column])) < 0.051
    assert len(said.split(", ")) == 4


def test_differences_stand_in_the_page_with_their_intervals(run, runs, tmp_path):
    for folder, results in ((run, "rebalance/results.json"), (runs, "results.json")):
        found = json.loads((folder / results).read_text())["differences"]
        text = text_of(write_report(folder, out=tmp_path))
        for row in found["rows"]:
            low, high = (f"{row['all'][k]:.1f}".replace("-0.0", "0.0").replace("-", "−") for k in ("low", "high"))
            assert f"[{low}, {high}]" in text
        assert "less stage 1" in text
        assert f"{found['samples']} test samples" in text


def test_names_are_escaped(tmp_path):
    run = made_run(tmp_path / "<i>&run", lam="0.1")
    page = write_report(run).path.read_text(encoding="utf-8")
    assert "<i>" not in page
    assert "<h1>&lt;i&gt;&amp;run</h1>" in page


def test_one_lambda_was_not_chosen(tmp_path):
    assert "λ = 0.3 was given, not chosen" in text_of(write_report(made_run(tmp_path / "run", lam="0.3")))


def test_cross_entropy_is_compared_with_cross_entropy(tmp_path):
    rows = write_report(made_run(tmp_path / "run", loss="ce", lam="0.3")).rows
    assert rows[1]["name"] == "CE loss only"


def test_an_empty_group_has_no_column(tmp_path):
    report = write_report(made_run(tmp_path / "run", counts=(150, 60, 30, 25, 20), lam="0.1"))
    assert "Few (< 20 images)" not in text_of(report)
    assert report.rows[0]["few"] is None


def test_several_backbones_are_named_as_what_was_repeated(runs, tmp_path):
    text = text_of(write_report(runs, out=tmp_path))
    assert "standard deviation over 3 backbones" in text
    assert "chosen by the mean over backbones on the validation split" in text
    assert "batch orders of one backbone" not in text
    near = [f"{s['lam']:g}" for s in json.loads((runs / "results.json").read_text())["within_one_se"]]
    assert ("Within one standard error of the best on the same split: λ = " + ", ".join(near) in text) == (
        len(near) > 1
    )


def test_folds_are_named_as_what_chose(tmp_path):
    text = text_of(write_report(made_run(tmp_path / "run", splits=("test",), select_on="kfold", seeds=(0,))))
    assert "was chosen on held-out folds of the training features" in text


def test_a_further_head_gets_its_own_line(run):
    lines = summary(read_study(run), extra=HeadId("iwb", "cb", 0.05))
    assert lines[-1].name == "iwb, λ = 0.05 (given)"
    assert [line.selected for line in lines] == [False, False, False, True, False]


def test_a_class_without_test_images_is_named_and_counted_in_no_mean(tmp_path):
    run = made_run(tmp_path / "run", absent={"test": range(48, 60)})
    note = "1 class(es) without a test image, left out of balanced test accuracy: eel"
    assert note in json.loads((run / "rebalance" / "results.json").read_text())["notes"]
    (run / "backbone" / "run.json").write_text(json.dumps({"argv": [], "dataset": {"notes": [note]}}))
    text = text_of(write_report(run))
    assert text.count(note) == 1
    assert "Few 1 of 2 classes with test images All 4 of 5 classes with test images" in text
    assert "a group's accuracy being the mean over its classes with test images" in text
    assert "few < 20 images (1 of 2 classes with test images)" in text
    assert "Many 1 class Medium 2 classes" in text
