"""Workers that die, or tell an error, under the launcher of --nproc."""

import json
import logging
import os
import subprocess
import sys

import pytest
import yaml

from pipeline.cli import cli
from pipeline.cli.exit_codes import exit_code
from tests.conftest import digits_tree
from tests.hosts import ROOT

pytestmark = pytest.mark.slow


def train(folder, *words, program=("-m", "pipeline"), **environment):
    """A finished `pipeline train-backbone` of one epoch with six steps, its checkpoints in folder/out."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(digits_tree(epochs=1)))
    command = [sys.executable, *program, "train-backbone", "tiny.yaml", "--out", "out", "--device", "cpu", *words]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=120)


def test_killed_workers_are_told_once_and_with_restarts_started_again(tmp_path):
    armed = {"PIPELINE_KILL_AT": "after:step-4"}
    done = train(tmp_path, "--nproc", "2", "--json", **armed)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Error") == 1
    assert "was killed (SIGKILL" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 1
    done = train(tmp_path, "--json", "--max-restarts", "1", **armed)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all start again and go on from what is finished") == 1
    assert json.loads(done.stdout)["epochs"] == 1
    assert "Error" not in done.stderr


def test_an_error_that_was_told_is_not_tried_again(tmp_path):
    done = train(tmp_path, "--nproc", "2", "--max-restarts", "3", "--set", "data.max_per_class=5000")
    assert done.returncode == 2
    assert done.stderr.count("max_per_class=5000: class 0 would need") == 1
    assert "start again" not in done.stderr


def test_what_workers_inherit_is_not_left_in_a_process_that_goes_on(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(digits_tree(epochs=1)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = dict(os.environ)
    assert exit_code(cli, ["train-backbone", "tiny.yaml", "--out", "out", "--device", "cpu", "--nproc", "2"]) == 0
    assert {**os.environ, "TORCH_CPP_LOG_LEVEL": ""} == {**before, "TORCH_CPP_LOG_LEVEL": ""}
    assert logging.root.manager.disable == 0


def test_under_your_own_torchrun_a_lost_fellow_is_told_once(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "pipeline")
    done = train(tmp_path, program=torchrun, PIPELINE_KILL_AT="after:step-4@1")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("another process of this job ended without a word") == 1, done.stderr
