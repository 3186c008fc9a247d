"""Settings of stage 1 against each other: what is tried, what is chosen, and that nothing is trained twice."""

import csv
import json
import os
import signal

import pytest

from pipeline.backbone import hparam_sweep as module
from pipeline.backbone.hparam_sweep import compare, grid, sweep_hparams
from pipeline.config import make_config
from pipeline.errors import ConfigError, Diverged, Terminated
from tests.conftest import digits_tree

CONFIG = make_config(digits_tree(epochs=1, width=0.25), "t")


def run(seed, accuracy, error=1.0):
    return {
        "seed": seed, "all": accuracy, "many": accuracy, "medium": accuracy, "few": None, "standard_error": error,
        "train_accuracy": 50.0, "loss": 1.0, "checkpoint": f"{accuracy}/{seed}",
    }  # fmt: skip


def test_a_grid_is_every_combination_named_alike_however_typed():
    found = grid(CONFIG, ["backbone.weight_decay=5e-4,0.001", "backbone.weaken.strength=0,.5"])
    assert [t.name for t in found] == [
        "weight_decay=0.0005,weaken.strength=0",
        "weight_decay=0.0005,weaken.strength=0.5",
        "weight_decay=0.001,weaken.strength=0",
        "weight_decay=0.001,weaken.strength=0.5",
    ]
    assert found[1].config.backbone.weaken.strength == 0.5
    assert found[1].values == {"backbone.weight_decay": 0.0005, "backbone.weaken.strength": 0.5}
    assert [t.name for t in grid(CONFIG, [])] == ["as-configured"]
    (pair,) = grid(CONFIG, ["data.cutout=4"])
    assert pair.config.data.cutout == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["backbone.lr"], "KEY=VALUE"),
        (["backbone.lr="], "KEY=VALUE"),
        (["backbone.lr=1", "backbone.lr=2"], "each key once"),
        (["backbone.seed=0,1"], "several seeds: --seeds 0,1,2"),
        (["rebalance.lam=0.1,0.2"], "only keys of training"),
        (["data.imbalance_factor=1,10"], "only keys of training"),
        (["backbone.weight_decy=1,2"], "did you mean weight_decay"),
        (["backbone.lr=0.1,fast"], r"--try backbone\.lr=fast.*backbone\.lr"),
        (["backbone.lr=0.1,1e-1"], "lr=0.1 comes twice"),
        (["backbone.loss=ce,cb", "backbone.sampler=instance,class-balanced"], "force_double_balancing"),
    ],
)
def test_what_cannot_be_tried_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        grid(CONFIG, options)


def test_the_choice_by_hand():
    found = compare(
        grid(CONFIG, ["backbone.weight_decay=1e-4,5e-4,1e-3,5e-3"]),
        [[run(0, 50.0), run(1, 52.0)], [run(0, 55.0), run(1, 54.6)], [run(0, 52.0), run(1, 58.0)], [run(0, 90.0), run(1, None)]],
        seeds=(0, 1),
    )  # fmt: skip
    chosen = found["selected"]
    assert (chosen["name"], chosen["all"], chosen["n"]) == ("weight_decay=0.001", 55.0, 2)
    assert chosen["all_std"] == pytest.approx(18**0.5)
    assert chosen["standard_error"] == pytest.approx((9 + 1) ** 0.5)  # of two seeds, and of the validation images
    assert (chosen["chosen_on"], chosen["checkpoint"]) == ("val", "52.0/0")
    assert [row["within_one_se"] for row in found["tries"]] == [False, True, True, False]
    assert found["tries"][3]["diverged"] == [1]
    assert found["notes"] == [
        "validation cannot tell weight_decay=0.001 from weight_decay=0.0005: within one standard error, 3.2 points"
    ]


def test_the_border_of_a_grid_is_told():
    of = [[run(0, accuracy)] for accuracy in (60.0, 50.0, 40.0)]
    (note,) = compare(grid(CONFIG, ["backbone.lr=0.1,0.2,0.3"]), of, seeds=(0,))["notes"]
    assert note == "the chosen backbone.lr 0.1 lies at the border of what was tried; a better one may lie beyond"
    assert compare(grid(CONFIG, ["backbone.ema=0,0.9,0.99"]), of, seeds=(0,))["notes"] == []  # 0 is off


