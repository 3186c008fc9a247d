"""Shared by all tests: one thread per process (two cores, many processes) and small real runs."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads, and for every process that a test starts

os.environ["CACHE_LEASE_SECONDS"] = "1.5"  # as short as a busy machine allows: tests wait for dead writers


def digits_tree(**backbone):
    """Plain tree of a small run on the bundled digits: seconds on one core."""
    return {
        "name": "tiny",
        "data": {
            "source": "digits",
            "subset": "exponential",
            "max_per_class": 110,
            "imbalance_factor": 22,
            "augment": "crop",
        },
        "backbone": {
            "model": "cifar_resnet8",
            "width": 0.25,
            "epochs": 2,
            "batch_size": 64,
            "lr": 0.1,
            "weight_decay": 5e-4,
        }
        | backbone,
        "dump": {"views": 3},
        "rebalance": {"lam": "0.05,0.2", "seeds": [0, 1], "epochs": 2},
    }


@pytest.fixture
def tiny_config():
    from pipeline.config import make_config

    return make_config(digits_tree(), "tiny")


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory) -> Path:
    """last.pt of a two-epoch digits run."""
    from pipeline.backbone.train import train_backbone
    from pipeline.config import make_config

    out = tmp_path_factory.mktemp("tiny") / "backbone"
    return train_backbone(make_config(digits_tree(), "tiny"), out=out).checkpoint


@pytest.fixture
def methods_as_before():
    """Methods that a test adds are gone after it."""
    from pipeline.method_names import METHODS
    from pipeline.rebalance.methods import RIVALS

    names, rivals = dict(METHODS), dict(RIVALS)
    yield
    for known, kept in ((METHODS, names), (RIVALS, rivals)):
        known.clear()
        known.update(kept)


@pytest.fixture(scope="session")
def moto_bucket():
    """A bucket of a local S3 server, for all tests."""
    from tests.s3_servers import moto

    with moto() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def seaweedfs_bucket(tmp_path_factory):
    """A bucket of another, independent one."""
    from tests.s3_servers import seaweedfs

    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as bucket:
        yield bucket


@pytest.fixture(params=["moto", pytest.param("seaweedfs", marks=pytest.mark.slow)])
def bucket(request, monkeypatch):
    """Each of the servers, with the environment that leads to it."""
    found = request.getfixturevalue(f"{request.param}_bucket")
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def url(bucket, request):
    """A place in the bucket that no other test uses, its name awkward on purpose."""
    return bucket.url(f"{request.node.name}/a b%20ü.zarr")
