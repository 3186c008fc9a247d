"""`pipeline reproduce` on digits: every step once, what is there taken up, rows that agree with what they were made from."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.cli import invoke
from pipeline.errors import ConfigError
from pipeline.reproduce import TABLES, ReproductionPart, reproduce
from tests.conftest import digits_tree

KEYS = {"table", "row", "command", "network", "parameters", "width", "views", "device", "time_s", "n"}
KEYS |= {"ours", "ours_std", "paper", "difference"}  # what readers of the document rely on
WORDS = ["reproduce", "tiny.yaml", "--tables", "table3,figure5", "--json"]


def call(capsys, *words):
    code = invoke([*words])
    told = capsys.readouterr()
    return code, json.loads(told.out), told.err


@pytest.fixture(scope="module")
def tree():
    return digits_tree(epochs=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def done(place):
    """(what two tables on one backbone give, the folder they were made in)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        from pipeline.config import load_config

        part = ReproductionPart(load_config(place / "tiny.yaml"), (0,), "tiny.yaml")
        return reproduce([part], out=Path("runs/reproduce"), tables=("table3", "figure5"))


def test_every_row_has_what_a_reader_needs_and_agrees_with_its_table(done, place):
    rows = json.loads((place / done.data).read_text(encoding="utf-8"))
    assert all(row.keys() >= KEYS for row in rows)
    document = json.loads((place / "runs/reproduce/tiny/seed-0/table3/ablation.json").read_text())
    mine = {row["row"]: row for row in rows if row["table"] == "table3"}
    assert list(mine) == [row["name"] for row in document["rows"]]
    for theirs in document["rows"]:
        row = mine[theirs["name"]]
        assert row["ours"]["few"] == pytest.approx(theirs["few"], abs=1e-4)
        assert (row["paper"], row["difference"], row["n"]) == (None, None, theirs["n"])  # the paper has no digits
    assert (mine["CE (stage 1)"]["views"], mine["CB alone"]["views"]) == ("clean", "2 augmented")
    assert mine["NC only"]["chosen"].keys() == {"lam"}
    assert mine["NC only"]["command"].endswith("tiny/seed-0 --config ablations/table3")
    curve = [row["row"] for row in rows if row["row"].startswith("IWB + CB, code, λ")]
    assert len(curve) == 21
    assert curve[0].endswith("λ 0")


def test_the_page_shows_each_table_with_network_and_deviations(done, place):
    text = (place / done.page).read_text(encoding="utf-8")
    assert "### Table 3: what the target is made of (cifar_resnet8 ×0.25, 5,006 parameters, 16-d)" in text
    assert "| NC·HC vector |" in text
    assert text.count("Had λ been chosen on the test split") == 1  # under the curves alone
    assert "encoder stays in evaluation mode" in text
    assert "which is no result: IWB + CB " in text  # what selection could have been worth


def test_what_is_kept_is_the_tables_the_heads_and_the_clean_view(done, place):
    from safetensors.numpy import load_file

    from cache import open_cache

    kept = place / done.keep / "tiny-seed-0"
    assert {p.name for p in kept.iterdir()} == {"table3", "figure5", "metrics.jsonl", "run.json", "clean.safetensors"}
    store, arrays = (
        open_cache(place / "runs/reproduce/tiny/seed-0/features.zarr"),
        load_file(kept / "clean.safetensors"),
    )
    assert arrays["train_features"].dtype == "float16"
    assert (arrays["train_features"] == store.read("train", 0)).all()
    assert (arrays["test_labels"] == store.labels("test")).all()
    assert (arrays["weight"] == store.classifier[0]).all()


