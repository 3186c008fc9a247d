"""The command contract: names, defaults, exit codes, JSON. Every command runs as a real process at least once."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from pipeline.cli import invoke
from tests.conftest import digits_tree


def pipeline(*words, cwd, env=None):
    """A real `pipeline` process: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {}),
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the three commands were typed as they stand, on a small pipeline.yaml."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(digits_tree()))
    said = [
        pipeline(*words, cwd=folder)
        for words in (["train-backbone"], ["dump-features"], ["rebalance", "--lam", "0.05"])
    ]
    return folder, said


def test_the_three_commands_as_they_stand(finished):
    folder, said = finished
    assert [code for code, _, _ in said] == [0, 0, 0], said
    run = folder / "runs" / "tiny"
    for name in ("backbone/last.pt", "backbone/best.pt", "backbone/metrics.jsonl", "features.zarr/zarr.json"):
        assert (run / name).is_file(), name
    for name in ("results.json", "results.csv", "heads.safetensors", "run.json"):
        assert (run / "rebalance" / name).is_file(), name
    results = json.loads((run / "rebalance" / "results.json").read_text())
    assert results["selected"]["lam"] == 0.05
    assert results["selected"]["chosen_on"] is None  # nothing was chosen: there was one λ
    for (_, _, err), took in zip(said, ("pipeline.yaml", "last.pt", "features.zarr"), strict=True):
        assert took in err  # each says what it took
    counts = "images per class: 110 78 55 39 27 19 14 9 7 5"
    assert all(counts in err and "fingerprint: " in err for _, _, err in said[:2])


def test_without_any_configuration_the_digits_are_taken(tmp_path):
    code, out, err = pipeline("train-backbone", "--json", "--set", "backbone.epochs=1", cwd=tmp_path)
    assert code == 0, err
    assert json.loads(out)["checkpoint"] == "runs/digits-lt/backbone/last.pt"


@pytest.mark.slow
def test_another_name_is_another_run_in_every_command(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "pipeline.yaml").write_text((folder / "pipeline.yaml").read_text())
    for words in (["train-backbone", "--set", "backbone.epochs=1"], ["dump-features"], ["rebalance", "--lam", "0.05"]):
        code, _, err = pipeline(*words, "--set", "name=other", cwd=tmp_path)
        assert code == 0, err
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["other"]
    assert (tmp_path / "runs/other/rebalance/results.json").is_file()


def test_rebalance_json_follows_the_contract(finished):
    folder, _ = finished
    code, out, err = pipeline("rebalance", "--lam", "0.05,0.2", "--json", "--out", "other", cwd=folder)
    assert code == 0, err
    document = json.loads(out)
    assert {"store", "fingerprint", "baseline", "selected", "results", "timing"} <= document.keys()
    assert {"method", "loss", "lam", "chosen_on", "n", "all", "all_std", "many", "medium", "few", "ece"} <= document[
        "selected"
    ].keys()
    assert document["selected"]["chosen_on"] == "val"
    assert document["selected"]["lam"] in (0.05, 0.2)
    assert {"load_s", "fit_s", "heads"} <= document["timing"].keys()
    for row in document["results"]:
        assert {"method", "loss", "lam", "seed", "split", "all", "many", "medium", "few", "ece"} <= row.keys()
    methods = {(r["method"], r["lam"]) for r in document["results"]}
    assert {("cb", None), ("iwb", 0.0), ("iwb", 0.05), ("iwb", 0.2)} <= methods


