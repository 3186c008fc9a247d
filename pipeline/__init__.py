"""Train an image classifier once on unbalanced classes, re-balance it in seconds.

What a command does is one function: train_backbone, dump_features, run_pipeline, write_report and export_model are here,
`pipeline.rebalance.rebalance` and `pipeline.predict.predict` in the modules that bear their names. `iwb_objective` is the
loss itself. Nothing heavy is imported before it is used.
"""

import importlib
from typing import Any

_PUBLIC = {
    "load_config": "pipeline.config",
    "make_config": "pipeline.config",
    "load_dataset": "pipeline.data",
    "train_backbone": "pipeline.backbone.train",
    "load_checkpoint": "pipeline.backbone.checkpoint",
    "load_foreign": "pipeline.backbone.foreign",
    "dump_features": "pipeline.dump",
    "open_cache": "cache",
    "iwb_objective": "pipeline.rebalance.objective",
    "run_pipeline": "pipeline.run",
    "write_report": "pipeline.report",
    "export_model": "pipeline.export",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module pipeline has no attribute {name}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
