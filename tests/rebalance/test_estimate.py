"""The estimate of how long fitting takes: its arithmetic, on a machine whose products take a known time."""

import pytest
import torch

from pipeline.config import RebalanceConfig
from pipeline.rebalance import estimate
from pipeline.rebalance.estimate import comparison_seconds, estimate_text, product_seconds

CPU = torch.device("cpu")
SIZE = {"rows": 1000, "width": 64, "classes": 10, "device": CPU}


@pytest.fixture
def known(monkeypatch):
    """A product over all samples takes 0.1 s, exponentials nothing."""
    monkeypatch.setattr(estimate, "product_seconds", lambda *size: 0.1)
    monkeypatch.setattr(estimate, "LOGIT_SECONDS", 0.0)


@pytest.mark.usefixtures("known")
def test_heads_times_epochs_times_two_products():
    config = RebalanceConfig(
        method=("ncm",), trials=6, epochs=5, seeds=(0, 1)
    )  # cb stands beside it: 6 trials, once more
    assert comparison_seconds(config, **SIZE) == (7, pytest.approx(7 * 5 * 2 * 0.1))
    rival = RebalanceConfig(method=("crt",), trials=6, epochs=5, seeds=(0, 1))
    assert comparison_seconds(rival, **SIZE) == (14, pytest.approx((1 + estimate.AUTOGRAD) * 7 * 5 * 2 * 0.1))
    convex = RebalanceConfig(method=("logistic",), trials=6, epochs=5, seeds=(0, 1))
    assert comparison_seconds(convex, **SIZE)[1] == pytest.approx((70 + estimate.CONVEX_PASSES) * 0.1)


@pytest.mark.usefixtures("known")
def test_what_takes_less_is_named_where_it_is_long():
    short = estimate_text(RebalanceConfig(method=("ncm",), epochs=1, seeds=(0,)), **SIZE)
    assert short == "tuning 2 methods, at most 20 heads by gradient: about 4 s on a quiet machine like this"
    long = estimate_text(RebalanceConfig(epochs=1000), **SIZE)
    assert long.endswith(
        "about 4 h on a quiet machine like this; fewer methods (--method), fewer trials (--trials) or a GPU take less"
    )


def test_a_product_of_few_rows_is_scaled_up(monkeypatch):
    """Three products of 512 rows, the clock one second on at each look: 1 s for 512 rows, 1,000 s for 512,000."""
    clock = iter(range(100))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(clock)))
    assert product_seconds(512, 512, 512, CPU) == 1.0
    assert product_seconds(512_000, 512, 512, CPU) == 1000.0
