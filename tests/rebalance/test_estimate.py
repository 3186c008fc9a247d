"""The estimate of how long fitting takes: its arithmetic, on a machine whose products take a known time."""

import numpy as np
import pytest
import torch

from pipeline.config import RebalanceConfig
from pipeline.rebalance import estimate, rebalance
from pipeline.rebalance.engine.c_backend import instruction_sets
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.estimate import FitProgress, comparison_seconds, comparison_work, estimate_text, product_seconds
from tests.small_run import made_store

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
    """Five products of 512 rows, the clock one second on at each look: 1 s for 512 rows, 1,000 s for 512,000."""
    clock = iter(range(100))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(clock)))
    assert product_seconds(512, 512, 512, CPU) == 1.0
    assert product_seconds(512_000, 512, 512, CPU) == 1000.0


def test_progress_ends_where_the_count_says(tmp_path):
    """The work that fits report is the work that was counted, for every method that is fitted by gradient."""
    moved: list[tuple[float, str]] = []
    config = RebalanceConfig(
        method=("iwb", "crt", "logistic"), tune=True, epochs=3, seeds=(0, 1), trials=4, batch_size=32
    )
    ticks = dict.fromkeys(comparison_work(config), 0.0)
    progress = FitProgress.tick

    def counted(self, heads=0.0, epochs=0.0, passes=0.0):
        ticks[self.part.rpartition(" ")[2]] += epochs
        progress(self, heads, epochs, passes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitProgress, "tick", counted)
        rebalance(
            made_store(tmp_path / "s.zarr"), config, out=tmp_path / "out", device="cpu",
            move=lambda done, total, note: moved.append((done / total, note)),
        )  # fmt: skip
    work = comparison_work(config)
    iwb_shared = 3 * 2  # the curve of λ holds the best trial, and iwb at λ = 0 is fitted when the methods are done
    assert ticks["cb"] == pytest.approx(work["cb"].epochs)
    assert ticks["crt"] == pytest.approx(work["crt"].epochs)
    assert work["iwb"].epochs - iwb_shared <= ticks["iwb"] <= work["iwb"].epochs + iwb_shared
    assert [done for done, _ in moved] == sorted(done for done, _ in moved)
    assert moved[0] == (0, "method 1 of 4: cb")
    assert moved[-1][1].startswith("method 4 of 4: logistic, ")


@pytest.mark.parametrize("kernel", [*instruction_sets(), None])
def test_every_backend_reports_each_epoch_of_each_head(kernel):
    random, done = np.random.default_rng(0), []
    labels = np.repeat(np.arange(3), (50, 20, 7))
    views = [random.normal(size=(77, 4)).astype(np.float32) for _ in range(2)]
    features = Features(views, labels, np.bincount(labels), np.zeros((3, 4), np.float32), np.zeros(3, np.float32))
    if kernel == "double":
        pytest.skip("is for float64")
    fit_heads(
        features, [Head("ce"), Head("cb-softmax")], seeds=(0, 1, 2), schedule=Schedule(epochs=2, batch_size=16), kernel=kernel,
        tick=done.append,
    )  # fmt: skip
    assert sum(done) == pytest.approx(2 * 2 * 3)
