"""What stage 2 gives on features that are kept with the tests: those of the true ResNet-32 of docs/reproduction.md.

`python -m tests.golden.tables` prints how far the engines of this machine are from the kept tables; with --write it replaces
tables.json, which is right only where a change was meant to move results, by as much as the difference shows.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from cache import StoreSplit, create_store, open_cache
from pipeline.config import RebalanceConfig
from pipeline.distributed import ranks
from pipeline.longtail import class_groups
from pipeline.rebalance import rebalance
from pipeline.rebalance.load import load
from pipeline.rebalance.sweep import Sweep, score
from pipeline.results.head_id import HeadId
from pipeline.results.heads import Linear, read_scorers

HERE = Path(__file__).parent
FEATURES, TABLES = HERE / "cifar100_lt_if100_resnet32.safetensors", HERE / "tables.json"
LAMS = "0,0.05,0.15,0.4,1"
STAGE_2 = {"lam": LAMS, "views": "clean", "seeds": (0,), "epochs": 10, "batch_size": 64, "lr": 0.005}
RIVALS = (  # at settings near those that validation chose on these features, fewer and larger steps
    HeadId("ce", "ce", lr=0.1),
    HeadId("iwb-la", "la", 0.6, lr=0.02, values=(("means", 0.25),)),
    HeadId("focal", lr=0.1, values=(("gamma", 2.0),)),
    HeadId("grw", lr=0.02, values=(("rho", 1.2),)),
    HeadId("crt", lr=0.1),
    HeadId("lws", lr=0.1),
    HeadId("balanced-softmax", lr=0.05, values=(("tau", 1.0),)),
    HeadId("ldam-drw", lr=1.0, values=(("margin", 0.5), ("defer", 0.8))),
    HeadId("maxnorm", lr=0.05, values=(("form", "bce"), ("weight_decay", 0.1))),
    HeadId("marc", lr=0.05, values=(("rho", 1.2),)),
    HeadId("disalign", lr=0.1, values=(("rho", 1.2),)),
    HeadId("iif-trained", lr=0.001, values=(("variant", "smooth"),)),
    HeadId("ala", lr=0.001),
    HeadId("las", lr=0.02, values=(("head", 0.3), ("tail", 0.0))),
    HeadId("tau-norm", values=(("tau", 0.75), ("bias", "dropped"))),
    HeadId("ncm"),
    HeadId("logit-adjust", values=(("tau", 1.0), ("form", "additive"))),
    HeadId("iif", values=(("variant", "smooth"),)),
)


def made_store(path: Path) -> Path:
    """The kept features as a store."""
    with safe_open(FEATURES, "numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["facts"])
    labels = {split: arrays[f"{split}_labels"].astype(np.int64) for split in ("train", "val", "test")}
    with create_store(
        path,
        splits={split: StoreSplit(1, y, np.arange(len(y))) for split, y in labels.items()},
        width=arrays["weight"].shape[1],
        dtype="float16",
        weight=arrays["weight"],
        bias=arrays["bias"],
        class_names=facts["class_names"],
        counts=arrays["counts"],
        fingerprint={"kept": FEATURES.name},
        provenance={"network": facts["network"]},
    ) as writer:
        for chunk in writer.missing():
            writer.write(chunk, arrays[f"{chunk.split}_features"][chunk.start : chunk.stop].astype(np.float32))
        writer.seal()
    return path


def formulation_table(store: Path, formulation: str, out: Path) -> dict[str, Any]:
    """{selected λ, its score on validation, by head: accuracies on test and the mean norm of class vectors by group}."""
    config = RebalanceConfig.model_validate(STAGE_2 | {"formulation": formulation})
    result = rebalance(store, config, out=out)
    chosen = json.loads((out / "selection.json").read_text(encoding="utf-8"))
    norms = _norms(out / "heads.safetensors", open_cache(store).counts)
    heads = {}
    for row in (r for r in result.results if r.split == "test"):
        name = row.method if row.lam is None else f"{row.method} {row.lam:g}"
        heads[name] = {k: getattr(row, k) for k in ("all", "many", "medium", "few", "ece")} | norms[name]
    return {"lam": chosen["selected"]["lam"], "score": chosen["score"], "heads": heads}


def rival_table(store: Path) -> dict[str, Any]:
    """Test accuracies of RIVALS by method."""
    loaded = load(store, augmented=False)
    config = RebalanceConfig.model_validate(STAGE_2 | {"epochs": 3, "batch_size": 512, "formulation": "paper"})
    with ranks("cpu") as alone:
        sweep = Sweep(loaded.features, loaded.val, config, alone, chosen_on=None)
        sweep.add(RIVALS)
        found = score(sweep.heads, loaded.test(), loaded.features.counts, alone.device)
    keys = ("all", "many", "medium", "few", "ece")
    return {setting.method: {k: scores.summary[k] for k in keys} for (setting, _), scores in found.items()}


def _norms(file: Path, counts: np.ndarray) -> dict[str, dict[str, float]]:
    groups = class_groups(counts)
    found = {}
    for facts, head in read_scorers(file):
        assert isinstance(head, Linear)
        norm = np.linalg.norm(head.weight, axis=1)
        name = facts["method"] if facts["lam"] is None else f"{facts['method']} {facts['lam']:g}"
        found[name] = {f"norm_{group}": float(norm[mask].mean()) for group, mask in groups.items()}
    return found


def measured(folder: Path) -> dict[str, Any]:
    """Every table."""
    store = made_store(folder / "features.zarr")
    tables = {f: formulation_table(store, f, folder / f) for f in ("paper", "mixed", "code")}
    return tables | {"rivals": rival_table(store)}


def flat(tree: Any, prefix: str = "") -> dict[str, float]:
    """The numbers of nested dictionaries by their path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}/{key}".lstrip("/")).items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        now = measured(Path(folder))
        print(f"{time.perf_counter() - started:.1f} s")
    if "--write" in sys.argv:
        TABLES.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    kept = flat(json.loads(TABLES.read_text(encoding="utf-8")))
    far = sorted(((abs(v - kept[k]), k) for k, v in flat(now).items()), reverse=True)
    print("furthest from what is kept:", *(f"{d:.4f} {k}" for d, k in far[:10]), sep="\n")
