"""Predictions on image files are those of encoder and head on the same pixels."""

import csv
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from cache import open_cache
from pipeline.cli import invoke
from pipeline.data import load_dataset
from pipeline.deploy.export import export_model
from pipeline.deploy.inference_model import load_model
from pipeline.deploy.predict import find_images, label, predict
from pipeline.deploy.prediction import ChangedAnswers, Guess, Prediction, csv_lines, json_lines, table_lines
from pipeline.errors import ConfigError, DataError
from pipeline.report.study import read_heads
from pipeline.results.documents import read_results
from tests.conftest import digits_tree
from tests.small_run import digits_run


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    copy = tmp_path_factory.mktemp("predict") / "run"
    shutil.copytree(tiny_backbone.parent, copy / "backbone")
    return digits_run(copy / "backbone" / "last.pt")


@pytest.fixture(scope="module")
def model(run):
    return export_model(run, out=run.parent / "model").out


@pytest.fixture(scope="module")
def folder(run):
    """The first forty test digits as files, a text that calls itself an image, and one in a folder below."""
    from pipeline.config import make_config

    images = load_dataset(make_config(digits_tree(), "tiny").data).test.images
    folder = run.parent / "images"
    (folder / "below").mkdir(parents=True)
    for i in range(40):
        Image.fromarray(images[i]).save(folder / f"{i:02}.png")
    Image.fromarray(images[40]).save(folder / "below" / "40.PNG")
    (folder / "13a.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_predictions_are_those_of_the_selected_head_on_the_test_features(run, model, folder):
    store, lam = open_cache(run / "features.zarr"), read_results(run / "rebalance" / "results.json")["selected"]["lam"]
    facts, weight, bias = read_heads(run / "rebalance" / "heads.safetensors")
    i = next(i for i, f in enumerate(facts) if (f["method"], f["lam"], f["seed"]) == ("iwb", lam, 0))
    features = store.read("test")[:40].astype(np.float32)
    heads = {"guesses": (weight[i], bias[i]), "stage1": store.classifier}
    for source in (model, run):
        rows = list(predict(source, [str(folder / "[0-9][0-9].png")], top_k=2, batch_size=7, compare=True))
        assert [r.path for r in rows] == [str(folder / f"{k:02}.png") for k in range(40)]
        for name, (w, b) in heads.items():
            expected = softmax(features @ w.T + b)
            found = [getattr(row, name) for row in rows]
            assert [g[0].name for g in found] == [str(c) for c in expected.argmax(1)]
            assert [g[0].probability for g in found] == pytest.approx(expected.max(1), abs=2e-3)  # float16 features
            assert all(g[0].probability >= g[1].probability for g in found)


def test_batch_size_and_company_change_nothing(model, folder):
    alone = [next(iter(predict(model, [folder / f"{i:02}.png"]))) for i in range(5)]
    together = list(predict(model, [folder / f"{i:02}.png" for i in range(5)], batch_size=3))
    assert [a.guesses[0].name for a in alone] == [t.guesses[0].name for t in together]
    assert [a.guesses[0].probability for a in alone] == pytest.approx(
        [t.guesses[0].probability for t in together], abs=1e-6
    )


def test_unreadable_files_are_named_and_skipped(model, folder):
    found = predict(model, [folder], batch_size=8)
    rows, reasons = {row.path: row for row in found}, found.skipped
    assert len(rows) == 41
    for name in ("13.png", "14.png", "15.png"):  # read in one batch with the file that cannot be read
        (alone,) = predict(model, [folder / name])
        assert rows[alone.path].guesses[0].name == alone.guesses[0].name
        assert rows[alone.path].guesses[0].probability == pytest.approx(alone.guesses[0].probability, abs=1e-5)
    assert len(reasons) == 1
    assert "13a.jpg: unreadable image" in reasons[0]


def test_nothing_readable_is_an_error(model, folder, tmp_path):
    with pytest.raises(DataError, match="none of 1 image could be read"):
        list(predict(model, [folder / "13a.jpg"]))
    for given, said in (
        ([], "no image was given"),
        ([tmp_path], "no image in this folder"),
        (["x*.png"], "no such file"),
    ):
        with pytest.raises(DataError, match=said):
            list(predict(model, given))
    for wrong in ({"top_k": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="1 or more"):
            list(predict(model, [folder], **wrong))


def test_images_are_found_once_in_the_order_given(folder):
    given = [folder / "05.png", str(folder / "0[4-6].png"), folder / "below"]
    assert [p.name for p in find_images(given)] == ["05.png", "04.png", "06.png", "40.PNG"]


def test_more_classes_than_there_are_is_all_of_them(model, folder):
    (row,) = predict(model, [folder / "00.png"], top_k=50)
    assert len(row.guesses) == 10
    assert sum(g.probability for g in row.guesses) == pytest.approx(1, abs=1e-5)


def test_rows_as_csv_and_json_lines(model, folder):
    rows = list(predict(model, [folder / "00.png", folder / "01.png"], top_k=2, compare=True))
    read = list(csv.DictReader(csv_lines(rows)))
    assert [r["class_1"] for r in read] == [r.guesses[0].name for r in rows]
    assert [float(r["stage1_probability_2"]) for r in read] == pytest.approx(
        [r.stage1[1].probability for r in rows], abs=1e-6
    )
    assert [r["changed"] for r in read] == [str(int(r.changed)) for r in rows]
    documents = [json.loads(line) for line in json_lines(rows)]
    assert documents[1]["top"][0] == {"name": rows[1].guesses[0].name, "probability": rows[1].guesses[0].probability}
    assert documents[1]["changed"] == rows[1].changed


def said(path, *names, before=None):
    """A made prediction."""
    guesses = [tuple(Guess(name, 0.9 / 10**i) for i, name in enumerate(of)) for of in (names, before or ())]
    return Prediction(path, guesses[0], guesses[1] or None)


def test_a_table_keeps_to_its_width_and_tells_the_common_folder_once():
    rows = [
        said("photos/far/below/one.png", "horse", "cat", before=("cat", "horse")),
        said(f"photos/far/{'long' * 12}.png", "海豚", before=("海豚",)),
    ]
    for width in (60, 80, 120):
        lines = list(table_lines(rows, [row.path for row in rows], width=width))
        assert max(map(cell_len, lines)) <= width
        assert lines[0] == "2 images below photos/far/"
        assert [i for i, line in enumerate(lines) if line.endswith("◀")] == [3]
        told = "".join(line[: line.index("  ")] if "  " in line else line for line in lines[4:])
        assert f"{'long' * 12}.png" in told
        starts = {
            cell_len(line[: line.index(name)]) for line in lines for name in ("rebalanced", "海豚") if name in line
        }
        assert len(starts) == 1  # wide letters move no column
    alone = list(table_lines(rows[:1], [rows[0].path], width=80))
    assert alone[1].startswith("photos/far/below/one.png  horse 90.0%, ")


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["a/b/1.png", "a/b/2.png"], "a/b/"),
        (["a/b/1.png", "a/c/2.png"], "a/"),
        (["/a/1.png", "/b/2.png"], "/"),
        (["/a/1.png", "b/2.png"], ""),
        (["1.png", "a/2.png"], ""),
        (["a/1.png"], ""),
        (["ab/1.png", "ac/2.png"], ""),
    ],
)
def test_the_common_folder_is_one(paths, folder):
    rows = [said(path, "cat") for path in paths]
    lines = list(table_lines(rows, paths, width=100))
    assert lines[0].endswith(f" below {folder}") if folder else lines[0].split() == ["image", "most", "probable"]
    assert [line.split()[0] for line in lines[-len(paths) :]] == [path[len(folder) :] for path in paths]


