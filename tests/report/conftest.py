import json

import pytest

from tests.small_run import made_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """One backbone, three λ, two batch orders."""
    return made_run(tmp_path_factory.mktemp("report") / "one")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Three backbones with their joint choice."""
    from pipeline.rebalance.combine_seeds import combine
    from pipeline.results.differences import read_hits

    folder = tmp_path_factory.mktemp("report") / "three"
    parts = [made_run(folder / f"seed-{s}", seed=s) for s in (0, 2, 10)]
    documents = [json.loads((p / "rebalance" / "results.json").read_text()) for p in parts]
    hits = [read_hits(p / "rebalance" / "test_hits.safetensors") for p in parts]
    (folder / "results.json").write_text(json.dumps(combine(documents, hits)))
    return folder
