"""Class D, point 4: what is passed on to others holds neither the places of its author's machine nor what was typed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli import invoke
from tests.conftest import digits_tree


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of a folder of images, its report and its exports, all named by absolute paths below a folder `secret-place`."""
    place = tmp_path_factory.mktemp("sharing") / "secret-place"
    for split, images in (("train", 12), ("val", 3), ("test", 3)):
        for label in range(3):
            (place / "images" / split / f"class {label}").mkdir(parents=True)
            for number in range(images):
                pixels = np.random.default_rng(number).integers(0, 80, (16, 16, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"images/{split}/class {label}/{number}.png")
    data = {"source": "folder", "path": str(place / "images"), "image_size": 16, "workers": 0}
    tree = digits_tree(epochs=1) | {"data": data, "rebalance": {"lam": "0.1", "epochs": 1}}
    (place / "tree.yaml").write_text(yaml.safe_dump(tree))
    words = ["--out", str(place / "run"), "--device", "cpu", "--set", "dump.views=2"]
    assert invoke(["run", str(place / "tree.yaml"), *words]) == 0
    for kind in ("timm", "onnx"):
        assert invoke(["export", str(place / "run"), "--to", kind, "--out", str(place / kind)]) == 0
    return place


SHARED = {
    "report": "run/report.html",
    "pictures": "run/figures/*",
    "results": "run/rebalance/*[!n].*",  # all but run.json
    "model": "timm/*",
    "ONNX": "onnx/*",
}


@pytest.mark.parametrize("kind", SHARED)
def test_no_place_and_no_typed_command_travels(kind, place):
    files = [file for file in place.glob(SHARED[kind]) if file.name != "run.json"]
    assert files
    for file in files:
        content = file.read_bytes()
        for text in ("secret-place", str(Path(__file__).parents[2]), sys.prefix, "--set", '"argv"'):
            assert text.encode() not in content, f"{file.name} holds {text}"


def test_and_all_moves_together(place, tmp_path, monkeypatch):
    place.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert invoke(["report", "moved/run", "--dry-run"]) == 0
    assert invoke(["evaluate", "moved/run"]) == 0
    assert invoke(["predict", "moved/timm", "moved/images/test"]) == 0