def test_a_comparison_counts_changes_from_group_to_group():
    groups = {"cat": "many", "dog": "many", "horse": "medium", "newt": "few"}
    compared = ChangedAnswers(groups)
    for first, before in (("newt", "cat"), ("newt", "dog"), ("horse", "newt"), ("cat", "cat")):
        compared.add(said("x.png", first, before=(before,)))
    assert compared.to_dict() == {
        "images": 4,
        "changed": 3,
        "from": {"many": 2, "medium": 0, "few": 1},
        "to": {"many": 0, "medium": 1, "few": 2},
    }
    assert str(compared) == (
        "rebalancing changed the first answer of 3 of 4 images, from classes with many (2), few (1) to classes with "
        "medium (1), few (2) training images"
    )
    assert str(ChangedAnswers(groups, images=1)) == "rebalancing changed the first answer of 0 of 1 image"


def test_results_print_as_a_table_with_what_changed_and_what_was_left_out(model, folder):
    found = predict(load_model(model), [folder / "below", folder / "01.png", folder / "13a.jpg"], compare=True)
    lines = str(found).splitlines()
    assert lines[0] == f"2 images below {folder}/"
    assert [line.split()[0] for line in lines[3:5]] == ["below/40.PNG", "01.png"]
    assert lines[5].startswith(f"rebalancing changed the first answer of {found.compared.changed} of 2 images")
    assert lines[6].startswith(f"left out: {folder / '13a.jpg'}: unreadable image")
    assert found.to_dict()["compared"]["images"] == len(found) == 2


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("a/1.png", "a/b/2.png", "elsewhere/3.png", "a/.hidden.png"):
        (tmp_path / place).write_bytes(b"")
    (tmp_path / "a" / "b" / "up").symlink_to("../..")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    assert sorted({p.name for p in find_images([tmp_path / "a"])}) == ["1.png", "2.png", "3.png"]
    assert len(find_images([tmp_path / "a"])) == 3
    assert len(find_images([tmp_path / "a" / "1.png", str(tmp_path / "a" / ".." / "a" / "1.png")])) == 1


