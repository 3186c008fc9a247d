"""docs/architecture.md says which files to change for a method, a source, a figure, a switch; each is added here."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import pipeline
from pipeline.config import DataConfig, RebalanceConfig
from pipeline.rebalance.methods import methods_in
from pipeline.report import figures
from pipeline.report.study import read_study
from tests.small_run import made_run

ROOT = Path(__file__).resolve().parent.parent
METHOD = """
import torch
from pipeline.rebalance.methods import Free

def nearest_mean(given, samples, own):
    sums = torch.zeros_like(given.weight)
    for x, y in samples():
        sums.index_add_(0, y, x)
    means = sums / given.counts[:, None]
    return means, -(means**2).sum(1) / 2

METHOD = Free("nearest-mean", nearest_mean)
"""
SOURCE = '''
import numpy as np
from pipeline.data.dataset import DataSource, Split

def squares(config):
    """A white square per class, in one of three corners."""
    labels = np.repeat(np.arange(3), 30)
    images = np.zeros((90, 8, 8, 3), np.uint8)
    for image, corner in zip(images, labels):
        image[4 * (corner // 2) :, 4 * (corner % 2) :] = 255
    return DataSource(("a", "b", "c"), Split(labels=labels, ids=np.arange(90), images=images))
'''
FIGURE = """
from pipeline.report.chart import BLUE, bars, chart
from pipeline.report.drawing import Drawing

def class_sizes(study):
    rows = [{"class": c, "images": int(n)} for c, n in enumerate(study.counts)]
    drawn = chart([bars("images", study.first.store.class_names, study.counts, color=BLUE)], x="class", y="images")
    return Drawing("class-sizes", "Class sizes", "Training images of each class.", rows, drawn)
"""
# a switch of the norm term: its setting, its definition, its gradient by tensor operations and in C
SWITCH_FILES = {
    "pipeline/config/rebalance.py",
    "pipeline/rebalance/engine/objective.py",
    "pipeline/rebalance/engine/norm_gradient.py",
    "pipeline/rebalance/engine/csrc/kernel.h",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("architecture") / "run")


def defined(tmp_path: Path, name: str, code: str) -> dict:
    """Return the names that a new file defines."""
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    scope: dict = {}
    exec(compile(code, f"{name}.py", "exec"), scope)
    return scope


def test_a_method_is_one_file(run, tmp_path, methods_as_before):
    (tmp_path / "nearest_mean.py").write_text(METHOD, encoding="utf-8")
    names = methods_in(tmp_path / "nearest_mean.py")
    config = RebalanceConfig(method=(*names, "cb"), trials=1, epochs=1, seeds=(0,))
    result = pipeline.rebalance(run / "features.zarr", config, out=tmp_path / "out", device="cpu")
    assert {"nearest-mean", "cb"} <= {row.method for row in result.results}
    assert read_study(tmp_path / "out").first.rows


def test_a_source_is_one_file_and_its_name_in_the_settings(tmp_path, monkeypatch):
    class Settings(DataConfig):
        source: Literal["squares"] = "squares"  # type: ignore[assignment]

    monkeypatch.setitem(pipeline.data.SOURCES, "squares", defined(tmp_path, "squares", SOURCE)["squares"])
    dataset = pipeline.load_dataset(Settings(subset="exponential", imbalance_factor=2, max_per_class=16))
    assert dataset.counts.tolist() == [16, 11, 8]
    assert dataset.val is not None
    assert len(dataset.fingerprint) > 8


def test_names_of_sources_stand_where_the_page_says():
    places = {str(path.relative_to(ROOT)) for path in sources_of("pipeline") if '"huggingface"' in path.read_text()}
    assert places == {"pipeline/config/data.py", "pipeline/data/__init__.py"}


def test_a_figure_is_one_file(run, tmp_path, monkeypatch):
    draw, draw_all = defined(tmp_path, "class_sizes", FIGURE)["class_sizes"], figures.draw_all
    monkeypatch.setattr(figures, "draw_all", lambda study: [*draw_all(study), draw(study)])
    report = pipeline.write_report(run, out=tmp_path / "out")
    assert "Class sizes</h2>" in report.path.read_text(encoding="utf-8")
    numbers = np.genfromtxt(tmp_path / "out" / "figures" / "class-sizes.csv", delimiter=",", skip_header=1)
    assert numbers[:, 1].tolist() == read_study(run).counts.tolist()


@pytest.mark.parametrize("switch", ["hardness", "divergence"])
def test_a_switch_of_the_norm_term_stands_in_four_files(switch):
    files = [ROOT / "pipeline/config/rebalance.py", *sources_of("pipeline/rebalance")]
    places = {str(path.relative_to(ROOT)) for path in files if re.search(rf"\b{switch}\b", path.read_text("utf-8"))}
    assert places == SWITCH_FILES
    assert len(SWITCH_FILES) <= 4


def sources_of(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c", ".h")]
