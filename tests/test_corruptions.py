"""A hundred corruptions of a sealed store, drawn once: all found by who verifies and by who reads, and all mended."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch

from cache import CacheError, open_cache
from pipeline.backbone.checkpoint import load_checkpoint, weights_digest
from pipeline.backbone.train import train_backbone
from pipeline.config import find_config, load_config
from pipeline.dump import dump_features
from pipeline.errors import DataError
from pipeline.info import verify
from pipeline.rebalance.load import load
from tests.test_dump_kills import chunk_rows, contents

SETTINGS = ["backbone.epochs=1", "dump.views=3", "dump.batch_size=32", "data.workers=0"]
SMALL = ["train/labels", "train/ids", "val/labels", "test/ids", "classifier/weight", "classifier/bias"]
METADATA = [
    "train",
    "test",
    "classifier",
    "train/features",
    "val/features",
    "test/labels",
    "train/ids",
    "classifier/bias",
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    config = load_config(find_config("digits-lt"), SETTINGS)
    return load_checkpoint(train_backbone(config, out=tmp_path_factory.mktemp("backbone")).checkpoint)


@pytest.fixture(scope="module", autouse=True)
def equal_conditions():
    """One thread, and chunks of 75 rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache.layout.CHUNK_ROWS", 75)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory) -> Path:
    return dump_features(backbone, backbone.config, out=tmp_path_factory.mktemp("whole") / "f.zarr").store


@pytest.fixture(scope="module")
def other(backbone, tmp_path_factory) -> Path:
    """A sealed store of the same shape, from another seed of the views and after one more weight."""
    config = backbone.config.model_copy(update={"dump": backbone.config.dump.model_copy(update={"seed": 1})})
    stranger = load_checkpoint(backbone.path)
    with torch.no_grad():
        next(stranger.model.parameters()).mul_(1.01)
    return dump_features(stranger, config, out=tmp_path_factory.mktemp("other") / "f.zarr").store


def sealed_in_form(content: bytes) -> bytes:
    """A chunk file whose own checksum is right."""
    return content + google_crc32c.value(content).to_bytes(4, "little")


def flip(file: Path, random, _) -> None:
    data = bytearray(file.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    file.write_bytes(data)


def truncate(file: Path, random, _) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: random.integers(len(data))])


def grow(file: Path, random, _) -> None:
    file.write_bytes(file.read_bytes() + random.bytes(int(random.integers(1, 5000))))


def lose(file: Path, random, _) -> None:
    file.unlink()


def wipe(file: Path, random, _) -> None:
    """Zeros with their right checksum, as a careless repair would leave them."""
    file.write_bytes(sealed_in_form(bytes(file.stat().st_size - 4)))


def stale(file: Path, random, others: Path) -> None:
    file.write_bytes((others / file.relative_to(file.parents[5])).read_bytes())


def swap(file: Path, random, _) -> None:
    files = [f for f in sorted(file.parents[2].glob("*/*/0")) if f.stat().st_size == file.stat().st_size and f != file]
    partner = files[random.integers(len(files))]
    ours, theirs = file.read_bytes(), partner.read_bytes()
    file.write_bytes(theirs)
    partner.write_bytes(ours)


def relabel(file: Path, random, _) -> None:
    """One number of labels or ids is another one, checksum and all."""
    numbers = np.frombuffer(file.read_bytes()[:-4], "<i8").copy()
    numbers[random.integers(len(numbers))] ^= 1
    file.write_bytes(sealed_in_form(numbers.tobytes()))


def reshape(file: Path, random, _) -> None:
    """Metadata that say another thing and are good JSON."""
    text = file.read_text()
    key = ["shape", "chunk_shape", "fill_value", "node_type", "zarr_format"][random.integers(5)]
    file.write_text(text.replace(f'"{key}"', f'"{key}_"') if f'"{key}"' in text else text + " ")


def recount(file: Path, random, _) -> None:
    """A class count that no longer is that of the labels."""
    document = json.loads(file.read_text())
    document["attributes"]["counts"][int(random.integers(10))] += 1
    file.write_text(json.dumps(document))


def storm() -> list[tuple[int, str, str]]:
    """(number, kind of file, what happens to one), a hundred times."""
    random, drawn = np.random.default_rng(100), []
    kinds = {
        "features": [flip, flip, truncate, grow, lose, wipe, stale, swap, stale, swap],
        "small": [flip, flip, truncate, grow, lose],
        "numbers": [relabel],
        "metadata": [flip, truncate, lose, reshape],
        "root": [flip, truncate, recount],
    }
    for number in range(100):
        kind = random.choice(list(kinds), p=[0.55, 0.17, 0.08, 0.12, 0.08])
        what = kinds[kind][random.integers(len(kinds[kind]))]
        drawn.append((number, str(kind), what.__name__))
    return drawn


def target(kind: str, store: Path, random) -> Path:
    of = {
        "features": sorted(store.glob("*/features/c/*/*/0")),
        "small": [next(p for p in (store / name).glob("c/**/0") if p.is_file()) for name in SMALL],
        "numbers": [store / f"{name}/c/0" for name in SMALL[:4]],
        "metadata": [store / name / "zarr.json" for name in METADATA],
        "root": [store / "zarr.json"],
    }[kind]
    return of[random.integers(len(of))]


