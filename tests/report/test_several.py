"""Several runs, and ablations, as pages: numbers, charts and what is said where something is missing or wrong."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from pipeline.cli import invoke
from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError, DataError
from pipeline.rebalance import ablate
from pipeline.report import write_report
from pipeline.report.chart import kept_apart
from pipeline.report.compared import compared, draw_compared
from pipeline.report.explorer import places
from pipeline.report.study import read_study
from tests.report.test_html import text_of
from tests.small_run import COUNTS, made_run, made_store

VARIANTS = [
    {"name": "cb", "set": {"method": ["cb"]}},
    {"name": "<b>all & it</b>", "paper": {"few": 35.7}},
    {"name": "no HC", "set": {"hardness": "none"}},
]


def data_of(page, name):
    """The JSON that the page's script reads by name."""
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module")
def ablations(tmp_path_factory):
    run = tmp_path_factory.mktemp("ablations") / "run"
    store = made_store(run / "features.zarr")
    config = RebalanceConfig.model_validate({"lam": "0.1,1", "seeds": (0, 1), "epochs": 1, "variants": VARIANTS})
    ablate(store, config, out=run / "ablations" / "mine")
    return run


def test_runs_are_compared_with_their_own_numbers(run, runs):
    studies = {"one": read_study(run), "three": read_study(runs)}
    html, rows = compared(studies)
    document = json.loads((runs / "results.json").read_text())
    for key, of in (("start", "baseline"), ("selected", "selected")):
        for column in ("many", "medium", "few", "all", "ece"):
            assert rows[1][key][column] == pytest.approx(document[of][column])
    assert [row["repeated"] for row in rows] == ["2 batch orders of one backbone", "3 backbones"]
    assert [row["imbalance_factor"] for row in rows] == [30, 30]
    assert f"{rows[1]['selected']['few']:.1f}<small> ± {rows[1]['selected']['few_std']:.1f}" in html
    assert "The runs share network, class sizes and augmentation" in html


def test_what_runs_differ_in_is_said(run, tmp_path):
    other = made_run(tmp_path / "other", counts=(150, 60, 30, 12, 6), lam="0.1,1")
    html, rows = compared({"one": read_study(run), "other": read_study(other)})
    assert "The runs differ in class sizes" in html
    assert rows[1]["imbalance_factor"] == 25


def test_figures_of_several_runs_show_what_each_measured(run, runs, tmp_path):
    studies = {"one": read_study(run), "three": read_study(runs)}
    drawn = {d.name: d for d in draw_compared(studies)}
    curve = [r for r in drawn["accuracy-lambda"].table if r["run"] == "three"]
    assert [r["lam"] for r in curve] == [0.05, 0.1, 1.0]
    expected = studies["three"].spread(studies["three"].at(0.1), "test", "few")
    assert (curve[1]["few"], curve[1]["few_std"]) == pytest.approx((expected.mean, expected.std), abs=1e-4)
    assert {r["lam"] for r in curve if r["chosen"]} == {studies["three"].first.selected.lam}
    difference = drawn["class-difference"]
    one, three = (np.mean([b.class_accuracy(b.selected, "test") for b in s.backbones], 0) for s in studies.values())
    shown = difference.chart["data"][0]["y"]
    assert shown == pytest.approx((three - one)[studies["one"].by_size].tolist(), abs=1e-4)
    assert [row["three less one"] for row in difference.table] == pytest.approx(shown)
    losses = [r["loss"] for r in drawn["training"].table if r["run"] == "three"]
    assert losses == pytest.approx([2, 1, 0.6667])
    others = {"one": read_study(run), "x": read_study(made_run(tmp_path / "x", names=tuple("abcde"), lam="0.1"))}
    assert "class-difference" not in {d.name for d in draw_compared(others)}


def test_a_run_of_one_given_lambda_is_a_point_there_not_a_line_over_all(run, tmp_path):
    given = made_run(tmp_path / "given", lam="0.1")
    drawn = {d.name: d for d in draw_compared({"one": read_study(run), "given": read_study(given)})}
    lines = [line for line in drawn["accuracy-lambda"].chart["data"] if line["name"] == "given"]
    assert [line["x"] for line in lines] == [[0.1]] * 4
    assert all("λ = 0.1: " in line["text"][0] for line in lines)


def test_several_runs_make_one_page_with_all_their_figures(run, runs, tmp_path):
    report = write_report([run, runs], out=tmp_path)
    text = text_of(report)
    assert [row["run"] for row in report.rows] == ["one", "three"]
    assert report.repeated == "2 batch orders of one backbone; 3 backbones"
    assert text.count("Every head") == 2 * 2  # a link and a heading each
    places_of = {str(f.relative_to(tmp_path)) for f in report.figures}
    assert {
        "figures/class-difference.png",
        "figures/1-one/class-change.png",
        "figures/2-three/training.png",
    } <= places_of
    assert all(f.with_suffix(".csv").is_file() for f in report.figures)
    assert "Numbers: figures/2-three/class-change.csv" in text
    page = report.path.read_text(encoding="utf-8")
    names = re.findall(r'id="?([\w-]+)', page)
    assert len(names) == len(set(names))


