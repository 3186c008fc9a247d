"""Train an image classifier once on unbalanced classes, re-balance it in seconds.

What a command does is one function with a typed result, and all of them are here: `run_pipeline`, `train_backbone`,
`dump_features`, `rebalance`, … A result prints as the command shows it, and `to_dict()` is the document of its --json.
`--dry-run` prints the description of `prepare_run`, `prepare_training`, …; `iwb_objective` is the loss itself. Nothing heavy is
imported before it is used.

`pipeline.rebalance`, `predict`, `doctor` and `reproduce` are modules as well, which can be called as their function.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache import Cache, open_cache
    from pipeline.backbone.checkpoint import Checkpoint, load_checkpoint
    from pipeline.backbone.events import TrainResult
    from pipeline.backbone.external_checkpoint import load_external
    from pipeline.backbone.hparam_sweep import PreparedSweep, SweepResult, prepare_sweep, sweep_hparams
    from pipeline.backbone.prepare import PreparedTraining, prepare_training
    from pipeline.backbone.train import train_backbone
    from pipeline.bench.cache import bench_cache
    from pipeline.bench.heads import bench_heads
    from pipeline.bench.rebalance import bench_rebalance
    from pipeline.bench.train import bench_train
    from pipeline.config import Config, RebalanceConfig, find_config, load_config, make_config
    from pipeline.data import Dataset, load_dataset
    from pipeline.deploy.export import export_model, prepare_export
    from pipeline.deploy.exported import ExportedModel
    from pipeline.deploy.predict import predict, prepare_predict
    from pipeline.deploy.prediction import Prediction
    from pipeline.deploy.run_head import rebalanced_head
    from pipeline.deploy.store_export import prepare_store_export
    from pipeline.doctor import Diagnosis, doctor
    from pipeline.dump import DumpResult, dump_features
    from pipeline.dump_prepare import PreparedDump, prepare_dump
    from pipeline.errors import PipelineError
    from pipeline.import_features import ImportResult, prepare_import, store_from_arrays
    from pipeline.info import Artefact, Verified, describe, verify
    from pipeline.prepared import Prepared
    from pipeline.rebalance.ablation import AblationResult, ablate
    from pipeline.rebalance.engine.objective import iwb_objective
    from pipeline.rebalance.evaluation import EvaluateResult, evaluate
    from pipeline.rebalance.prepare import PreparedRebalance, prepare_ablation, prepare_rebalance
    from pipeline.rebalance.run import rebalance
    from pipeline.report import Report, prepare_report, write_report
    from pipeline.report.progress import Compared, compare_progress, prepare_progress
    from pipeline.reproduce import Reproduction, prepare_reproduce, reproduce
    from pipeline.results.rebalance_result import RebalanceResult
    from pipeline.run import RunResult, run_pipeline
    from pipeline.run_prepare import ExternalBackbone, PreparedRun, prepare_run

_PUBLIC = {
    "cache": ("Cache", "open_cache"),
    "pipeline.backbone.checkpoint": ("Checkpoint", "load_checkpoint"),
    "pipeline.backbone.events": ("TrainResult",),
    "pipeline.backbone.external_checkpoint": ("load_external",),
    "pipeline.backbone.train": ("train_backbone",),
    "pipeline.backbone.hparam_sweep": ("PreparedSweep", "SweepResult", "prepare_sweep", "sweep_hparams"),
    "pipeline.bench.cache": ("bench_cache",),
    "pipeline.bench.heads": ("bench_heads",),
    "pipeline.bench.rebalance": ("bench_rebalance",),
    "pipeline.bench.train": ("bench_train",),
    "pipeline.config": ("Config", "RebalanceConfig", "find_config", "load_config", "make_config"),
    "pipeline.data": ("Dataset", "load_dataset"),
    "pipeline.doctor": ("Diagnosis", "doctor"),
    "pipeline.dump": ("DumpResult", "dump_features"),
    "pipeline.errors": ("PipelineError",),
    "pipeline.deploy.export": ("export_model", "prepare_export"),
    "pipeline.deploy.exported": ("ExportedModel",),
    "pipeline.deploy.run_head": ("rebalanced_head",),
    "pipeline.deploy.store_export": ("prepare_store_export",),
    "pipeline.import_features": ("ImportResult", "prepare_import", "store_from_arrays"),
    "pipeline.info": ("Artefact", "Verified", "describe", "verify"),
    "pipeline.prepared": ("Prepared",),
    "pipeline.backbone.prepare": ("PreparedTraining", "prepare_training"),
    "pipeline.dump_prepare": ("PreparedDump", "prepare_dump"),
    "pipeline.rebalance.prepare": ("PreparedRebalance", "prepare_ablation", "prepare_rebalance"),
    "pipeline.deploy.predict": ("predict", "prepare_predict"),
    "pipeline.deploy.prediction": ("Prediction",),
    "pipeline.rebalance": ("AblationResult", "EvaluateResult", "RebalanceResult", "ablate", "evaluate", "rebalance"),
    "pipeline.rebalance.engine.objective": ("iwb_objective",),
    "pipeline.report": ("Report", "prepare_report", "write_report"),
    "pipeline.report.progress": ("Compared", "compare_progress", "prepare_progress"),
    "pipeline.reproduce": ("Reproduction", "prepare_reproduce", "reproduce"),
    "pipeline.run": ("RunResult", "run_pipeline"),
    "pipeline.run_prepare": ("ExternalBackbone", "PreparedRun", "prepare_run"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module pipeline has no attribute {name}")
    module = importlib.import_module(_MODULE_OF[name])
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
