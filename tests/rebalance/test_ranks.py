"""Ranks that share every batch find the heads of one process; ranks that share the heads find each of them."""

import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cache import StoreSplit, create_store
from pipeline.config import RebalanceConfig
from pipeline.rebalance import rebalance
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
from pipeline.rebalance.engine.objective import penalty

COUNTS = np.array([23, 11, 6, 3, 2])
SHORT = Schedule(epochs=3, lr=0.05, momentum=0.9, weight_decay=0.01, batch_size=8)
ROWS = np.arange(41)  # the last batch is one sample: most ranks then have none
RULES = [
    penalty(hardness=hardness, direction=direction, divergence=divergence, detach_target=detach, kl_weight=weight)
    for hardness, direction, divergence, detach, weight in [
        *itertools.product(
            ["vector", "scalar", "none"], ["norms-to-target", "target-to-norms"], ["kl"], [True, False], [0.7, "batch"]
        ),
        *itertools.product(["vector", "scalar", "none"], ["norms-to-target"], ["mse"], [True, False], [0.7, "batch"]),
    ]
]
HEADS = [Head(loss, 0.4, rule) for rule in RULES for loss in ("cb-softmax", "cb-bce")] + [
    Head("ce"),
    Head("cb-softmax"),
]


def features() -> Features:
    random = np.random.default_rng(5)
    labels = random.permutation(np.repeat(np.arange(5), COUNTS))
    views = random.normal(size=(5, 6))[labels] + random.normal(size=(3, len(labels), 6))
    return Features(views, labels, COUNTS, random.normal(size=(5, 6)), random.normal(size=5))


def one_rank(rank: int, world: int, port: int, out: str) -> None:
    from pipeline.distributed import ranks

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with ranks("cpu") as shared:
        weight, bias = fit_heads(
            features(), HEADS, seeds=(0, 3), schedule=SHORT, rows=ROWS, dtype=torch.float64, ranks=shared
        )
    np.savez(f"{out}/{rank}.npz", weight=weight, bias=bias)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_share_the_batches_find_the_heads_of_one(world, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.rebalance.engine.fit"])
    processes = [context.Process(target=one_rank, args=(r, world, port, str(tmp_path))) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world
    alone = fit_heads(features(), HEADS, seeds=(0, 3), schedule=SHORT, rows=ROWS, dtype=torch.float64)
    for rank in range(world):
        found = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(found["weight"], alone[0], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(found["bias"], alone[1], rtol=1e-10, atol=1e-10)


def sealed(path: Path) -> Path:
    """A store of the same features with a validation and a test split."""
    known, random = features(), np.random.default_rng(1)
    held = {name: np.repeat(np.arange(5), 6) for name in ("val", "test")}
    splits = {"train": StoreSplit(3, known.labels, np.arange(len(known.labels)))}
    splits |= {name: StoreSplit(1, labels, np.arange(len(labels))) for name, labels in held.items()}
    head = {"weight": known.weight, "bias": known.bias, "class_names": list("abcde"), "counts": COUNTS}
    with create_store(path, splits=splits, width=6, dtype="float32", fingerprint={}, provenance={}, **head) as writer:
        for chunk in writer.missing():
            writer.write(chunk, known.views[chunk.view] if chunk.split == "train" else random.normal(size=(30, 6)))
        writer.seal()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["rows", "heads"])
def test_the_command_gives_the_same_table_on_two_processes(spread, tmp_path):
    store = sealed(tmp_path / "f.zarr")
    config = RebalanceConfig(lam="0.1:0.9:lin:5", seeds=(0, 3), epochs=3, lr=0.05, method=("iwb", "ncm"), trials=4)
    alone = rebalance(store, config, out=tmp_path / "alone")
    words = ["--lam", "0.1:0.9:lin:5", "--seeds", "0,3", "--epochs", "3", "--lr", "0.05", "--method", "iwb"]
    words += ["--method", "ncm", "--trials", "4", "--nproc", "2", "--spread", spread, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "rebalance", store, *words, "--out", tmp_path / "two"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["settings"]["ranks"] == 2
    assert told["selected"]["lam"] == alone.selected["lam"]
    assert [row["all"] for row in told["results"]] == [row.all for row in alone.results]
    heads = [dict(load_file(tmp_path / of / "heads.safetensors")) for of in ("alone", "two")]
    np.testing.assert_allclose(heads[0]["weight"], heads[1]["weight"], atol=1e-5)
    assert not list((tmp_path / "two").glob("*.tmp"))


@pytest.mark.slow
def test_a_mistake_is_told_once_by_two_processes(tmp_path):
    words = [sys.executable, "-m", "pipeline", "rebalance", sealed(tmp_path / "f.zarr"), "--lam", "7", "--nproc", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.count("expected λ in [0, 1]") == 1