def test_the_slider_and_the_charts_have_the_numbers_of_the_csv(run, tmp_path):
    report = write_report(run, out=tmp_path)
    page = report.path.read_text(encoding="utf-8")
    found, document = data_of(page, "explorer-0"), json.loads((run / "rebalance" / "results.json").read_text())
    assert found["lams"] == [0, 0.05, 0.1, 1]
    assert [found["lams"][i] for i in found["chosen"]] == [document["selected"]["lam"]]
    for i, lam in enumerate(found["lams"]):
        for split in ("val", "test"):
            wanted = {"method": "iwb", "lam": lam, "split": split}
            values = [r["few"] for r in document["results"] if wanted.items() <= r.items()]
            assert found["values"][split]["few"]["lams"][i][0] == pytest.approx(np.mean(values), abs=1e-4)
    rows = data_of(page, "classes-0")["rows"]
    assert [row[1] for row in rows] == sorted(COUNTS, reverse=True)
    assert [row[6] for row in rows] == [12] * 5
    assert [row[3:6] for row in rows] == [[r["stage 1"], r["selected"], r["change"]] for r in _changes(run)]
    change = data_of(page, "chart-class-change-0")["data"]
    assert [a if a is not None else b for a, b in zip(change[0]["y"], change[1]["y"], strict=True)] == [
        row[5] for row in rows
    ]


def _changes(run):
    from pipeline.report.figures import class_change

    return class_change(read_study(run)).table


def test_no_name_breaks_out_of_the_data(tmp_path):
    names = ("</script><script>alert(1)</script>", "<!--", "'\"&amp;", "猫", "x" * 200)
    run = made_run(tmp_path / "a<script>b", names=names, lam="0.1")
    page = write_report(run).path.read_text(encoding="utf-8")
    assert page.count("<script>") == 1  # the page's own
    assert "<!--" not in re.sub(r"<!-- /\*\*.*?-->", "", page, flags=re.S)
    assert [row[0] for row in data_of(page, "classes-0")["rows"]] == list(names)


def test_an_ablation_is_a_page_and_a_section_of_its_run(ablations, tmp_path):
    document = json.loads((ablations / "ablations" / "mine" / "ablation.json").read_text())
    for folder in (ablations, ablations / "ablations", ablations / "ablations" / "mine"):
        report = write_report(folder, out=tmp_path / folder.name)
        text = text_of(report)
        assert [row["name"] for row in report.rows] == [row["name"] for row in document["rows"]]
        for row in document["rows"]:
            assert f"{row['name']} " in text
            assert f"{row['few']:.1f} ± {row['few_std']:.1f}" in text
        assert "35.7" in text
        assert [f.name for f in report.figures] == ["ablation-mine.png"]
    run = made_run(tmp_path / "run", lam="0.1")
    shutil.copytree(ablations / "ablations", run / "ablations")
    assert "Ablation mine" in text_of(write_report(run))
    (run / "ablations" / "mine" / "ablation.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match=r"ablation\.json: name: field required"):
        write_report(run)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere"], 3, "nowhere: no such run folder; make one with `pipeline run`"),
        (["empty"], 3, "empty: nothing to report: no rebalance/results.json; run `pipeline rebalance"),
        (["run", "nowhere", "--out", "out"], 3, "nowhere: no such run folder"),
        (["file"], 3, "file: no such run folder"),
        (["run", "--out", "file"], 2, "file: File exists; name a folder you may write to with --out"),
        (["run", "--out", "file/below"], 2, "file/below: Not a directory; name a folder you may write to with --out"),
        (
            ["open"],
            3,
            "open/features.zarr: state is 'open': its dump did not finish; run the same pipeline dump-features",
        ),
    ],
)
def test_what_cannot_be_reported_is_told_in_a_line(run, tmp_path, monkeypatch, capsys, words, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "run").symlink_to(run)
    shutil.copytree(run, tmp_path / "open")
    shutil.rmtree(tmp_path / "open" / "features.zarr")
    made_store(tmp_path / "open" / "features.zarr", seal=False)
    assert invoke(["report", *words]) == code
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written_to_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed")  # root may write anywhere
    with pytest.raises(ConfigError, match="closed: no permission to write there; name another folder with --out"):
        write_report(run, out=tmp_path / "closed")
    assert not any((tmp_path / "closed").iterdir())


def test_places_of_lambda_keep_zero_and_references_apart():
    aside, where = places([0.0, 0.01, 0.1, 1.0], 2)
    assert where[1:] == [-2, -1, 0]
    assert aside[0] < aside[1] < where[0] < where[1]
    assert places([0.2, 0.3], 1)[1] == [0.2, 0.3]
    assert places([0.0, 0.5], 0)[1] == [0.25, 0.5]
    assert kept_apart([0, 1, 2, 50, 99, 100], 0.06) == [0, 3, 5]
    assert kept_apart([3], 0.1) == [0]


def test_where_a_method_without_lambda_was_chosen_no_lambda_is_called_chosen(tmp_path):
    run = made_run(tmp_path / "run", lam="0.1,1", method=["iwb", "tau-norm"], trials=2)
    for place in (run / "rebalance" / "results.json",):
        document = json.loads(place.read_text())
        rival = next(c for c in document["chosen"] if c["method"] == "tau-norm")
        document["selected"] |= {"method": "tau-norm", "loss": rival["loss"], "lam": None}
        place.write_text(json.dumps(document))
    page = write_report(run).path.read_text(encoding="utf-8")
    found = data_of(page, "explorer-0")
    assert found["chosen"] == []
    assert found["choice"] == "tau-norm was chosen on validation, none of these λ."
    stars = [t for t in data_of(page, "chart-accuracy-lambda-0")["data"] if t["name"].startswith("chosen")]
    assert all(t["x"] == [] for t in stars)
