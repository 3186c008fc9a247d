"""`import pipeline`: everything in one place, typed, documented, quick to import, and results that print well."""

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest

import pipeline
from tests.small_run import made_run

FUNCTIONS = [name for name in pipeline.__all__ if callable(getattr(pipeline, name)) and name[0].islower()]
RESULTS = [name for name in pipeline.__all__ if name[0].isupper() and dataclasses.is_dataclass(getattr(pipeline, name))]
FIXED = {"iwb_objective": 6}  # positional parameters of the loss, as it is written


def test_what_commands_do_is_in_one_place():
    wanted = "train_backbone dump_features rebalance evaluate run_pipeline write_report export_model predict describe"
    wanted += (
        " doctor verify open_cache iwb_objective load_config load_dataset reproduce compare_progress sweep_hparams"
    )
    assert set(wanted.split()) <= set(FUNCTIONS)
    assert {"DumpResult", "RebalanceResult", "RunResult", "TrainResult", "Diagnosis", "Artefact"} <= set(RESULTS)
    assert dir(pipeline) == pipeline.__all__


def test_type_checkers_see_what_is_there():
    tree = ast.parse(inspect.getsource(pipeline))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    assert sorted(alias.name for line in typed.body for alias in line.names) == pipeline.__all__
    for package in ("pipeline", "cache"):
        assert (files(package) / "py.typed").is_file()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_what_goes_wrong(name):
    function = getattr(pipeline, name)
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert len(positional) <= FIXED.get(name, 2), name
    assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
    assert signature.return_annotation is not signature.empty
    doc = inspect.getdoc(getattr(function, name) if isinstance(function, ModuleType) else function)
    assert (
        "Error" in doc or "raise" in doc.lower() or name in ("doctor", "bench_cache", "bench_rebalance", "bench_train")
    ), doc


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_frozen_and_documented(name):
    of = getattr(pipeline, name)
    assert of.__dataclass_params__.frozen, name
    assert of.__doc__, name
    assert not of.__doc__.startswith(f"{name}("), name  # dataclasses write that where nothing is said
    if name.startswith("Prepared") and name != "Prepared":
        assert hasattr(of, "description") or "description" in of.__dataclass_fields__, name
    elif name not in ("Checkpoint", "Dataset", "ExternalBackbone", "Prediction"):
        assert issubclass(of, pipeline.text.Shown), name
        assert callable(of.to_dict), name


@pytest.mark.parametrize("before", ["", "import pipeline.rebalance.run, pipeline.doctor"])
def test_modules_that_bear_a_functions_name_are_called_as_it(before):
    """Whatever was imported first: the module takes the attribute's place when it loads."""
    code = f"""{before}
import inspect, pipeline
from pipeline.rebalance import rebalance
assert pipeline.rebalance.rebalance is rebalance
for name in ("rebalance", "doctor", "reproduce"):
    module = getattr(pipeline, name)
    assert inspect.signature(module) == inspect.signature(getattr(module, name)), name
try:
    pipeline.rebalance("nowhere.zarr")
except pipeline.PipelineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nowhere.zarr: no such feature store" in done.stdout


def test_importing_it_loads_nothing():
    code = "import sys, pipeline; print([m for m in ('torch', 'numpy', 'rich', 'zarr') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute nothing"):
        _ = pipeline.nothing


def test_results_print_as_commands_show_them(tmp_path):
    """Without settings: those of the store, beside which everything goes."""
    run = made_run(tmp_path / "run", lam="0.1")
    store = run / "features.zarr"
    evaluated = pipeline.evaluate(store)
    assert evaluated.heads == str(run / "rebalance" / "heads.safetensors")
    assert "iwb, λ = 0.1" in str(evaluated)
    assert evaluated._repr_html_().startswith("<pre>Accuracy on test in %")
    assert "&lt;" not in pipeline.describe(store)._repr_html_()
    again = pipeline.rebalance(store, pipeline.RebalanceConfig(lam="0.1", epochs=1, seeds=(0,)))
    assert again.out == str(run / "rebalance")
    assert "iwb, λ = 0.1" in str(again)
    for result in (evaluated, again, pipeline.verify(store), pipeline.describe(run)):
        json.dumps(result.to_dict(), allow_nan=False)
        assert "object at 0x" not in str(result)
        assert not str(result).startswith(type(result).__name__), result


def test_every_package_is_in_the_wheel():
    import tomllib

    root = Path(pipeline.__file__).parents[1]
    found = {
        ".".join(file.parent.relative_to(root).parts)
        for of in ("pipeline", "cache")
        for file in (root / of).rglob("__init__.py")
    }
    listed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert found | {"pipeline.configs"} == set(listed)