@pytest.mark.slow
def test_verify_and_info_and_report_and_evaluate(finished):
    folder, _ = finished
    for words in (
        ["verify"],
        ["info", "runs/tiny/features.zarr"],
        ["info", "runs/tiny"],
        ["report"],
        ["evaluate"],
        ["doctor"],
    ):
        code, out, err = pipeline(*words, "--json", cwd=folder)
        assert code == 0, (words, err)
        assert isinstance(json.loads(out), dict), words
    assert (folder / "runs/tiny/report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_export_and_predict(finished):
    """Real digits through the exported model: the labels it gives are those of the digits it was trained on."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    folder, _ = finished
    bunch = load_digits()
    for label in (0, 1):
        row = np.flatnonzero(bunch.target == label)[0]
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.round(bunch.images[row] * (255 / 16)).astype(np.uint8)).save(folder / f"photos/{label}.png")
    (folder / "photos" / "torn.png").write_bytes(b"no image")
    code, out, err = pipeline("export", "--out", "model", "--json", cwd=folder)
    assert code == 0, err
    assert (folder / "model" / "README.md").is_file()
    code, out, err = pipeline("predict", "model", "photos", "--json", "--compare", cwd=folder)
    assert code == 0, err
    document = json.loads(out)
    assert [os.path.basename(p["path"]) for p in document["predictions"]] == ["0.png", "1.png"]
    assert all(len(p["top"]) == 3 and p["top"][0]["probability"] > 0.1 for p in document["predictions"])
    assert len(document["skipped"]) == 1
    assert "torn.png" in document["skipped"][0]
    code, out, err = pipeline("predict", "model", "photos/torn.png", cwd=folder)
    assert code == 3
    assert "torn.png" in err
    code, out, err = pipeline("predict", "model", "photos", "--format", "csv", cwd=folder)
    assert out.splitlines()[0].startswith("path,class_1,probability_1")


def test_a_damaged_store_is_found_and_repaired(finished):
    folder, _ = finished
    chunk = folder / "runs/tiny/features.zarr/train/features/c/1/0/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    for words in (["verify"], ["rebalance", "--lam", "0.05"]):
        code, _, err = pipeline(*words, cwd=folder)
        assert code == 3, (words, err)
        assert "c/1/0/0" in err
        assert "Traceback" not in err
    assert pipeline("dump-features", cwd=folder)[0] == 0
    assert chunk.read_bytes() == whole
    assert pipeline("verify", cwd=folder)[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train"], 2, "No such command"),
        (["train-backbone", "nowhere"], 2, "nowhere"),
        (["train-backbone", "digit-lt"], 2, "did you mean digits-lt"),
        (["train-backbone", "--set", "backbone.epocs=3"], 2, "did you mean epochs"),
        (["train-backbone", "--set", "backbone.epochs"], 2, "KEY=VALUE"),
        (["train-backbone", "--set", "backbone.model=resnet51"], 2, "did you mean"),
        (["train-backbone", "--device", "cuda"], 2, "--device cpu"),
        (["train-backbone", "--device", "tpu"], 2, "expected auto, cpu"),
        (["train-backbone", "--set", "data.source=folder", "--set", "data.path=nowhere"], 3, "no such folder"),
        (["dump-features"], 3, "pipeline train-backbone"),
        (["dump-features", "--views", "0"], 2, "--views"),
        (["rebalance", "--lam", "0.05"], 3, "pipeline dump-features"),
        (["rebalance", "nowhere.zarr"], 3, "nowhere.zarr"),
        (["run", "digits-lt", "--seeds", "0,a"], 2, "--seeds 0,a"),
        (["verify", "nowhere.zarr"], 3, "nowhere.zarr"),
        (["info", "nowhere"], 3, "nowhere"),
        (["report", "nowhere"], 3, "nowhere"),
    ],
)
def test_a_wrong_call_says_what_to_type(words, code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(words) == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 12


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--lam", "1.5"], 2, "1.5"),
        (["--lam", "a"], 2, "a"),
        (["--lam", "0.05", "--method", "iwbb"], 2, "iwb"),
        (["--lam", "0.05", "--kl-weight", "-1"], 2, "kl_weight"),
        (["--lam", "0.05", "--seeds", "1,1"], 2, "--seeds"),
    ],
)
def test_a_wrong_rebalance_says_what_to_type(finished, words, code, says, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    assert invoke(["rebalance", *words]) == code
    assert says in capsys.readouterr().err


def test_errors_are_json_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["dump-features", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 3
    assert "no such checkpoint" in document["error"]


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert invoke(["train-backbone", "--out", "file/backbone", "--set", "backbone.epochs=1"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_help_loads_nothing_heavy(tmp_path):
    code = (
        "import sys; from pipeline.cli import invoke; invoke(['rebalance', '--help']); "
        "print([m for m in ('torch', 'timm', 'zarr', 'numpy', 'pydantic', 'sklearn') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert "pipeline rebalance" in done.stdout


COMMANDS = (
    "run train-backbone dump-features rebalance evaluate report progress export predict info verify doctor reproduce"
)


@pytest.mark.parametrize("command", COMMANDS.split())
def test_every_command_has_help_with_an_example(command, capsys):
    assert invoke([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example:" in out
    assert f"pipeline {command}" in out.split("Example:")[1]
    assert "--json" in out


def every_command():
    """(words, command) of all commands, those of groups too."""
    from pipeline.cli import cli

    for name, command in cli.commands.items():
        yield [name], command
        for inner, of in getattr(command, "commands", {}).items():
            yield [name, inner], of


def test_every_help_fits_80_columns_and_its_example_is_understood(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words, command in every_command():
        assert invoke([*words, "--help"]) == 0
        help_text = capsys.readouterr().out
        assert max(map(len, help_text.splitlines())) <= 80, words
        if "Example:" in help_text:
            line = shlex.split(help_text.split("Example:")[1])
            if line[0] == "pipeline":
                assert line[1 : len(words) + 1] == words
                command.make_context(words[-1], line[len(words) + 1 :])  # raises a usage error where it is wrong


def test_commands_stand_in_the_order_of_use(capsys):
    assert invoke(["--help"]) == 0
    told = [line.split()[0] for line in capsys.readouterr().out.split("Commands:")[1].splitlines() if line.strip()]
    stages = ["run", "train-backbone", "dump-features", "rebalance", "evaluate", "report", "export", "predict"]
    at = [told.index(name) for name in stages]
    assert at == sorted(at)


def test_a_run_of_several_backbones_is_named_with_one_of_them(tmp_path, capsys):
    (tmp_path / "seed-3" / "features.zarr").mkdir(parents=True)
    assert invoke(["rebalance", str(tmp_path)]) == 3
    assert f"a run of several backbones; name one of them, such as {tmp_path}/seed-3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train-backbone"], 2, "`pipeline run --seeds 1,2,10` goes on with it"),
        (["train-backbone", "--dry-run"], 2, "take another --out"),
        (["dump-features"], 3, "name one of them, such as --checkpoint runs/digits-lt/seed-1/backbone/last.pt"),
    ],
)
def test_the_commands_do_not_mix_one_backbone_into_a_run_of_several(words, code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (10, 2, 1):
        (tmp_path / f"runs/digits-lt/seed-{seed}/backbone").mkdir(parents=True)
        (tmp_path / f"runs/digits-lt/seed-{seed}/backbone/last.pt").touch()
    assert invoke(words) == code
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs/digits-lt/backbone").exists()


def test_what_commands_do_is_told_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], ["bench"]):
        assert invoke([*command, "--help"]) == 0
        assert "..." not in capsys.readouterr().out.split("Commands:")[1]