def test_the_command_does_nothing_twice(done, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code, again, told = call(capsys, *WORDS)
    assert (code, again["redone"]) == (0, [])
    assert again["rows"] == json.loads(json.dumps(done.to_dict()["rows"]))
    assert "deviation: Batch normalisation" in told
    assert "4/4 tiny/figure5, seed 0" in told


def test_a_finished_training_and_store_are_taken_up_and_others_refused(
    done, place, tmp_path, monkeypatch, capsys, tree
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree | {"backbone": tree["backbone"] | {"lr": 0.05}}))
    there = tmp_path / "runs/reproduce/tiny/seed-0"
    for name in ("backbone", "features.zarr"):
        shutil.copytree(place / "runs/reproduce/tiny/seed-0" / name, there / name)
    before = (there / "backbone/last.pt").read_bytes()
    code, found, told = call(capsys, "reproduce", "tiny.yaml", "--tables", "table3", "--json")
    assert (code, found["redone"]) == (0, ["tiny/seed-0/table3"])
    assert "trained to the end, by this configuration on these images" in told
    assert (there / "backbone/last.pt").read_bytes() == before
    code, refused, _ = call(capsys, "reproduce", "other.yaml", "--tables", "table3", "--json")
    assert (code, "another training: backbone.lr" in refused["error"]) == (2, True)


def test_a_page_keeps_what_others_wrote_around_its_section(done, tmp_path):
    from pipeline.reproduce.page import write

    rows = done.rows["tiny"]
    (tmp_path / "reproduction.md").write_text("# Ours\n\nSaid by hand.\n", encoding="utf-8")
    write(tmp_path, [row | {"config": "first"} for row in rows], {"first": ["one."]})
    write(tmp_path, [row | {"config": "second"} for row in rows], {"second": ["two."]})
    few = [row | {"config": "first"} for row in rows if row["table"] == "table3"][:3]
    write(tmp_path, few, {"first": ["three."]})
    text = (tmp_path / "reproduction.md").read_text(encoding="utf-8")
    assert text.startswith("# Ours\n\nSaid by hand.\n")
    assert ("- one." in text, "- two." in text, "- three." in text) == (False, True, True)
    counted = [row["config"] for row in json.loads((tmp_path / "reproduction.json").read_text(encoding="utf-8"))]
    others = sum(row["table"] != "table3" for row in rows)
    assert (counted.count("first"), counted.count("second")) == (3 + others, len(rows))


def test_an_unknown_table_is_refused_before_anything_is_trained(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match="table5: unknown; known: methods, table3"):
        reproduce([ReproductionPart(tiny_config, (0,), "tiny")], out=tmp_path, tables=("table5",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_several_backbones_side_by_side_and_every_table(tmp_path, monkeypatch, capsys, tree):
    """Trained in processes of their own they are what one process trains, and rows are their mean ± std."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree | {"rebalance": {"epochs": 1, "trials": 2, "seeds": [0]}}))
    code, found, _ = call(capsys, "reproduce", "tiny.yaml", "--seeds", "0,1", "--side-by-side", "2", "--json")
    assert code == 0
    assert {row["table"] for row in found["rows"]} == set(TABLES)
    row = next(r for r in found["rows"] if r["row"] == "CE (stage 1)")
    assert (row["n"], row["n_of"], row["ours_std"]["all"] is not None) == (2, "backbones", True)
    runs = tmp_path / "runs/reproduce/tiny"
    assert (runs / "seed-1/train.log").read_text().count("network: cifar_resnet8") == 1
    each = [json.loads((runs / f"seed-{s}/methods/results.json").read_text())["baseline"]["all"] for s in (0, 1)]
    assert row["ours"]["all"] == pytest.approx(sum(each) / 2, abs=1e-3)
    assert each[0] != each[1]
    words = ["train-backbone", "tiny.yaml", "--set", "backbone.seed=1", "--out", "alone", "--json"]
    assert call(capsys, *words)[0] == 0
    alone, beside = (load_checkpoint(p / "last.pt") for p in (tmp_path / "alone", runs / "seed-1/backbone"))
    assert alone.weights_digest == beside.weights_digest
