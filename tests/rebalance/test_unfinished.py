"""A rebalance that is stopped or killed keeps its finished methods, and the same command goes on to the same bytes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import invoke
from pipeline.config import RebalanceConfig
from pipeline.errors import Terminated
from pipeline.rebalance import ablate, compare, rebalance, unfinished
from pipeline.rebalance.sweep import Sweep
from tests import ranks
from tests.small_run import made_store

QUICK: dict = {"epochs": 2, "batch_size": 32, "lr": 0.02, "seeds": (0, 1), "trials": 4}
TUNED = RebalanceConfig(
    method=("recommended", "crt", "disalign"), **QUICK
)  # a method of each kind, a gated head among them
FOLDS = RebalanceConfig(method=("iwb", "logistic", "ensemble"), select_on="kfold", **QUICK)
LAMBDAS = RebalanceConfig(lam="auto", **QUICK)
CONFIGS = {"tuned": TUNED, "folds": FOLDS, "lambdas": LAMBDAS}


def contents(folder: Path) -> dict[str, object]:
    """Every file of results: its bytes, of JSON without the times and the record of who made it."""
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("run.json",) and not path.name.endswith(".tmp"):
            files[str(path.relative_to(folder))] = path.read_bytes()
    document = json.loads((folder / "results.json").read_text())
    for name in ("timing", "header", "out", "store"):  # the store by its path from the folder; its digest stays
        document.pop(name, None)
    return files | {"results.json": document}


def in_child(store: Path, out: Path, config: RebalanceConfig, kill: str, *, thinned: bool = False) -> int:
    """Return the exit code of a process that rebalances and is killed at a moment.

    Arguments:
        thinned: let a product take a second, which is more than a budget of a second allows.
    """
    process = ranks._context.Process(target=_rebalance, args=(store, out, config, kill, thinned))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _rebalance(store: Path, out: Path, config: RebalanceConfig, kill: str, thinned: bool) -> None:
    os.environ["PIPELINE_KILL_AT"] = kill
    if thinned:
        compare.product_seconds = lambda **size: 1.0
    try:
        rebalance(store, config, out=out, device="cpu")
    except Terminated as stop:
        os._exit(stop.exit_code)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The store, and the results of each configuration when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    store = made_store(folder / "features.zarr")
    for name, config in CONFIGS.items():
        rebalance(store, config, out=folder / name, device="cpu")
    return store, {name: contents(folder / name) for name in CONFIGS}


def storm() -> list[tuple[str, list[str]]]:
    """Twenty moments, drawn once: of each configuration, some runs killed twice before they are done."""
    random = np.random.default_rng(14)
    pieces = {"tuned": 11, "folds": 5, "lambdas": 2}
    kills = []
    for n in range(17):
        name = ("tuned", "tuned", "folds", "lambdas")[n % 4]
        moments = np.sort(random.choice(pieces[name], size=1 + n % 2, replace=False) + 1)
        kills.append(
            (name, [f"{('before', 'within', 'after')[(n + i) % 3]}:method-{m}" for i, m in enumerate(moments)])
        )
    return kills + [("tuned", [f"{when}:results"]) for when in ("before", "within", "after")]


FEW = [
    ("tuned", ["after:method-2", "within:method-7"]),
    ("folds", ["after:method-4"]),
    ("lambdas", ["before:method-2"]),
]


@pytest.mark.parametrize(
    ("name", "kills"), [*FEW, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in storm())], ids=str
)
def test_a_killed_rebalance_goes_on_to_the_same_bytes(undisturbed, tmp_path, name, kills):
    store, expected = undisturbed
    for kill in kills:
        code = in_child(store, tmp_path / "out", CONFIGS[name], kill)
        assert code == (-signal.SIGXFSZ if kill.startswith("within") else -signal.SIGKILL), kill
    rebalance(store, CONFIGS[name], out=tmp_path / "out", device="cpu")
    assert contents(tmp_path / "out") == expected[name]
    assert not (tmp_path / "out" / "unfinished").exists()


def test_finished_methods_are_not_fitted_again(undisturbed, tmp_path, monkeypatch):
    store, _ = undisturbed
    assert in_child(store, tmp_path, TUNED, "after:method-10") == -signal.SIGKILL  # all but iwb at λ = 0
    fitted: list[str] = []
    add = Sweep.add
    monkeypatch.setattr(
        Sweep, "add", lambda self, heads, **kw: (fitted.extend(map(str, heads)), add(self, heads, **kw))[1]
    )
    lines: list[str] = []
    rebalance(store, TUNED, out=tmp_path, device="cpu", report=lines.append)
    assert len(fitted) == 1
    assert fitted[0].startswith("equal norms")
    assert lines[0].startswith("goes on: 10 finished part(s) are taken from ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_what_is_kept_and_what_to_type(undisturbed, tmp_path, monkeypatch, number, code, capsys):
    store, _ = undisturbed

    def raised(self, method, *rest):
        if method == "crt":
            signal.raise_signal(number)
        return fit_rival(self, method, *rest)

    fit_rival = Sweep._fit_rival
    monkeypatch.setattr(Sweep, "_fit_rival", raised)
    options = [f"--set=rebalance.{k}={json.dumps(v)}" for k, v in QUICK.items()] + [
        "--method=recommended",
        "--method=crt",
    ]
    words = ["rebalance", str(store), "--out", str(tmp_path / "out"), "--device=cpu", "--method=disalign", *options]
    assert invoke(words) == code
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        message
        == f"stopped; 9 finished part(s) of the work are kept in {tmp_path / 'out/unfinished'}: the same command goes on"
    )
    assert not (tmp_path / "out/results.json").exists()


def test_a_signal_before_the_first_method_keeps_nothing(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(Sweep, "add", lambda *args, **kw: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Terminated, match="nothing is kept; the same command begins again"):
        rebalance(undisturbed[0], TUNED, out=tmp_path, device="cpu")


def test_other_settings_and_other_stores_take_nothing_up(undisturbed, tmp_path):
    store, _ = undisturbed
    assert in_child(store, tmp_path / "out", LAMBDAS, "after:method-1") == -signal.SIGKILL
    changed = LAMBDAS.model_copy(update={"epochs": 3})
    other = made_store(tmp_path / "features.zarr", seed=1)
    for place, config in ((store, changed), (other, LAMBDAS)):
        lines: list[str] = []
        assert in_child(store, tmp_path / "out", LAMBDAS, "before:results") == -signal.SIGKILL
        result = rebalance(place, config, out=tmp_path / "out", device="cpu", report=lines.append)
        (note,) = [line for line in lines if "finished part(s)" in line]
        assert note.startswith(
            f"{tmp_path / 'out/unfinished'} also holds 2 finished part(s) of a stopped command with other"
        )
        alone = rebalance(place, config, out=tmp_path / "alone", device="cpu")
        assert result.results == alone.results
        assert not (tmp_path / "out" / "unfinished").exists()


def test_a_damaged_part_is_fitted_anew(undisturbed, tmp_path):
    store, expected = undisturbed
    assert in_child(store, tmp_path, LAMBDAS, "before:results") == -signal.SIGKILL
    first, second = sorted((tmp_path / "unfinished").rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"nothing")
    lines: list[str] = []
    rebalance(store, LAMBDAS, out=tmp_path, device="cpu", report=lines.append)
    assert [line.partition(":")[0] for line in lines[1:3]] == ["note", "note"]
    assert contents(tmp_path) == expected["lambdas"]


def test_a_full_disk_loses_nothing_that_was_finished(undisturbed, tmp_path, monkeypatch):
    store, expected = undisturbed
    write, written = unfinished.write_durably, []

    def full(path, content):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(unfinished, "write_durably", full)
    with pytest.raises(OSError, match="No space left"):
        rebalance(store, TUNED, out=tmp_path, device="cpu")
    assert len(list((tmp_path / "unfinished").rglob("*.safetensors"))) == 2
    lines: list[str] = []
    rebalance(store, TUNED, out=tmp_path, device="cpu", report=lines.append)
    assert lines[0].startswith("goes on: 2 finished part(s)")
    assert contents(tmp_path) == expected["tuned"]


def test_finished_variants_of_an_ablation_are_taken_up(undisturbed, tmp_path, monkeypatch):
    store, _ = undisturbed
    variants = [{"name": "alone", "set": {"method": ["cb"]}}, {"name": "iwb", "set": {"lam": "0.1,0.2"}}]
    config = RebalanceConfig.model_validate({**QUICK, "lam": "0.1", "variants": variants})
    expected = ablate(store, config, out=tmp_path / "alone", device="cpu")
    fit_engine = Sweep._fit_engine
    monkeypatch.setattr(
        Sweep, "_fit_engine", lambda self, *a: signal.raise_signal(2) if len(a[1]) > 1 else fit_engine(self, *a)
    )
    with pytest.raises(Terminated, match="1 finished part"):
        ablate(store, config, out=tmp_path / "out", device="cpu")
    monkeypatch.setattr(Sweep, "_fit_engine", fit_engine)
    assert ablate(store, config, out=tmp_path / "out", device="cpu").heads == expected.heads
    assert not (tmp_path / "out" / "unfinished").exists()
