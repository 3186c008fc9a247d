"""What the engine is measured against does the same work, and the figures say what they are named for."""

from dataclasses import replace

import numpy as np
import torch

from pipeline.bench import rebalance as bench
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.objective import penalty

SMALL = bench.Size("small", 150, 8, 10, Schedule(batch_size=16, epochs=2), views=3)


def test_the_usual_loop_finds_the_head_that_the_engine_finds():
    """One batch of everything: the two loops draw other orders."""
    features = SMALL.features()
    schedule = Schedule(batch_size=SMALL.rows, epochs=4, lr=0.05)
    loop = bench.the_usual_loop(features, 0.4, schedule, torch.device("cpu"))
    weight, bias = fit_heads(features, [Head("cb-softmax", 0.4, penalty())], seeds=(0,), schedule=schedule)
    np.testing.assert_allclose(loop.weight.detach(), weight[0, 0], atol=1e-5)
    np.testing.assert_allclose(loop.bias.detach(), bias[0, 0], atol=1e-5)


def test_sizes_are_those_of_the_data_sets():
    features = bench.CIFAR.features()
    assert features.views[0].shape == (10_847, 64)
    assert len(features.views) == 11
    assert (features.counts.max(), features.counts.min()) == (500, 5)


def test_a_run_tells_every_measure(monkeypatch):
    monkeypatch.setattr(bench, "CIFAR", SMALL)
    monkeypatch.setattr(bench, "IMAGENET", replace(SMALL, name="ImageNet-LT"))
    monkeypatch.setattr(bench, "INATURALIST", replace(SMALL, name="iNaturalist2018"))
    result = bench.bench_rebalance(repeat=1, device="cpu")
    values = {measure.name: measure.value for measure in result.measures}
    assert values["loop_ratio"] > 1
    assert {"per_head_ratio", "gemm_ratio, ImageNet-LT", "iwb_over_ce, ImageNet-LT", "iwb_over_ce, small"} <= set(
        values
    )
    assert result.settings["device"] == "cpu"
    assert result.machine["threads"] == torch.get_num_threads()
