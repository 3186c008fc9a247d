"""`info` recognises every artefact, `verify` every damage, `doctor` whether the machine computes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.config import RebalanceConfig
from pipeline.deploy.export import export_model
from pipeline.doctor import SHARED, _check, _warnings, doctor
from pipeline.errors import DataError
from pipeline.info import describe, verify
from pipeline.info.not_a_store import not_a_store
from pipeline.rebalance import rebalance
from pipeline.results.files import FORMAT
from pipeline.text import wrapped
from tests.small_run import digits_run, made_run, made_store


@pytest.fixture(scope="module")
def run(tiny_backbone, tmp_path_factory):
    copy = tmp_path_factory.mktemp("info") / "run"
    shutil.copytree(tiny_backbone.parent, copy / "backbone")
    return digits_run(copy / "backbone" / "last.pt")


@pytest.mark.parametrize(
    ("part", "kind", "said"),
    [
        ("", "run", ["features.zarr", "feature store", "all ", "chosen on validation"]),
        ("backbone/last.pt", "stage-1 checkpoint", ["cifar_resnet8 ×0.25", "2 of 2 epochs, complete", "363"]),
        ("backbone", "stage-1 checkpoint", ["weights digest"]),
        ("backbone/run.json", "record of pipeline train-backbone", ["torch"]),
        (
            "features.zarr",
            "feature store",
            ["sealed", "363 samples, 3 view(s)", "16 wide, float16", "fingerprint dataset"],
        ),
        ("rebalance/results.json", "rebalancing results", ["2 batch order(s) of one backbone", "λ 0, 0.05, 0.2"]),
        ("rebalance", "rebalancing results", ["stage 1"]),
        (
            "rebalance/selection.json",
            "choice before the test split was read",
            ["selected iwb, λ = ", "(chosen on validation); ", " ± "],
        ),
        ("rebalance/test_hits.safetensors", "which test images each head got right", ["test images", "heads"]),
        ("rebalance/heads.safetensors", "rebalanced heads", ["10 classes × 16 features", "iwb, λ = 0.05: 2"]),
    ],
)
def test_every_artefact_says_what_it_is_and_what_made_it(run, part, kind, said):
    found = describe(run / part)
    assert found.kind == kind
    told = " ".join(str(found).split())  # as wide as the terminal
    assert [text for text in said if text not in told] == []
    assert "argv" in found.provenance
    assert "made by" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["kind"] == kind


@pytest.mark.parametrize(
    ("part", "kind", "fact"),
    [
        ("backbone/run.json", "record", None),
        ("rebalance/run.json", "record", None),
        ("rebalance/results.json", "results", "its test accuracy"),
        ("rebalance/selection.json", "choice", "selected"),
        ("rebalance/heads.safetensors", "heads", "kinds"),
        ("rebalance/test_hits.safetensors", "hits", "test images"),
        ("backbone/last.pt", "checkpoint", "network"),
    ],
)
def test_every_artefact_begins_with_a_header_whose_summary_info_prints(run, part, kind, fact):
    path = run / part
    if path.suffix == ".json":
        document = json.loads(path.read_text())
        assert next(iter(document)) == "header"
        header = document["header"]
    elif path.suffix == ".pt":
        header = torch.load(path, weights_only=True)["header"]
    else:
        with safe_open(path, "numpy") as file:
            header = json.loads(file.metadata()["header"])
    assert header["kind"] == kind
    assert header["format"] == FORMAT
    assert header["made_by"].startswith("iwb-pipeline ")
    facts = describe(path).facts
    assert header["summary"].items() <= facts.items()
    assert fact is None or header["summary"][fact]


def test_a_run_shows_the_settings_that_its_results_were_made_with(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    rebalance(copy / "features.zarr", RebalanceConfig(lam="0.07", epochs=1), out=copy / "rebalance", device="cpu")
    config = describe(copy).provenance["config"]
    assert config["rebalance"]["lam"] == "0.07"
    assert config["backbone"] == json.loads((copy / "backbone/run.json").read_text())["config"]["backbone"]


def test_a_folder_of_a_training_says_how_it_went_and_what_is_damaged(run, tmp_path):
    folder = Path(shutil.copytree(run / "backbone", tmp_path / "training"))
    facts = describe(folder).facts
    assert facts["last epoch told"].startswith("2, loss ")
    assert "(many " in facts["its training accuracy"]
    assert "(many " in facts["its validation accuracy"]
    assert facts["best epoch told"][0] in "12"
    best = facts["best epoch told"][0]
    assert describe(folder / "best.pt").facts["trained"] == f"the best of 2 epochs (epoch {best})"
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:-500])
    found = describe(folder)
    assert found.path.name == "previous.pt"
    assert found.facts["trained"].startswith("1 of 2 epochs, unfinished")
    assert "the same `pipeline train-backbone` command goes on from" in found.facts["damaged"]
    (folder / "previous.pt").unlink()
    with pytest.raises(DataError, match=r"last\.pt: not a readable checkpoint"):
        describe(folder)


def test_an_export_a_configuration_and_a_shipped_name(run, tmp_path):
    export_model(run, out=tmp_path / "model")
    found = describe(tmp_path / "model")
    assert (found.kind, found.facts["network"]) == ("exported model", "cifar_resnet8")
    assert describe(tmp_path / "model" / "config.json").kind == "exported model"
    head = describe(tmp_path / "model" / "stage1_head.safetensors")
    assert (head.kind, head.facts["weight"]) == ("head before rebalancing", "10 classes × 16 features")
    assert head.provenance["command"] == "export"
    (tmp_path / "model" / "stage1_head.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="run `pipeline export` again"):
        describe(tmp_path / "model" / "stage1_head.safetensors")
    (tmp_path / "my.yaml").write_text("data: {source: digits}\nbackbone: {epochs: 3}\n")
    assert describe(tmp_path / "my.yaml").facts["backbone"] == {"epochs": 3}
    assert describe(Path("digits-lt")).facts["name"] == "digits-lt"


def test_a_run_of_several_backbones(run, tmp_path):
    from pipeline.rebalance.combine_seeds import combine

    for seed in (0, 1):
        shutil.copytree(run, tmp_path / f"seed-{seed}")
    documents = [json.loads((run / "rebalance" / "results.json").read_text())] * 2
    (tmp_path / "results.json").write_text(json.dumps(combine(documents)))
    found = describe(tmp_path)
    assert found.kind == "run of 2 backbones"
    assert "mean over 2 backbones" in " ".join(str(found).split())
    assert found.facts["seed-1/features.zarr"].startswith("feature store, ")


def test_an_unfinished_store_says_how_far_it_is(tmp_path):
    found = describe(made_store(tmp_path / "features.zarr", seal=False))
    assert found.kind == "feature store, unfinished"
    assert found.facts["state"].startswith("open: 1 of 4 chunks")
    assert found.provenance["argv"] == ["pipeline", "dump-features"]


def test_anything_else_is_refused_with_what_was_expected(run, tmp_path):
    wrong = {"empty": None, "x.txt": "", "results.json": "[]", "run.json": "{}", "last.pt": "x", "a.yaml": "x: ["}
    wrong |= {"heads.safetensors": ""}
    for name, content in wrong.items():
        path = tmp_path / name
        path.mkdir() if content is None else path.write_text(content)
        with pytest.raises(DataError, match=name):
            describe(path)
    with pytest.raises(DataError, match=r"no such file or folder; expected a run's folder, a checkpoint \(last.pt, "):
        describe(tmp_path / "nowhere")
    document = json.loads((run / "rebalance" / "results.json").read_text())
    del document["selected"]["n"]
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"results\.json: selected\.n: field required"):
        describe(tmp_path / "results.json")


def test_a_timm_checkpoint_says_what_is_in_it(tmp_path):
    import torch

    from pipeline.backbone.build import build_model
    from pipeline.config import BackboneConfig

    state = build_model(BackboneConfig(model="resnet10t"), num_classes=7).state_dict()
    torch.save({"state_dict": state, "epoch": 12, "optimizer": {}}, tmp_path / "model.pth")
    found = describe(tmp_path / "model.pth")
    assert found.kind == "weights from elsewhere"
    assert found.facts["taken from"] == "state_dict"
    assert found.facts["last linear layer"] == "fc.weight: 7 × 512"
    assert found.facts["epoch"] == 12
    assert found.facts["next"] == f"pipeline dump-features CONFIG --checkpoint {tmp_path / 'model.pth'}"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 7}))
    (tmp_path / "model.pth").rename(tmp_path / "pytorch_model.bin")
    assert describe(tmp_path).facts["network"].startswith("resnet10t, as ")


def test_whatever_a_command_leaves_is_known(run, tmp_path, monkeypatch, capsys):
    """Ablations, comparisons, plain files, tries, a reproduction and what it keeps, progress, a benchmark."""
    from pipeline.cli import invoke

    monkeypatch.chdir(tmp_path)
    store = run / "features.zarr"
    ablation = {
        "rebalance": {"lam": "0.1", "epochs": 1, "seeds": [0], "variants": [{"name": "HC", "set": {"number": False}}]}
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(ablation))
    (tmp_path / "diagnosed" / "backbone").mkdir(parents=True)
    lines = [f"{e},{c},{n},{50 + c},0.1" for e in (1, 2) for c, n in enumerate((20, 2))]
    text = "epoch,class,images,accuracy,gradient\n" + "\n".join(lines) + "\n"
    (tmp_path / "diagnosed" / "backbone" / "diagnostics.csv").write_text(text)
    small = ["--set", "backbone.epochs=1", "--set", "backbone.width=0.25"]
    made = {
        "ablation": ["rebalance", store, "--config", "mine.yaml", "--out", "ablation"],
        "rebalancing results": ["rebalance", store, "--method", "ncm", "--epochs", "1", "--out", "compared"],
        "features as plain files": ["export", store, "--out", "plain"],
        "settings tried in stage 1": [
            "train-backbone",
            "digits-lt",
            "--try",
            "backbone.lr=0.1,0.2",
            *small,
            "--out",
            "tried",
        ],
        "progress of trainings compared": ["progress", "diagnosed", "--out", "progress"],
    }
    for kind, words in made.items():
        assert invoke(list(map(str, words))) == 0, words
        found = describe(Path(words[-1]))
        assert found.kind == kind
        assert "file(s)" in found.facts["size"]
        (Path(words[-1]) / "report.html").touch()
        (Path(words[-1]) / "figures").mkdir(exist_ok=True)
        assert describe(Path(words[-1])).kind == kind
        json.dumps(found.to_dict())
    assert describe(Path("ablation")).facts["  HC"].startswith("iwb, λ = 0.1: all ")
    assert describe(Path("ablation/ablation.json")).kind == "ablation"
    assert describe(Path("ablation/selection.json")).facts["  HC"] == "iwb, λ = 0.1 (given)"
    assert not_a_store(Path("ablation")).startswith(" (it is: ablation)")
    assert "ncm" in describe(Path("compared")).facts["tuned, best on the choosing split"][-1]
    assert describe(Path("tried/tries.json")).facts["  lr=0.1"].startswith("all ")
    assert describe(Path("progress")).facts["compares"] == ["diagnosed"]
    assert describe(Path("mine.yaml")).facts["variants"] == ["HC"]
    assert describe(Path("ablations/table3")).kind == "settings of stage 2"
    capsys.readouterr()


def test_a_reproduction_and_a_benchmark_as_they_are_shipped():
    docs = Path(__file__).parents[1] / "docs"
    assert describe(docs / "reproduction.json").kind == "reproduction of the paper's tables"
    found = describe(docs / "bench" / "cache.json")
    assert found.kind == "bench cache"
    assert found.facts["  load over np.load, float16"].endswith("(met)")
    assert found.provenance["git"]


def test_what_reproduce_keeps(run, tmp_path):
    from pipeline.reproduce.bundle import keep_files

    shutil.copytree(run, tmp_path / "place")
    shutil.copytree(run / "rebalance", tmp_path / "place" / "methods")
    keep_files(tmp_path / "place", tmp_path / "kept", documents=["methods"])
    found = describe(tmp_path / "kept")
    assert found.kind == "kept of a reproduction"
    assert "train 363 × 16" in found.facts["features"]
    assert found.facts["tables"] == ["methods"]


def test_weights_from_elsewhere_are_told_how_they_are_taken(tmp_path):
    import torch
    from safetensors.torch import save_file
    from torch import nn

    layer = nn.Linear(2, 2)
    torch.save(layer.state_dict(), tmp_path / "sd.pt")
    torch.save(layer.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(layer.state_dict(), tmp_path / "w.safetensors")
    torch.save(layer, tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("sd.pt", "old.pth", "w.safetensors"):
        assert describe(tmp_path / name).facts["next"].endswith(str(tmp_path / name))
    wanted = {
        "whole.pt": "have it saved anew where it was made: torch.save(model.state_dict(), ",
        "text.pt": "text.pt: not a PyTorch or safetensors file",
    }
    for name, said in wanted.items():
        with pytest.raises(DataError) as refused:
            describe(tmp_path / name)
        assert said in str(refused.value), name
        assert not any(text in str(refused.value) for text in ("--overwrite", "run it again", "eights only", "\x1b"))


def test_verify_reads_every_byte(tmp_path):
    run = made_run(tmp_path / "run", lam="0.1")
    store = run / "features.zarr"
    assert verify(store).chunks == 4
    assert "every checksum holds" in str(verify(store))
    chunk = store / "train" / "features" / "c" / "1" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DataError, match=r"1 damaged file\(s\)\n  train/features/c/1/0/0(.|\n)*dump-features"):
        verify(store)
    with pytest.raises(DataError, match="no such feature store"):
        verify(tmp_path / "nowhere.zarr")


def test_doctor_really_computes_and_says_so():
    found = doctor()
    assert found.ok, str(found)
    assert [check.name for check in found.checks] == ["libraries", "network", "store", "stage 2", "processes"]
    assert found.device in ("cpu", "cuda", "cuda:0")
    assert found.versions["torch"]
    text = str(found)
    assert "all is well" in text
    assert found.why in " ".join(text.split())  # it may be wrapped
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True
    assert (", shared memory " in text) == SHARED.exists()


def test_little_shared_memory_is_told_with_what_docker_calls_it(tmp_path):
    (told,) = _warnings(memory=16.0, shared=0.0625, disk=100.0, folder=tmp_path)
    assert "only 0.06 GiB of shared memory" in told
    assert "--shm-size 8g" in told
    assert not _warnings(memory=16.0, shared=8.0, disk=100.0, folder=tmp_path)
    assert not _warnings(memory=None, shared=None, disk=100.0, folder=tmp_path)


def test_what_is_told_is_as_wide_as_the_terminal_and_tears_no_number_from_its_name(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    text = str(describe(run / "rebalance"))
    assert max(map(len, text.splitlines())) <= 70 + len(str(run))
    for width in range(40, 100):
        (first, *more) = wrapped("kinds  ", "iwb, λ = 0.05: 2, iwb (cb, λ = 0.2): 2, all 1.0 ± 0.2", width, indent=7)
        assert not [line for line in (first, *more) if line.rstrip().endswith(("=", "±", "λ"))]
        assert " ".join([first, *map(str.strip, more)]).endswith("iwb (cb, λ = 0.2): 2, all 1.0 ± 0.2")


def test_doctor_knows_the_kernel_the_extras_and_what_takes_how_long(monkeypatch):
    from pipeline.rebalance.engine import c_backend as native

    monkeypatch.setenv("COLUMNS", "80")
    found = doctor()
    assert found.kernel[:1] == tuple(native.instruction_sets())[:1]
    assert found.extras.keys() >= {"s3", "huggingface", "tensorboard"}
    assert not found.extras.keys() & {"dev", "docs"}
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "the self-test took" in text
    assert "missing (pip install 'iwb-pipeline[s3]')" in str(dataclasses.replace(found, extras={"s3": ("obstore",)}))


def test_doctor_finds_a_kernel_that_computes_something_else(monkeypatch, capsys):
    """Heads of the kernel a tenth larger: the fit separates the classes all the same, the comparison tells."""
    from pipeline.cli import invoke
    from pipeline.rebalance.engine import fit as engine

    whole = engine.fit_with_c_kernel

    def wrong(*given, **named):
        for members, weight, bias in whole(*given, **named):
            yield members, 1.1 * weight, bias

    if not engine.instruction_sets():
        pytest.skip("no C kernel here")
    monkeypatch.setattr(engine, "fit_with_c_kernel", wrong)
    assert invoke(["doctor"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "FAILED stage 2: RuntimeError: heads of the same fit differ by" in told
    assert told.endswith("something is wrong: see FAILED above")


def test_a_check_that_fails_is_a_finding():
    found = _check("division", lambda: str(1 / 0))
    assert not found.ok
    assert found.said == "ZeroDivisionError: division by zero"
