"""Class D: what the environment leaves behind changes no result, and nothing is lost or printed that should not be."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cache import CacheError, locate
from pipeline import distributed
from pipeline.backbone.training_dir import refuse_among_images
from pipeline.cli import invoke
from pipeline.config import DataConfig
from pipeline.distributed import Signals
from pipeline.errors import DATA, OK, USAGE, ConfigError, PipelineError, Terminated
from pipeline.text import printable

KEPT = Path(__file__).parents[1] / "golden" / "format-0.1"
JOB = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}


def pipeline(*words: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | options.pop("env", {})
    return subprocess.run([sys.executable, "-m", "pipeline", *words], env=environment, timeout=120, **options)


@pytest.mark.parametrize("left", [JOB, {"RANK": "3"}, {"WORLD_SIZE": "x"}, {"MASTER_ADDR": "host"}, {"RANK": ""}])
@pytest.mark.parametrize("words", [["info", str(KEPT / "one")], ["config", "digits-lt"]])
def test_commands_of_one_process_ignore_what_a_job_left(left, words, monkeypatch, capfd):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert invoke(words) == OK
    assert capfd.readouterr().out


@pytest.mark.parametrize(
    "left",
    [{"RANK": "1"}, {"WORLD_SIZE": "2"}, JOB | {"RANK": "2"}, JOB | {"MASTER_PORT": "http"}, JOB | {"WORLD_SIZE": "²"}],
)
def test_commands_of_several_processes_need_the_whole_set(left, monkeypatch, capfd, tmp_path):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert invoke(["train-backbone", "digits-lt", "--out", str(tmp_path / "out")]) == USAGE
    assert "unset " in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_job_whose_others_never_come_ends_with_a_message(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(distributed, "JOIN", distributed.datetime.timedelta(seconds=2))
        for name, value in (JOB | {"MASTER_PORT": str(other.getsockname()[1]), "RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PipelineError, match="another program has this port"):
            distributed._meeting_point(2)
    with pytest.raises(PipelineError, match="not all of 2 processes came within 0:00:02"):
        distributed._meeting_point(2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_after_the_last_look_is_not_forgotten(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Terminated) as caught, Signals():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_of_few_letters_gets_question_marks(encoding):
    done = pipeline("info", str(KEPT / "one"), env={"PYTHONIOENCODING": encoding}, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (OK, False)
    assert b"? = 0.02" in done.stdout


def test_an_output_that_is_closed_or_full_ends_without_a_traceback():
    words = [sys.executable, "-m", "pipeline", "config", "digits-lt"]
    for target, code in (("&-", OK), ("/dev/full", 1)):
        script = f'"$@" >{target}'
        done = subprocess.run(["sh", "-c", script, "sh", *words], stderr=subprocess.PIPE, timeout=120)
        assert (done.returncode, b"Traceback" in done.stderr, b"Exception ignored" in done.stderr) == (
            code,
            False,
            False,
        )


def test_keys_and_passwords_of_urls_are_never_printed(capfd, tmp_path):
    with pytest.raises(CacheError, match=r"s3://…@bucket/x: a URL with a password") as caught:
        locate("s3://AKIA:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)
    assert invoke(["info", "s3://AKIA:hunter2@bucket/x"]) != OK
    assert invoke(["report", "s3://AKIA:hunter2@bucket/x"]) != OK
    said = capfd.readouterr()
    assert "hunter2" not in said.out + said.err
    assert printable("no answer from http://me:hunter2@host:9000/b") == "no answer from http://…@host:9000/b"


INSIDE = ["features.zarr", "features.zarr/val", "backbone", "rebalance", "model"]
WRITERS = {
    "export": [str(KEPT / "one"), "--dry-run"],
    "import-features": ["x.npz", "--dry-run"],
    "progress": [str(KEPT / "one")],
    "report": [str(KEPT / "one"), "--dry-run"],
    **{name: ["digits-lt", "--dry-run"] for name in ("train-backbone", "dump-features", "run")},
    "rebalance": [str(KEPT / "one"), "--dry-run"],
    "reproduce": ["table1"],
    "predict": [str(KEPT / "exported"), "x.png"],
}


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """A run with a store, a training, results and an exported model."""
    run = shutil.copytree(KEPT / "one", tmp_path_factory.mktemp("artefacts") / "one")
    (run / "backbone/last.pt").touch()
    shutil.copytree(KEPT / "exported", run / "model")
    (run / "model/model.onnx").touch()
    return run


@pytest.mark.parametrize("out", ["", " ", *(f"{inside}/out" for inside in INSIDE)])
@pytest.mark.parametrize("command", WRITERS)
def test_nothing_is_written_to_an_empty_path_or_into_an_artefact(command, out, artefacts, capfd):
    before = sorted(artefacts.rglob("*"))
    assert invoke([command, *WRITERS[command], "--out", str(artefacts / out) if out.strip() else out]) == USAGE
    assert ("holds nothing else" if out.strip() else "an empty path") in " ".join(capfd.readouterr().err.split())
    assert sorted(artefacts.rglob("*")) == before


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("command", sorted(WRITERS.keys() - {"export", "predict"}))
def test_nothing_is_written_by_default_where_the_working_folder_lies_in_an_artefact(
    command, inside, artefacts, monkeypatch, capfd
):
    monkeypatch.chdir(artefacts / inside)
    before = sorted(artefacts.rglob("*"))
    assert invoke([command, *WRITERS[command]]) == USAGE
    assert "holds nothing else" in " ".join(capfd.readouterr().err.split())
    assert sorted(artefacts.rglob("*")) == before
    assert invoke(["info", "."]) == (OK if inside != "features.zarr/val" else DATA)


def test_a_gpu_whose_driver_is_too_old_ends_work_and_is_named(monkeypatch, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue"
    )
    monkeypatch.setattr(distributed, "ROOT", tmp_path)
    monkeypatch.setattr(distributed.torch.version, "cuda", "13.0")
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"made for CUDA 13\.0, cannot use it with driver 470\.57\.02.*--device cpu"):
        distributed.choose_device("auto")
    assert distributed.choose_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.choose_device("auto").type == "cpu"


@pytest.mark.parametrize("inside", ["Train/cat/run", "Val/run", "Test"])
def test_no_run_is_written_among_the_images_of_any_split(inside, tmp_path):
    for split in ("Train", "Val", "Test"):
        (tmp_path / split / "cat").mkdir(parents=True)
    data = DataConfig(source="folder", path=tmp_path)
    with pytest.raises(ConfigError, match="lies among the class folders"):
        refuse_among_images(tmp_path / inside, data)
    refuse_among_images(tmp_path / "run", data)


def test_a_limit_of_memory_is_one_line(tmp_path):
    words = [sys.executable, "-m", "pipeline", "train-backbone", "digits-lt", "--out", str(tmp_path / "out")]
    script = 'ulimit -v 600000; exec "$@"'
    done = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr.count("Error") >= 1
    assert "not enough memory" in done.stderr
    assert "ulimit -v" in " ".join(done.stderr.split())


# root without the right to open what it may not read
UNPRIVILEGED = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if not os.getuid() else []
)


@pytest.mark.skipif(bool(UNPRIVILEGED) and not shutil.which("setpriv"), reason="root, and no setpriv")
@pytest.mark.parametrize(("name", "command", "code"), [("a.yaml", "config", USAGE), ("a.pt", "info", DATA)])
def test_a_file_without_permission_is_not_readable_rather_than_not_there(name, command, code, tmp_path):
    (tmp_path / name).touch(mode=0)
    words = [*UNPRIVILEGED, sys.executable, "-m", "pipeline", command, str(tmp_path / name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    said = " ".join(done.stderr.split())
    assert (done.returncode, "Traceback" in said) == (code, False), said
    assert "ermission denied" in said or "not readable" in said or "cannot be read" in said
    assert "no such" not in said.lower()
