"""Free memory and usable cores: the container's limits count, at whatever depth of the control groups they stand."""

import os

import numpy as np
import pytest
import torch

from pipeline import resources
from pipeline.errors import PipelineError
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads

GIB = 1 << 30


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A function that writes files of a host with 8 GiB free, whose process is in the control group /job/task."""

    def write(**files):
        texts = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 8388608 kB\n", "proc/self/cgroup": "0::/job/task\n"}
        for name, text in (texts | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(resources, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    return write


def limit(group, maximum, current=0, inactive_file=0):
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": f"{maximum}\n",
        f"{folder}/memory.current": f"{current}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive_file}\n",
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 * GIB),
        (limit("/job/task", "max"), 8 * GIB),
        (limit("/job/task", 4 * GIB, current=GIB), 3 * GIB),
        (limit("/job/task", 4 * GIB, current=3 * GIB, inactive_file=2 * GIB), 3 * GIB),  # cached files make room
        (limit("/job/task", "max") | limit("/job", 2 * GIB), 2 * GIB),
        (limit("", GIB), GIB),  # a container without a namespace of its own sees its limits at the mount
        (limit("", GIB) | {"proc/self/cgroup": "0::/\n"}, GIB),
        (limit("/job", GIB, current=2 * GIB), 0),
        ({"proc/self/cgroup": "1:memory:/job\n"}, 8 * GIB),
        ({"proc/meminfo": ""}, resources.ASSUMED_MEMORY),
    ],
)
def test_free_memory(host, files, free):
    host(**files)
    assert resources.free_memory() == resources.free_memory(torch.device("cpu")) == free


def test_memory_that_no_system_tells_is_not_measured(host):
    assert resources.measured_free_memory() is None


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({}, 16),
        ({"/job/task": "max 100000"}, 16),
        ({"/job/task": "400000 100000"}, 4),
        ({"/job/task": "150000 100000"}, 2),
        ({"/job/task": "max 100000", "/job": "300000 100000"}, 3),
        ({"": "10000 100000"}, 1),
    ],
)
def test_usable_cores(host, quotas, cores):
    host(**{f"sys/fs/cgroup{group}/cpu.max": f"{text}\n" for group, text in quotas.items()})
    assert resources.usable_cores() == cores


def test_the_engine_keeps_to_the_limit_of_its_container(host):
    labels = np.arange(20) % 4
    features = Features(
        [np.ones((20, 3), np.float32)],
        labels,
        np.bincount(labels),
        np.ones((4, 3), np.float32),
        np.zeros(4, np.float32),
    )

    def fit():
        return fit_heads(features, [Head("ce")] * 10, seeds=[0], schedule=Schedule(epochs=1, lr=0.1, batch_size=4))

    host(**limit("/job/task", GIB))
    fit()
    host(**limit("/job/task", GIB, current=GIB - 500))
    with pytest.raises(PipelineError, match=r"10 heads in 1 batch orders take 0\.0 GB of memory"):
        fit()


def test_as_many_readers_as_the_container_has_cores(host):
    from pipeline.config import DataConfig

    host(**{"sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert DataConfig(source="digits").workers == 2
