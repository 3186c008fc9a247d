"""Paths in files lead to the same place from any working directory, those of format 0.1 too."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.config import RebalanceConfig
from pipeline.paths import names_only, read_path, recorded_path
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


def test_absolute_paths_are_recorded_relative_to_the_file_and_urls_as_they_are(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    assert recorded_path(str(tmp_path / "a.zarr"), tmp_path / "b") == "../a.zarr"
    assert os.path.samefile(read_path("../a.zarr", tmp_path / "b"), tmp_path / "a.zarr")
    assert read_path(str(tmp_path / "a.zarr"), tmp_path / "b") == str(tmp_path / "a.zarr")  # as before 0.2
    assert (
        recorded_path("s3://bucket/a.zarr", tmp_path / "b")
        == "s3://bucket/a.zarr"
        == read_path("s3://bucket/a.zarr", tmp_path)
    )


@pytest.mark.parametrize(
    ("tree", "shared"),
    [
        ("/home/me/images", "images"),
        ("~/images/", "images"),
        (["local-dir:/data/net", "data.path=/data/x.npz"], ["local-dir:net", "data.path=x.npz"]),
        ({"path": "images/train", "share": 0.5, "none": None}, {"path": "images/train", "share": 0.5, "none": None}),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("AC/DC, at 1/2", "AC/DC, at 1/2"),
    ],
)
def test_what_is_shared_holds_names_in_place_of_absolute_paths(tree, shared):
    assert names_only(tree) == shared


def test_a_path_through_a_link_is_recorded_by_where_it_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("real/deep").mkdir(parents=True)
    Path("a.zarr").mkdir()
    Path("link").symlink_to("real/deep")
    assert recorded_path("a.zarr", Path("link")) == "../../a.zarr"
    assert read_path("../../a.zarr", Path("link")) == "a.zarr"