def read_as_stage_2_does(store: Path) -> None:
    """Everything that `rebalance` reads, and the ids."""
    loaded = load(store, augmented=True)
    for view in range(len(loaded.features.views)):
        loaded.features.views[view]
    loaded.test()
    cache = open_cache(store)
    for split in cache.splits:
        cache.ids(split)


def corrupted(number: int, kind: str, what: str, whole: Path, other: Path, folder: Path) -> tuple[Path, list[str]]:
    """(a damaged copy of the store, the files that are no longer what they were)."""
    random, store = np.random.default_rng([7, number]), folder / "f.zarr"
    shutil.copytree(whole, store)
    globals()[what](target(kind, store, random), random, other)
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    same = {n for n in names if (store / n).exists() and (store / n).read_bytes() == (whole / n).read_bytes()}
    return store, [n for n in names if n not in same]


@pytest.mark.parametrize(
    ("number", "kind", "what"),
    [pytest.param(n, k, w, marks=[] if n < 8 else pytest.mark.slow, id=f"{n}-{k}-{w}") for n, k, w in storm()],
)
def test_every_corruption_is_found_by_all_and_mended(number, kind, what, backbone, whole, other, tmp_path):
    store, changed = corrupted(number, kind, what, whole, other, tmp_path)
    of_chunk = chunk_rows(whole)
    assert changed, "nothing was damaged"
    with pytest.raises(DataError) as verifying:
        verify(store)
    with pytest.raises((DataError, CacheError)) as reading:
        read_as_stage_2_does(store)
    assert reading.value.exit_code == verifying.value.exit_code == 3
    if kind == "root":
        for error in (verifying, reading):
            assert "zarr.json is damaged" in str(error.value)
            assert f"dump again: pipeline dump-features … --out {store} --overwrite" in str(error.value)
        with pytest.raises(DataError, match=r"zarr\.json is damaged"):
            dump_features(backbone, backbone.config, out=store)
        again = dump_features(backbone, backbone.config, out=store, overwrite=True)
    else:
        for name in changed:
            assert name in str(verifying.value)
            if name in of_chunk:
                assert f"{name} (view {name.split('/')[3]}, rows " in str(verifying.value)
        assert any(name in str(reading.value) for name in changed)
        assert "pipeline dump-features" in str(reading.value)
        others = {p: p.stat().st_mtime_ns for n in of_chunk if n not in changed for p in [store / n]}
        again = dump_features(backbone, backbone.config, out=store)
        assert again.written == len(of_chunk.keys() & set(changed))
        assert {p: p.stat().st_mtime_ns for p in others} == others
    assert contents(store) == contents(whole)
    assert again.digest == open_cache(whole).digest
    assert verify(store).digest == again.digest


@pytest.mark.slow
@pytest.mark.parametrize("what", ["flip", "stale", "lose"])
def test_the_commands_find_and_mend_it_too(what, backbone, whole, other, tmp_path):
    store, (name,) = corrupted(1000, "features", what, whole, other, tmp_path)

    def pipeline(*words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", "pipeline", *words, "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        return done.returncode, json.loads(done.stdout)

    for words in (["verify", str(store)], ["rebalance", str(store), "--lam", "0.1", "--out", "out"]):
        code, document = pipeline(*words)
        assert code == 3
        assert f"{name} (view " in document["error"]
        assert "dump-features" in document["error"]
    code, document = pipeline("dump-features", "--checkpoint", str(backbone.path), "--out", str(store))
    assert (code, document["written"]) == (0, 1)
    assert contents(store) == contents(whole)
    assert pipeline("verify", str(store))[0] == 0


@pytest.mark.parametrize(
    ("field", "there", "wanted"),
    [
        ("seed", "0", "1"),
        ("dtype", '"float16"', '"float32"'),
        ("train (views, rows)", r"\[3,363\]", r"\[2,363\]"),
        ("checkpoint", '"[0-9a-f]{40,}.*', '"[0-9a-f]{40,}.*'),
        ("transform", r'….*\\"mean.*', r'….*\\"mean\\": \[0\.1, 0\.1.*'),
        ("dataset", '"[0-9a-f]{40,}.*', '"[0-9a-f]{40,}.*'),
    ],
)
def test_a_store_made_otherwise_is_refused_and_both_values_are_named(field, there, wanted, backbone, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "f.zarr")
    config, asking = backbone.config, load_checkpoint(backbone.path)
    tree = config.model_dump(mode="json")
    if field in ("seed", "dtype"):
        tree["dump"][field] = json.loads(wanted)
    elif field.startswith("train"):
        tree["dump"]["views"] = 2
    elif field == "checkpoint":
        with torch.no_grad():
            next(asking.model.parameters()).add_(1e-6)
        object.__setattr__(asking, "weights_digest", weights_digest(asking.model.state_dict()))
    elif field == "transform":
        object.__setattr__(asking, "transform", replace(asking.transform, mean=(0.1, 0.1, 0.1)))
    else:
        tree["data"]["subset_seed"] = 5
    refusal = rf"f\.zarr: holds features made otherwise: .*{re.escape(field)} is {there} there, {wanted} wanted"
    with pytest.raises(DataError, match=refusal + r".*another --out, or replace it with --overwrite"):
        dump_features(asking, type(config).model_validate(tree), out=tmp_path / "f.zarr")
    assert contents(tmp_path / "f.zarr") == contents(whole)
