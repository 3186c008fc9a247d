"""Sums of diagnostics.csv against numbers worked out by hand, and what users see of them."""

import csv
import json
import shutil

import numpy as np
import pytest

from pipeline.cli import invoke
from pipeline.errors import DataError
from pipeline.report import write_report
from pipeline.report.progress import compare_progress, draw, halves, of_run, read_progress, trainings
from tests.small_run import COUNTS

HEADER = "epoch,class,images,measured,accuracy,gradient\n"


def made_file(path, *, epochs=3, shift=0.0, counts=COUNTS):
    """Accuracy 10·epoch + shift less 2 a class, gradient (class + 1)/epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{e},{c},{n},{min(n, 20)},{10.0 * e + shift - 2 * c},{(c + 1) / e}\n"
        for e in range(1, epochs + 1)
        for c, n in enumerate(counts)
    ]
    path.write_text(HEADER + "".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("counts", "major"),
    [((500, 500, 10, 10), [1, 1, 0, 0]), ((100, 46, 21, 10), [1, 1, 0, 0]), ((7, 7), [0, 0]), ((9, 1), [1, 0])],
)
def test_major_and_minor_are_the_halves_of_exponential_and_step_sizes(counts, major):
    above, below = halves(np.array(counts))
    assert above.astype(int).tolist() == major
    assert not (above & below).any()
    assert (above | below).all() == (max(counts) > min(counts))


def test_summary_by_hand(tmp_path):
    progress = read_progress(made_file(tmp_path / "diagnostics.csv"), "x")
    assert progress.counts.tolist() == list(COUNTS)
    first = progress.summary[0]  # accuracies 10, 8, 6, 4, 2; gradients 1 … 5; sizes 150 60 30 | 12 5
    assert first["epoch"] == 1
    assert first["mean"] == 6
    assert first["std"] == pytest.approx(8**0.5)
    assert first["range"] == 8
    assert (first["major"], first["minor"], first["gap"]) == (8, 3, 5)
    assert (first["gradient_major"], first["gradient_minor"], first["ratio"]) == (2, 4.5, 2.25)
    assert progress.over_epochs("ratio") == 2.25
    assert progress.over_epochs("gap", last=True) == 5


def test_classes_nobody_could_read_and_equal_classes_leave_gaps(tmp_path):
    path = made_file(tmp_path / "diagnostics.csv", epochs=1, counts=(9, 9))
    assert read_progress(path, "x").summary[0]["ratio"] is None
    path.write_text(HEADER + "1,0,9,0,,\n1,1,9,9,50.0,0.1\n", encoding="utf-8")
    assert read_progress(path, "x").summary[0]["mean"] == 50


def test_a_torn_last_epoch_is_left_out_and_other_files_refused(tmp_path):
    path = made_file(tmp_path / "diagnostics.csv", epochs=2)
    text = path.read_text()
    path.write_text(text[: text.rindex("2,4")] + "2,4,5")
    assert read_progress(path, "x").epochs.tolist() == [1]
    for wrong in ("", HEADER, "a,b\n1,2\n", HEADER + "1,0,x,1,2,3\n"):
        path.write_text(wrong)
        with pytest.raises(DataError, match=r"diagnostics\.csv"):
            read_progress(path, "x")
    with pytest.raises(DataError, match=r"no such file; train with --set backbone\.diagnose_every=1"):
        read_progress(tmp_path / "none.csv", "x")


def test_runs_are_compared_training_by_training(tmp_path):
    for run, shift in (("plain", 0), ("weak", 5)):
        for seed in (0, 1, 10):
            made_file(tmp_path / run / f"seed-{seed}" / "backbone" / "diagnostics.csv", shift=shift * (1 + seed))
    assert [p.name for p in trainings(tmp_path / "weak")] == ["seed-0", "seed-1", "seed-10"]
    with open(tmp_path / "weak" / "seed-1" / "backbone" / "diagnostics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["accuracy"] = float(row["accuracy"]) + (1.5 if row["class"] == "0" else 0)
    path = tmp_path / "weak" / "seed-1" / "backbone" / "diagnostics.csv"
    path.write_text(HEADER + "".join(",".join(str(v) for v in row.values()) + "\n" for row in rows), encoding="utf-8")
    done = compare_progress([tmp_path / "plain", tmp_path / "weak"], out=tmp_path / "out")
    plain, weak = done.rows
    assert (plain["run"], plain["n"], plain["gap"]["mean"], plain["gap"]["std"]) == ("plain", 3, 5, 0)
    assert weak["gap"]["less_first"]["mean"] == pytest.approx(0.5 / 3)  # one of three, class 0 of three major ones
    assert weak["gap"]["less_first"]["std"] == pytest.approx(0.5 / 3**0.5)
    assert "less_first" not in plain["gap"]
    assert weak["last"]["gap"]["less_first"] == weak["gap"]["less_first"]  # the same in every epoch
    with open(tmp_path / "out" / "progress.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * 3 * 3
    assert done.figure.read_bytes().startswith(b"\x89PNG")


def test_the_command_and_its_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_file(tmp_path / "a" / "diagnostics.csv")
    made_file(tmp_path / "b" / "backbone" / "diagnostics.csv", shift=1)
    assert invoke(["progress", "a", "b", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in document["runs"]] == ["a", "b"]
    assert (tmp_path / "progress" / "progress.png").is_file()
    assert invoke(["progress", "b"]) == 0
    assert "‖∂L/∂z‖: minor over major" in capsys.readouterr().out
    assert invoke(["progress", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "less a" in out
    assert "b: 1 training" in out
    (tmp_path / "c").mkdir()
    assert invoke(["progress", "a", "c"]) == 3
    assert "c: no diagnostics.csv in it; train with --set backbone.diagnose_every=1" in capsys.readouterr().err


def test_weakened_runs_are_called_a_reconstruction(tmp_path, capsys):
    for name, strength in (("plain", 0), ("weak", 0.5)):
        made_file(tmp_path / name / "diagnostics.csv")
        weaken = {"strength": strength, "gamma": 1.0, "at": "layers.2"}
        (tmp_path / name / "run.json").write_text(json.dumps({"argv": [], "config": {"backbone": {"weaken": weaken}}}))
    how = "weakening as reconstructed: a = 0.5, γ = 1, at layers.2"
    drawn = draw({name: trainings(tmp_path / name) for name in ("plain", "weak")})
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()][:2] == ["plain", f"weak ({how})"]
    assert "a reconstruction from the abstract" in drawn.caption
    assert "reconstruction" not in draw({"plain": trainings(tmp_path / "plain")}).caption
    assert invoke(["progress", str(tmp_path / "weak"), "--out", str(tmp_path / "out")]) == 0
    assert "a reconstruction from the abstract" in " ".join(capsys.readouterr().out.split())


def test_the_report_of_a_run_shows_it(run, tmp_path):
    assert of_run(run) is None
    run = shutil.copytree(run, tmp_path / "run")
    made_file(run / "backbone" / "diagnostics.csv")
    written = write_report(run)
    assert "progress" in {figure.stem for figure in written.figures}
    assert "Progress of large and small classes" in written.path.read_text(encoding="utf-8")