def lines_of(capsys, *words, code=0):
    assert invoke(["predict", *map(str, words)]) == code
    out, err = capsys.readouterr()
    return out, err


def test_the_command_prints_one_document_or_rows_and_says_on_stderr_what_it_left_out(model, folder, capsys):
    out, err = lines_of(capsys, model, folder, "--json", "--compare")
    document = json.loads(out)
    assert len(document["predictions"]) == document["compared"]["images"] == 41
    assert ["13a.jpg" in reason for reason in document["skipped"]] == [True]
    changed = sum(row["changed"] for row in document["predictions"])
    out, err = lines_of(capsys, model, folder, "--compare")
    assert out.startswith(f"42 images below {folder}/\n\nimage")
    assert out.count("◀\n") == changed
    assert f"rebalancing changed the first answer of {changed} of 41 images" in out.splitlines()[-1]
    assert "left out: " in err
    assert "13a.jpg" in err
    out, err = lines_of(capsys, model, folder, "--compare", "--format", "jsonl")
    assert len([json.loads(line) for line in out.splitlines()]) == 41
    assert f"of {changed} of 41" in err


def test_names_come_from_standard_input_and_rows_go_to_a_file(model, folder, tmp_path, capsys, monkeypatch):
    names = [str(folder / "00.png"), "", str(folder / "below" / "40.PNG")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(names) + "\n"))
    out, _ = lines_of(capsys, model, "-", folder / "00.png", "--out", tmp_path / "labels.csv", "--top-k", 1)
    assert out == f"{tmp_path / 'labels.csv'}: 2 images labelled\n"
    with open(tmp_path / "labels.csv", encoding="utf-8", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [names[0], names[2]]
    lines_of(capsys, model, folder / "13a.jpg", "--out", tmp_path / "none.jsonl", code=3)
    assert [p.name for p in tmp_path.iterdir()] == ["labels.csv"]  # nothing half done


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["13a.jpg"], 3, "none of 1 image could be read; the first: "),
        (["no*.png"], 3, "no such file, folder or pattern; give image files (.avif, .bmp"),
        (["00.png", "--json", "--format", "csv"], 2, "give it without --format and --out"),
        (["00.png", "--out", "labels.txt"], 2, "ends neither with .csv nor with .jsonl"),
        (["00.png", "--top-k", "0"], 2, "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_be_done_ends_with_its_code(model, folder, capsys, words, code, message):
    out, err = lines_of(capsys, model, folder / words[0], *words[1:], code=code)
    assert message in " ".join(err.split())
    assert "json" in str(words) or not out


def test_a_folder_of_many_images_is_read_by_processes_in_order(model, folder, monkeypatch):
    """As 512 images are; the rows are the same, and so is what could not be read."""
    alone = predict(model, [folder], batch_size=8)
    monkeypatch.setattr(sys.modules[label.__module__], "WORKERS_FROM", 1)
    together = predict(model, [folder], batch_size=8)
    assert together == alone


def test_rows_come_before_the_last_image_is_read(model, folder):
    """The second batch's files are taken away while the first is looked at."""
    spare = shutil.copytree(folder, folder.parent / "spare")
    rows = label(load_model(model), sorted(spare.glob("[0-9][0-9].png")), batch_size=10)
    first = next(rows)
    assert first.path.endswith("00.png")
    shutil.rmtree(spare)
    assert len(list(rows)) < 39


def test_a_name_that_is_no_text_does_not_end_the_work(model, folder, tmp_path, capsysbinary):
    strange = os.fsencode(tmp_path) + b"/latin\xe9.png"
    shutil.copy(folder / "00.png", os.fsdecode(strange))
    for layout in ("table", "csv", "jsonl"):
        assert invoke(["predict", str(model), str(tmp_path), "--format", layout]) == 0
        assert rb"latin\udce9.png" in capsysbinary.readouterr().out


def test_a_damaged_or_foreign_model_is_named(model, folder, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "model.pth").write_bytes(b"x")
    with pytest.raises(DataError, match="export it again"):
        list(predict(copy, [folder / "00.png"]))
    with pytest.raises(DataError, match="no such folder; give one of `pipeline export"):
        list(predict(tmp_path / "nowhere", [folder / "00.png"]))
