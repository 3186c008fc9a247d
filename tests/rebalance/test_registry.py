"""A method of one's own, from a file that `--method` names or from a program, beside the others."""

import csv
import json

import pytest

from pipeline.cli import invoke
from pipeline.config import RebalanceConfig
from pipeline.errors import ConfigError
from pipeline.rebalance import rebalance
from pipeline.rebalance.candidates import method_names
from pipeline.rebalance.methods import Free, add_method
from tests.small_run import made_store

OWN = """
from pipeline.rebalance.methods import Free

def scaled(given, samples, own):
    return given.weight * own["factor"], given.bias

METHOD = Free("scaled", scaled, grid=({"factor": 1.0}, {"factor": 2.0}, {"factor": 50.0}))
"""


pytestmark = pytest.mark.usefixtures("methods_as_before")


def test_a_file_is_tuned_tested_and_exported_beside_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scaled.py").write_text(OWN)
    made_store(tmp_path / "features.zarr")
    words = ["rebalance", "features.zarr", "--method", "scaled.py", "--method", "crt", "--trials", "2", "--epochs", "2"]
    assert invoke([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {c["method"]: c["trials"] for c in document["chosen"]} == {"cb": 2, "scaled": 3, "crt": 2}
    tested = [row for row in document["results"] if row["method"] == "scaled" and row["split"] == "test"]
    assert len(tested) == 1  # no training, so no batch order
    lines = (tmp_path / "rebalance/trials.csv").read_text().splitlines()
    tried = [row for row in csv.DictReader(lines) if row["method"] == "scaled"]
    assert [json.loads(row["parameters"]) for row in tried] == [{"factor": f} for f in (1.0, 2.0, 50.0)]
    assert len({row["all"] for row in tried}) > 1
    assert invoke(["evaluate", "features.zarr"]) == 0
    assert "scaled" in capsys.readouterr().out


def test_a_program_adds_one_and_all_includes_it(tmp_path):
    add_method(Free("stage-1-negated", lambda given, samples, own: (-given.weight, -given.bias)))
    made_store(tmp_path / "features.zarr")
    config = RebalanceConfig(method=("stage-1-negated", "baseline"), epochs=1, seeds=(0,), trials=1)
    rows = rebalance(tmp_path / "features.zarr", config, out=tmp_path / "out").results
    found = {row.method: row.all for row in rows if row.split == "test"}
    assert found["stage-1-negated"] < found["baseline"]
    assert method_names(("all",))[-1] == "stage-1-negated"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("from pipeline.rebalance.methods import TRAINED\nMINE = TRAINED[0]", "defines no method"),
        (OWN.replace('"scaled"', '"crt"'), "a method called crt is there already"),
    ],
)
def test_a_file_without_a_new_method_is_refused(tmp_path, text, told):
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        rebalance(made_store(tmp_path / "s.zarr"), RebalanceConfig(method=(str(file),)), out=tmp_path / "out")
