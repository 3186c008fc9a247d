"""Training through torch.compile: the same numbers, from as many graphs as an epoch has batch sizes."""

import functools
import shutil

import pytest
import torch

from pipeline.backbone.train import train_backbone
from pipeline.config import make_config
from pipeline.errors import ConfigError
from tests.conftest import digits_tree

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the compiler's own


def last(out, **backbone):
    return train_backbone(make_config(digits_tree(epochs=2, **backbone), "t"), out=out).last


def test_two_batch_sizes_are_two_graphs_of_fixed_shape(tmp_path, monkeypatch):
    """363 images in batches of 60 and 61; a graph of any size would be one more, and slower."""
    shapes = []

    def traced(graph, inputs):
        sizes = {size for tensor in inputs if isinstance(tensor, torch.Tensor) for size in tensor.shape}
        shapes.append(sorted(size for size in sizes if isinstance(size, torch.SymInt) or size in (60, 61)))
        return graph.forward

    monkeypatch.setenv("CXX", "true")  # this backend calls no compiler
    real = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda module, mode, **how: real(module, backend=traced, **how))
    compiled = last(tmp_path / "compiled", compile="default", mixup=0.2)
    assert sorted(shapes) == [[60], [61]]
    assert compiled["loss"] == pytest.approx(last(tmp_path / "plain", mixup=0.2)["loss"], rel=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_compiled_network_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    settings = {"batch_size": 363, "epochs": 3, "width": 0.25}
    run = functools.partial(train_backbone, report=lambda event: None)
    losses = [
        run(make_config(digits_tree(compile=mode, **settings), "t"), out=tmp_path / mode).last["loss"]
        for mode in ("none", "default")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"backbone\.compile=default: on a CPU it needs g\+\+"):
        last(tmp_path / "out", compile="default")
