"""What a report is made from: folders, spreads, per-class numbers, and what is said where something is missing."""

import json
import shutil

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.report.study import read_heads, read_study
from pipeline.results.head_id import BASELINE, HeadId
from pipeline.results.mean_std import mean_std, signed
from tests.small_run import COUNTS, made_run


def results(folder):
    return json.loads((folder / "rebalance" / "results.json").read_text())


def values(document, split, lam, column):
    rows = document["results"]
    return [r[column] for r in rows if (r["method"], r["lam"], r["split"]) == ("iwb", lam, split)]


def test_spread_of_one_backbone_is_over_its_batch_orders(run):
    study, expected = read_study(run), values(results(run), "test", 0.1, "few")
    found = study.spread(HeadId("iwb", "cb", 0.1), "test", "few")
    assert len(expected) == 2
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.std == pytest.approx(np.std(expected, ddof=1))
    assert study.repeated == "2 batch orders of one backbone"


def test_spread_of_several_backbones_is_over_their_means_and_not_over_batch_orders(runs):
    study = read_study(runs)
    each = [np.mean(values(results(runs / f"seed-{s}"), "val", 1.0, "all")) for s in (0, 2, 10)]
    found = study.spread(HeadId("iwb", "cb", 1.0), "val", "all")
    assert [b.name for b in study.backbones] == ["seed-0", "seed-2", "seed-10"]
    assert (found.mean, found.std, found.n) == (pytest.approx(np.mean(each)), pytest.approx(np.std(each, ddof=1)), 3)
    assert study.repeated == "3 backbones"


def test_several_backbones_share_the_joint_choice(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "copy")
    document = json.loads((folder / "results.json").read_text())
    document["selected"]["lam"] = 0.05
    (folder / "results.json").write_text(json.dumps(document))
    assert {kind.lam for kind in read_study(folder).selected} == {0.05}
    (folder / "results.json").unlink()
    own = [results(folder / f"seed-{s}")["selected"]["lam"] for s in (0, 2, 10)]
    assert [kind.lam for kind in read_study(folder).selected] == own


def test_lams_are_those_that_every_backbone_has_without_zero(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "copy")
    file = folder / "seed-2" / "rebalance" / "results.json"
    document = json.loads(file.read_text())
    document["results"] = [r for r in document["results"] if r["lam"] != 0.1]
    file.write_text(json.dumps(document))
    assert read_study(runs).lams == [0.05, 0.1, 1.0]
    assert read_study(folder).lams == [0.05, 1.0]
    assert read_study(folder).spread(HeadId("iwb", "cb", 0.1), "val", "all") is None


def test_class_accuracy_measured_from_heads_is_what_rebalancing_wrote(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / "rebalance" / "per_class.csv").unlink()
    written, measured = read_study(run).first, read_study(folder).first
    for kind in (BASELINE, written.loss_only, written.selected):
        np.testing.assert_allclose(written.class_accuracy(kind, "test"), measured.class_accuracy(kind, "test"))
    assert measured.class_accuracy(HeadId("iwb", "cb", 0.77), "test") is None
    table = results(run)["selected"]
    assert written.class_accuracy(written.selected, "test").mean() == pytest.approx(table["all"])


def test_classes_are_sorted_by_size_and_ties_keep_their_order(tmp_path):
    study = read_study(made_run(tmp_path / "run", counts=(12, 60, 12, 150, 5)))
    assert study.by_size.tolist() == [3, 1, 0, 2, 4]


def test_results_folder_alone_is_enough_and_its_store_is_found_where_it_says(tmp_path):
    run = made_run(tmp_path / "run", store=tmp_path / "elsewhere.zarr")
    for folder in (run, run / "rebalance"):
        assert read_study(folder).counts.tolist() == list(COUNTS)


def test_a_line_torn_by_a_kill_is_left_out(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    with open(folder / "backbone" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "lo')
    assert [line["epoch"] for line in read_study(folder).first.metrics] == [1, 2, 3]


def damage(folder, what):
    if what == "store":
        shutil.rmtree(folder / "features.zarr")
    elif what == "json":
        (folder / "rebalance" / "results.json").write_text("{")
    elif what == "keys":
        (folder / "rebalance" / "results.json").write_text('{"store": ""}')
    else:
        shutil.rmtree(folder / "rebalance")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("store", "feature store"),
        ("json", "not a readable"),
        ("keys", "baseline: field required"),
        ("all", "run `pipeline rebalance"),
    ],
)
def test_what_is_missing_is_named(run, tmp_path, what, said):
    folder = shutil.copytree(run, tmp_path / "copy")
    document = results(folder)
    document["store"] = str(folder / "features.zarr")
    (folder / "rebalance" / "results.json").write_text(json.dumps(document))
    damage(folder, what)
    with pytest.raises(DataError, match=said):
        read_study(folder)
    with pytest.raises(DataError, match="no such run folder"):
        read_study(tmp_path / "nowhere")


def test_heads_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_heads(tmp_path / "heads.safetensors")
    (tmp_path / "heads.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(DataError, match="not the heads"):
        read_heads(tmp_path / "heads.safetensors")


def test_numbers_as_people_read_them():
    assert [signed(v) for v in (1.25, -0.31, -0.04, 0.0)] == ["+1.2", "−0.3", "0.0", "0.0"]
    assert str(mean_std([40.0, 42.0])) == "41.0 ± 1.4"
    assert (str(mean_std([None, None])), str(mean_std([3.0]))) == ("–", "3.0")
