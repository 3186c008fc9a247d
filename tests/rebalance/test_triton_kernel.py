"""The GPU's kernel, interpreted: the engine with it finds what it finds without, and stays within what it may use."""

import subprocess
import sys

import pytest
import torch

from pipeline.rebalance.engine import tensor_backend as by_stacks
from pipeline.rebalance.engine.tensor_backend import Residence, fuses, why_no_kernel

SCRIPT = """
import itertools
from functools import partial
import numpy as np, torch
from pipeline.rebalance.engine import tensor_backend as by_stacks
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.objective import penalty

random, counts = np.random.default_rng(5), np.array([23, 11, 6, 3, 2])
labels = random.permutation(np.repeat(np.arange(5), counts))
views = random.normal(size=(5, 6))[labels] + random.normal(size=(3, len(labels), 6))
features = Features(views, labels, counts, random.normal(size=(5, 6)), random.normal(size=5))
schedule = Schedule(epochs=2, lr=0.05, weight_decay=0.01, batch_size=8)
heads = [Head("ce"), Head("cb-bce", 0.3, penalty("code")), Head("cb-softmax", 0.5, penalty(hardness="scalar"))]
heads += [Head("cb-softmax", lam, penalty()) for lam in (0.2, 0.6)] + [Head("cb-softmax", 0.4, penalty(divergence="mse"))]
fit = partial(fit_heads, features, heads, seeds=(0, 3), schedule=schedule, kernel=None)
plain = fit()
calls = 0
from pipeline.rebalance.engine import triton_kernel as fused
update = fused.update
def counting(*arguments, **more):
    global calls
    calls += 1
    update(*arguments, **more)
fused.update = counting
by_stacks.fuses = lambda *_: True
for got, expected in zip(fit(), plain, strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-5)
assert calls > 10
"""


def test_a_step_that_ends_in_one_kernel_is_the_step_in_single_operations():
    pytest.importorskip("triton", reason="torch for this system brings no Triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=200,
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
    )
    assert done.returncode == 0, done.stderr


def test_where_triton_cannot_start_a_kernel_steps_are_single_operations(monkeypatch):
    """As on a GPU without a C compiler; here the device is none of Triton's."""
    cuda = torch.device("cuda")
    assert why_no_kernel(torch.device("cpu"))
    monkeypatch.setattr(by_stacks, "why_no_kernel", lambda device: "RuntimeError: Failed to find C compiler")
    assert not fuses(cuda, torch.float32, None)
    monkeypatch.setattr(by_stacks, "why_no_kernel", lambda device: None)
    assert fuses(cuda, torch.float32, None)
    assert not fuses(cuda, torch.float64, None)
    assert not fuses(torch.device("cpu"), torch.float32, None)


def test_views_stay_on_a_device_while_they_fit():
    meta = torch.device("meta")
    views = [torch.zeros(10, 4) for _ in range(3)]  # 160 bytes each
    roomy, tight, none = (Residence(meta, budget) for budget in (480, 170, 100))
    placed = [roomy(view, i) for i, view in enumerate(views)]
    assert all(view.device == meta for view in placed)
    assert [roomy(view, i) for i, view in enumerate(views)] == placed
    first = tight(views[0], 0)
    assert tight(views[0], 0) is first
    tight(views[1], 1)
    assert tight(views[0], 0) is not first
    assert none(views[0], 0) is views[0]
    assert tight(views[0], None).device == meta