def test_one_setting_is_not_chosen_and_none_that_diverged():
    found = compare(grid(CONFIG, []), [[run(0, 50.0), run(1, 52.0)]], seeds=(0, 1))
    assert found["selected"]["chosen_on"] is None
    assert found["selected"]["all_std"] == pytest.approx(2**0.5)
    with pytest.raises(Diverged, match="every setting diverged"):
        compare(grid(CONFIG, []), [[run(0, None)]], seeds=(0,))


def test_trained_once_each_and_gone_on_with_after_a_stop(tmp_path, monkeypatch):
    real, trained = module.train, []

    def counting(prepared, **how):
        trained.append((prepared.out.parent.name, prepared.config.backbone.seed))
        if len(trained) == 3:
            report = how["report"]
            how["report"] = lambda event: (report(event), os.kill(os.getpid(), signal.SIGTERM))
        return real(prepared, **how)

    monkeypatch.setattr(module, "train", counting)
    options, seeds = ["backbone.lr=0.1,0.02"], (0, 1)
    with pytest.raises(Terminated, match="the same command continues"):
        sweep_hparams(CONFIG, options, out=tmp_path, seeds=seeds)
    assert not (tmp_path / "tries.json").exists()
    before = (tmp_path / "tries/lr=0.1/seed-1/last.pt").read_bytes()
    result = sweep_hparams(CONFIG, options, out=tmp_path, seeds=seeds)
    assert trained[3:] == [("lr=0.1", 0), ("lr=0.1", 1), ("lr=0.02", 0), ("lr=0.02", 1)]
    assert (tmp_path / "tries/lr=0.1/seed-1/last.pt").read_bytes() == before
    document = json.loads((tmp_path / "tries.json").read_text())
    assert document.pop("header")["kind"] == "sweep"
    assert document == json.loads(json.dumps(result.document))
    last = [json.loads((tmp_path / f"tries/lr=0.02/seed-{s}/metrics.jsonl").read_text())["val_accuracy"] for s in seeds]
    assert document["tries"][1]["all"] == pytest.approx(sum(last) / 2)
    assert [r["all"] for r in document["tries"][1]["runs"]] == last
    with open(tmp_path / "tries.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["backbone.lr"], line["seed"]) for line in lines] == [
        ("0.1", "0"),
        ("0.1", "1"),
        ("0.02", "0"),
        ("0.02", "1"),
    ]
    assert float(lines[2]["all"]) == last[0]


def test_a_setting_that_diverges_is_told_and_not_chosen(tmp_path):
    result = sweep_hparams(CONFIG, ["backbone.lr=0.1,1e30"], out=tmp_path)
    assert result.document["selected"]["name"] == "lr=0.1"
    assert result.document["tries"][1]["diverged"] == [0]
    assert result.document["tries"][1]["all"] is None


def test_without_validation_images_nothing_is_trained(tmp_path):
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / "images/train" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"images/train/{label}/{i}.png")
    tree = digits_tree(epochs=1)
    tree["data"] = {"source": "folder", "path": str(tmp_path / "images"), "image_size": 16, "val_per_class": 0}
    tree["data"] |= {"test_per_class": 1, "workers": 0}
    with pytest.raises(ConfigError, match=r"no validation split; hold images out with data\.val_per_class"):
        sweep_hparams(make_config(tree, "t"), ["backbone.lr=0.1,0.2"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table_and_the_next_one(tmp_path, monkeypatch, capsys):
    import yaml

    from pipeline.cli import invoke

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(digits_tree(epochs=1)))
    words = ["train-backbone", "--try", "backbone.weight_decay=5e-4,1e-3", "--seeds", "0,1"]
    assert invoke(words) == 0
    out = capsys.readouterr().out
    assert "weight_decay=0.0005" in out
    assert "n = 2 seeds (0, 1)" in " ".join(out.split())
    (found,) = (line.split("--checkpoint ")[1] for line in out.splitlines() if line.startswith("next: "))
    assert (tmp_path / found).is_file()
    assert invoke([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["selected"]["checkpoint"] == found
    assert invoke(["train-backbone", "--try", "backbone.seed=0,1"]) == 2
