"""Paths in files lead to the same place from any working directory, those of format 0.1 too."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.config import RebalanceConfig
from pipeline.paths import read_path, recorded_path
from pipeline.report.study import read_study
from tests.golden import tables

GOLDEN = Path(__file__).parent / "golden" / "format-0.1"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a store mine.zarr, in which the commands are typed."""
    tables.made_store(tmp_path / "mine.zarr")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rebalance(store: str, out: str | None = None) -> None:
    config = RebalanceConfig(lam="0.1", epochs=1, seeds=(0,), views="clean")
    pipeline.rebalance(store, config, out=out, device="cpu")


def test_a_head_is_found_from_another_working_directory(place, monkeypatch):
    rebalance("mine.zarr")
    here = pipeline.rebalanced_head("mine-rebalance")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    there = pipeline.rebalanced_head("../mine-rebalance")
    assert np.array_equal(there.weight, here.weight)
    assert read_study(Path("../mine-rebalance")).first.results["store"] == os.path.realpath("../mine.zarr")


def test_store_and_results_move_together(place, monkeypatch):
    rebalance("mine.zarr", "results/first")
    text = json.loads(Path("results/first/results.json").read_text())
    assert (text["store"], text["out"]) == ("../../mine.zarr", ".")
    assert json.loads(Path("results/first/run.json").read_text())["made_from"]["store"] == "../../mine.zarr"
    Path("moved").mkdir()
    shutil.move("mine.zarr", "moved/mine.zarr")
    shutil.move("results", "moved/results")
    study = read_study(Path("moved/results/first"))
    assert study.first.results["store"] == "moved/mine.zarr"


@pytest.mark.parametrize("folder", ["methods", "one"])
def test_results_of_format_0_1_are_read_from_any_working_directory(folder, tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path / "kept")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_study(Path("../kept") / folder).first.store.path.resolve() == tmp_path / "kept/one/features.zarr"


def test_absolute_paths_and_urls_are_recorded_as_typed(tmp_path):
    for text in (str(tmp_path / "a.zarr"), "s3://bucket/a.zarr"):
        assert recorded_path(text, tmp_path / "b") == text
        assert read_path(text, tmp_path / "b") == text


def test_a_path_through_a_link_is_recorded_by_where_it_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("real/deep").mkdir(parents=True)
    Path("a.zarr").mkdir()
    Path("link").symlink_to("real/deep")
    assert recorded_path("a.zarr", Path("link")) == "../../a.zarr"
    assert read_path("../../a.zarr", Path("link")) == "a.zarr"
