"""`pipeline run`: all stages, nothing twice, only what depends on what has changed."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.config import load_config, make_config, shipped_configs
from pipeline.errors import ConfigError, DataError
from pipeline.run import run_pipeline
from pipeline.run_prepare import prepare_run
from tests.conftest import digits_tree

STAGES = ("train-backbone", "dump-features", "rebalance", "report")


def planned(config, **options):
    """Return the text that --dry-run prints."""
    return prepare_run(config, **options).description


@pytest.fixture(scope="module")
def tiny():
    return make_config(digits_tree(), "tiny")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    return out, run_pipeline(tiny, out=out)


def test_a_run_does_every_stage_and_ends_with_table_and_pictures(run):
    out, result = run
    assert result.redone == STAGES
    assert result.report.stat().st_size > 10_000
    assert {p.name for p in result.pictures} >= {"accuracy-lambda.png", "weight-norms.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in result.pictures)
    ledger = json.loads((out / "run.json").read_text())
    assert set(ledger["stages"]) == set(STAGES)
    assert ledger["config"]["backbone"]["model"] == "cifar_resnet8"


def test_running_again_does_nothing_twice(run, tiny):
    out, first = run
    again = run_pipeline(tiny, out=out)
    assert again.redone == ()
    assert again.results == first.results
    assert again.stages == first.stages  # the times are those of the work, not of looking


@pytest.mark.parametrize(
    ("deleted", "redone"),
    [
        ("report.html", ("report",)),
        ("figures/weight-norms.png", ("report",)),
        ("figures/training.csv", ("report",)),
        ("rebalance/results.json", ("rebalance", "report")),
        ("rebalance/heads.safetensors", ("rebalance", "report")),
        ("features.zarr", ("dump-features", "report")),
        ("backbone", ("train-backbone", "report")),
    ],
)
def test_a_deleted_artefact_is_redone_with_what_depends_on_it(run, tiny, deleted, redone):
    """Training and dumping are exact: the stages behind them find the same content and have nothing to do but to show it."""
    out, first = run
    path = out / deleted
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_pipeline(tiny, out=out)
    assert again.redone == redone
    assert again.results["selected"]["all"] == first.results["selected"]["all"]
    assert path.exists()


def test_other_rebalance_settings_touch_neither_backbone_nor_store(run, tiny):
    out, _ = run
    other = tiny.model_copy(update={"rebalance": tiny.rebalance.model_copy(update={"lam": "0.1"})})
    assert run_pipeline(other, out=out).redone == ("rebalance", "report")
    assert run_pipeline(tiny, out=out).redone == ("rebalance", "report")


def test_other_test_images_cost_the_dump_and_not_the_training(tmp_path):
    """A folder of images: one that cannot be read is found in the dump, taken away, and the training is still good."""
    folder_of_digits(tmp_path / "images")
    tree = digits_tree() | {
        "name": "t",
        "data": {"source": "folder", "path": str(tmp_path / "images"), "image_size": 8},
    }
    config = make_config(tree | {"backbone": tree["backbone"] | {"epochs": 1}, "dump": {"views": 1}}, "t")
    bad = tmp_path / "images/test/1/bad.png"
    bad.write_text("no image")
    with pytest.raises(DataError, match=r"bad\.png: unreadable image"):
        run_pipeline(config, out=tmp_path / "run")
    bad.unlink()
    refusal = r"features\.zarr: holds features made otherwise: .* The training is good: remove .*features\.zarr, then"
    for attempt in (run_pipeline, planned):
        with pytest.raises(DataError, match=refusal) as found:
            attempt(config, out=tmp_path / "run")
        assert "--overwrite" not in str(found.value)
        assert "crc32c" not in str(found.value)
    shutil.rmtree(tmp_path / "run/features.zarr")
    assert run_pipeline(config, out=tmp_path / "run").redone == ("dump-features", "rebalance", "report")
    (tmp_path / "images/train/1/bad.png").write_text("no image")
    with pytest.raises(ConfigError, match="is of another training"):
        run_pipeline(config, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("missing", "error", "says"),
    [
        ({"val_per_class": 0}, ConfigError, "no validation images to choose on.*--set rebalance.select_on=kfold"),
        ({"test_per_class": 0}, DataError, "no test images, so nothing could be measured; set data.test_per_class"),
    ],
)
def test_what_cannot_end_is_refused_before_the_first_step(missing, error, says, tmp_path):
    folder_of_digits(tmp_path / "all")
    (tmp_path / "all/train").rename(tmp_path / "images")
    data = {"source": "folder", "path": str(tmp_path / "images"), "image_size": 8, "test_per_class": 2, **missing}
    tree = digits_tree(epochs=1) | {"name": "t", "data": data, "dump": {"views": 1}}
    for attempt in (planned, run_pipeline):
        with pytest.raises(error, match=says):
            attempt(make_config(tree, "t"), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    if "val_per_class" in missing:
        for remedy in ({"select_on": "kfold"}, {"lam": "0.1"}):
            config = make_config(tree | {"rebalance": tree["rebalance"] | remedy}, "t")
            assert "rebalance" in {part.command for part in planned(config, out=tmp_path / "run").parts}
            run_pipeline(config, out=tmp_path / "run")


def test_nothing_is_written_among_the_images_or_where_a_network_is_refused(tmp_path):
    folder_of_digits(tmp_path / "all")
    tree = digits_tree(epochs=1) | {"name": "t"}
    for path, out in (("all", "all/train/run"), ("all/train", "all/train"), ("all/train", "all/train/run")):
        data = {"source": "folder", "path": str(tmp_path / path), "image_size": 8}
        for attempt in (planned, run_pipeline):
            with pytest.raises(ConfigError, match=r"lies among the class folders of .*train; take another --out"):
                attempt(make_config(tree | {"data": data}, "t"), out=tmp_path / out)
        assert {place.name for place in (tmp_path / "all/train").iterdir()} == {"0", "1", "2"}
    data = {"source": "folder", "path": str(tmp_path / "all"), "image_size": 8}
    wrong = make_config(tree | {"data": data, "backbone": tree["backbone"] | {"model": "resnet5", "width": 1}}, "t")
    with pytest.raises(ConfigError, match="unknown to timm"):
        run_pipeline(wrong, out=tmp_path / "all/new/run")  # beside train
    assert not (tmp_path / "all/new").exists()


def folder_of_digits(path):
    """train, val and test with twelve, two and two images of three digits each."""
    digits = load_digits()
    for digit in range(3):
        images = digits.images[digits.target == digit]
        for number, image in enumerate(images[:16]):
            split = "train" if number < 12 else "val" if number < 14 else "test"
            place = path / split / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype(np.uint8)).save(place / f"{number}.png")


def test_several_backbones_are_combined(tiny, tmp_path):
    result = run_pipeline(tiny, out=tmp_path / "r", seeds=[0, 1])
    assert result.redone == (*(f"seed-{s}/{stage}" for s in (0, 1) for stage in STAGES[:3]), "report")
    parts = [json.loads((tmp_path / f"r/seed-{s}/rebalance/results.json").read_text()) for s in (0, 1)]
    assert result.results["baseline"]["all"] == pytest.approx(sum(p["baseline"]["all"] for p in parts) / 2)
    selected = result.results["selected"]
    assert (selected["n"], selected["n_of"], selected["chosen_on"]) == (2, "backbones", "val")
    fingerprints = [p["fingerprint"] for p in parts]
    assert fingerprints[0] != fingerprints[1]  # two backbones, one subset
    assert result.report.is_file()
    assert run_pipeline(tiny, out=tmp_path / "r", seeds=[0, 1]).redone == ()
    with pytest.raises(ConfigError, match="several backbones"):
        run_pipeline(tiny, out=tmp_path / "r")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in shipped_configs() if "/" not in n])
def test_every_shipped_configuration_runs_on_a_few_images(name, tmp_path, monkeypatch):
    """The real networks and settings on generated images of the right kind; only size and length are cut down."""
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    sets = ["backbone.epochs=1", "backbone.batch_size=8", "dump.views=2", "data.workers=0", "rebalance.epochs=1"]
    config = load_config(shipped_configs()[name])
    if config.data.source.startswith("cifar"):
        labels = np.repeat(np.arange(3), 12)
        images = random.integers(0, 256, (36, 16, 16, 3), dtype=np.uint8)
        np.savez("few.npz", train_images=images, train_labels=labels, test_images=images[::4], test_labels=labels[::4])
        sets += [
            "data.source=npz",
            "data.path=few.npz",
            "data.val_per_class=2",
            "data.imbalance_factor=2",
            "data.max_per_class=9",
        ]
    elif config.data.source == "list":
        for split, per_class in (("train", 7), ("val", 2), ("test", 2)):
            lines = []
            for label in range(3):
                for i in range(per_class):
                    path = tmp_path / "images" / f"{split}-{label}-{i}.jpg"
                    path.parent.mkdir(exist_ok=True)
                    Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
                    lines.append(f"images/{path.name} {label}")
            (tmp_path / f"{split}.txt").write_text("\n".join(lines))
        given = {"train": config.data.train_list, "val": config.data.val_list, "test": config.data.test_list}
        sets += [f"data.{s}_list={s}.txt" for s, path in given.items() if path] + ["data.path=.", "data.image_size=32"]
    result = run_pipeline(load_config(shipped_configs()[name], sets), out=tmp_path / "run")
    assert result.redone == STAGES
    assert result.results["selected"]["all"] is not None
