"""The model card: its code runs as it stands, its numbers are the run's, the hub reads it."""

import io
import shutil
from contextlib import redirect_stdout

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from pipeline.deploy.export import export_model
from pipeline.deploy.predict import predict
from pipeline.report.study import read_study
from pipeline.results.documents import read_results
from tests.small_run import digits_run


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    copy = tmp_path_factory.mktemp("card") / "run"
    shutil.copytree(tiny_backbone.parent, copy / "backbone")
    return digits_run(copy / "backbone" / "last.pt")


@pytest.fixture(scope="module", params=["timm", "safetensors", "onnx"])
def exported(request, run):
    return export_model(run, to=request.param, out=run.parent / request.param)


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_cards_python_says_of_a_photo_what_predict_says(exported, monkeypatch):
    """A photo turned on its side by its EXIF, neither square nor of the network's size."""
    exif = Image.Exif()
    exif[0x112] = 6
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((71, 45)).save(exported.out.parent / "photo.jpg", exif=exif)
    monkeypatch.chdir(exported.out.parent)
    code = card_of(exported.out).split("```python\n")[1].split("```")[0]
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    (expected,) = predict(exported.out.name, ["photo.jpg"])
    name, probability = printed.getvalue().split()
    assert name == expected.guesses[0].name
    assert float(probability) == pytest.approx(expected.guesses[0].probability, abs=1e-5)


def test_the_cards_python_says_of_a_16_bit_image_what_predict_says(exported, monkeypatch):
    pixels = np.random.default_rng(2).integers(0, 2**16, (45, 71), dtype=np.uint16)
    Image.fromarray(pixels).save(exported.out.parent / "scan.png")
    monkeypatch.chdir(exported.out.parent)
    with Image.open("scan.png") as image:
        assert image.mode == "I;16"
    code = card_of(exported.out).split("```python\n")[1].split("```")[0].replace("photo.jpg", "scan.png")
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    (expected,) = predict(exported.out.name, ["scan.png"])
    name, probability = printed.getvalue().split()
    assert name == expected.guesses[0].name
    assert float(probability) == pytest.approx(expected.guesses[0].probability, abs=1e-5)


def test_it_has_the_table_the_choice_and_the_limits(run, tmp_path):
    exported = export_model(run, out=tmp_path / "model")
    card = card_of(tmp_path / "model")
    selected = read_results(run / "rebalance" / "results.json")["selected"]
    assert (
        f"| {selected['few']:.1f} ± {selected['few_std']:.1f} | {selected['all']:.1f} ± {selected['all_std']:.1f} |"
        in card
    )
    assert "λ was chosen on validation." in card
    assert "the one head that this folder holds: batch order 0 of 2; rows with ± are means" in card
    assert "363 images, 110 … 5 a class" in card
    own = read_study(run).first
    accuracy = own.class_accuracy(own.selected, "test")
    worst = int(np.argmin(accuracy))
    assert f"Weakest classes on test: {worst} {accuracy[worst]:.0f} %" in card
    (row,) = (r for r in own.rows if r["split"] == "test" and own.selected.matches(r) and r["seed"] == 0)
    assert f"| **the head in this folder** | {row['many']:.1f} | {row['medium']:.1f} | {row['few']:.1f} |" in card
    assert exported.head["seed"] == 0


def test_the_hub_reads_it_and_is_promised_no_more_than_it_can_load(exported):
    """timm alone knows no CIFAR network; families that it knows are in test_export_families.py."""
    data = ModelCard.load(exported.out / "README.md").data
    graph = exported.onnx is not None
    assert (data.library_name, data.pipeline_tag) == ("onnx" if graph else None, "image-classification")
    assert ("onnx" in data.tags) == graph
    assert data.license is None
    assert "None is given here: it is yours to choose" in card_of(exported.out)
