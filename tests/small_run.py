"""Small real runs for the tests of what comes after rebalancing."""

import json
from pathlib import Path

import numpy as np

from cache import StoreSplit, create_store

COUNTS = (150, 60, 30, 12, 5)  # all three groups
NAMES = ("ant", "bee", "cat", "dog", "eel")


def digits_run(backbone: Path, **settings) -> Path:
    """The run around the two-epoch digits checkpoint RUN/backbone/last.pt, dumped and rebalanced with these settings."""
    from pipeline.backbone.checkpoint import load_checkpoint
    from pipeline.config import RebalanceConfig
    from pipeline.dump import dump_features
    from pipeline.rebalance import rebalance

    run, checkpoint = backbone.parent.parent, load_checkpoint(backbone)
    dump_features(checkpoint, checkpoint.config, out=run / "features.zarr")
    config = RebalanceConfig.model_validate(checkpoint.config.rebalance.model_dump() | settings)
    rebalance(run / "features.zarr", config, out=run / "rebalance")
    return run


def made_run(
    run: Path, *, seed=0, names=NAMES, counts=COUNTS, splits=("val", "test"), store=None, absent=None, **settings
) -> Path:
    """A run on normally distributed features, its stage-1 head short for small classes; rebalanced for real."""
    from pipeline.config import RebalanceConfig
    from pipeline.rebalance import rebalance

    made_store(store or run / "features.zarr", seed=seed, names=names, counts=counts, splits=splits, absent=absent)
    settings = {"lam": "0.05,0.1,1", "seeds": (0, 1), "epochs": 2, "lr": 0.02, **settings}
    rebalance(store or run / "features.zarr", RebalanceConfig.model_validate(settings), out=run / "rebalance")
    lines = [
        {
            "epoch": e,
            "loss": 2 / e,
            "train_accuracy": 20.0 * e,
            "val_accuracy": 15.0 * e if e % 2 else None,
            "val_few": None,
        }
        for e in (1, 2, 3)
    ]
    (run / "backbone").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "backbone" / "metrics.jsonl").write_text(text, encoding="utf-8")
    return run


def made_store(
    path: Path,
    *,
    seed=0,
    names=NAMES,
    counts=COUNTS,
    splits=("val", "test"),
    seal=True,
    views=2,
    config=None,
    absent=None,
    own=False,
) -> Path:
    """A store of features (N, 8) around one centre a class; config: what its provenance says of its configuration.

    absent: rows of splits that have no features. own: no network of this program made it, and it says nothing of one.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(counts), 8))
    labels = {"train": np.repeat(np.arange(len(counts)), counts)}
    labels |= {split: np.repeat(np.arange(len(counts)), 12) for split in splits}
    with create_store(
        path,
        splits={
            split: StoreSplit(views if split == "train" else 1, y, np.arange(len(y))) for split, y in labels.items()
        },
        width=8,
        dtype="float16",
        weight=centres * (np.array(counts) ** 0.25)[:, None] / 2,
        bias=np.linspace(1, -1, len(counts)),
        class_names=names,
        counts=counts,
        fingerprint={"dataset": "d" * 8} | ({} if own else {"checkpoint": "c" * 8, "seed": seed}),
        provenance={}
        if own
        else {
            "argv": ["pipeline", "dump-features"],
            "network": {"network": "made", "parameters": 1234, "feature_width": 8},
        }
        | ({"config": config} if config else {}),
    ) as writer:
        for chunk in writer.missing()[: None if seal else 1]:
            y = labels[chunk.split][chunk.start : chunk.stop]
            lost = [row - chunk.start for row in (absent or {}).get(chunk.split, ()) if chunk.start <= row < chunk.stop]
            writer.write(chunk, (centres[y] + rng.normal(size=(len(y), 8))).astype(np.float32), absent=lost)
        if seal:
            writer.seal()
    return path
