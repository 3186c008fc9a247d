"""Predictions on image files are those of encoder and head on the same pixels."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cache import open_cache
from pipeline.data import load_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.export import export_model
from pipeline.predict import csv_lines, find_images, json_lines, predict, table
from pipeline.report.source import read_heads, read_results
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
    reasons: list[str] = []
    rows = {row.path: row for row in predict(model, [folder], skipped=reasons.append, batch_size=8)}
    assert len(rows) == 41
    for name in ("13.png", "14.png", "15.png"):  # read in one batch with the file that cannot be read
        (alone,) = predict(model, [folder / name])
        assert rows[alone.path].guesses[0].name == alone.guesses[0].name
        assert rows[alone.path].guesses[0].probability == pytest.approx(alone.guesses[0].probability, abs=1e-5)
    assert len(reasons) == 1
    assert "13a.jpg: unreadable image" in reasons[0]


def test_nothing_readable_is_an_error(model, folder, tmp_path):
    with pytest.raises(DataError, match=r"none of 1 image\(s\) could be read"):
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


def test_rows_as_csv_json_lines_and_table(model, folder):
    rows = list(predict(model, [folder / "00.png", folder / "01.png"], top_k=2, compare=True))
    read = list(csv.DictReader(csv_lines(rows)))
    assert [r["class_1"] for r in read] == [r.guesses[0].name for r in rows]
    assert [float(r["stage1_probability_2"]) for r in read] == pytest.approx(
        [r.stage1[1].probability for r in rows], abs=1e-6
    )
    documents = [json.loads(line) for line in json_lines(rows)]
    assert documents[1]["top"][0] == {"name": rows[1].guesses[0].name, "probability": rows[1].guesses[0].probability}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(rows))
    console.file.close()
    text = console.export_text()
    assert "before rebalancing" in text
    assert str(folder / "01.png") in text


def test_a_damaged_or_foreign_model_is_named(model, folder, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "model.pth").write_bytes(b"x")
    with pytest.raises(DataError, match="export it again"):
        list(predict(copy, [folder / "00.png"]))
    with pytest.raises(DataError, match="no such run folder"):
        list(predict(tmp_path / "nowhere", [folder / "00.png"]))
