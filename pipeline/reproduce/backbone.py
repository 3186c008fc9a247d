"""One backbone of a reproduction: its training, its features, and every table on them."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cache import open_cache
from pipeline.config import RebalanceConfig, find_config, read_tree
from pipeline.console import Talk, clock
from pipeline.doctor import device_name
from pipeline.prepared import Prepared
from pipeline.reproduce.paper import deviations, published_of
from pipeline.reproduce.rows import METHODS, Row, ablation_rows, method_rows
from pipeline.results.documents import read_record
from pipeline.run import BackboneStages
from pipeline.run_prepare import PreparedBackbone

ABLATIONS = ("table3", "table4", "figure5", "formulations")
TABLES = (METHODS, *ABLATIONS)


@dataclass
class StepProgress:
    """The number of the current step, and the time left if each step takes as long as the earlier ones of its kind."""

    kinds: list[str]
    talk: Talk
    number: int = 0
    took: dict[str, list[float]] = field(default_factory=dict)

    def begin(self, kind: str, name: str) -> None:
        self.number += 1
        left = self.remaining()
        self.talk.say(f"── {self.number}/{len(self.kinds)} {name}" + ("" if left is None else f"; {clock(left)} to go"))

    def end(self, kind: str, seconds: float) -> None:
        self.took.setdefault(kind, []).append(seconds)

    def remaining(self) -> float | None:
        """Return the seconds left, this step included; None where a kind of step ahead was never done."""
        ahead = self.kinds[self.number - 1 :]
        if any(kind not in self.took for kind in ahead):
            return None
        return sum(sum(self.took[kind]) / len(self.took[kind]) for kind in ahead)


class ReproducedBackbone:
    """One backbone under its folder: backbone/, features.zarr, methods/ and a folder per ablation.

    Arguments:
        name, words: the configuration as it was typed, without and with its settings.
    Attributes:
        deviations: the differences from the paper, filled by `rows`.
    """

    def __init__(self, stages: BackboneStages, *, name: str, words: str):
        self.stages, self.name, self.words = stages, name, words
        self.config, self.folder = stages.prepared.config, stages.prepared.out
        self.deviations: list[str] = []
        stages.facts = {"device": device_name(stages.device)}
        facts = {"config": self.config.model_dump(mode="json")}
        stages.finished = lambda: stages.ledger.write(command="reproduce", **facts)

    def rows(self, tables: Sequence[str], progress: StepProgress) -> list[Row]:
        """Return the rows of the tables, after every stage that they need; the test split is read after each selection."""
        with self._step("train-backbone", progress):
            checkpoint = self.stages.backbone()
        with self._step("dump-features", progress):
            digest = self.stages.features(checkpoint).digest
        counts = open_cache(self.folder / "features.zarr").counts
        published = published_of(counts.tolist())
        self.deviations = deviations(self.config, published, checkpoint.network)
        facts = {
            "config": self.config.name,
            "data": published.name if published else f"{self.config.data.source}, {len(counts)} classes",
            **{key: checkpoint.network[key] for key in ("network", "parameters")},
            "width": checkpoint.network["feature_width"],
        }
        rows: list[Row] = []
        for table in tables:
            with self._step(table, progress):
                path = self.stages.fit(table, settings_of(table, self.config.rebalance), digest=digest)
            document = json.loads(path.read_text(encoding="utf-8"))
            on = facts | {"device": self._entry(table)["device"]}
            if table == METHODS:
                command = f"pipeline rebalance {self.folder} --config {self.name} --method all"
                rows += method_rows(document, on, published, command=command, stage_1=self._stage_1())
            else:
                command = f"pipeline rebalance {self.folder} --config ablations/{table}"
                rows += ablation_rows(table, document, on, published, command=command, curves=table == "figure5")
        return rows

    def _stage_1(self) -> dict[str, Any]:
        """Return the command that trains this backbone, its seconds in all, and its device."""
        lines = (self.folder / "backbone" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seed = self.config.backbone.seed
        options = "" if seed == 0 else f" --set backbone.seed={seed}"
        record = read_record(self.folder / "backbone" / "run.json")
        return {
            "command": f"pipeline train-backbone {self.words}{options}",
            "time_s": sum(json.loads(line)["seconds"] for line in lines),
            "device": self._entry("train-backbone").get("device") or record["device"],
        }

    @contextmanager
    def _step(self, step: str, progress: StepProgress) -> Iterator[None]:
        kind, started = f"{self.config.name}/{step}", time.perf_counter()
        progress.begin(kind, f"{kind}, seed {self.config.backbone.seed}")
        yield
        progress.end(kind, time.perf_counter() - started)

    def _entry(self, stage: str) -> dict[str, Any]:
        return self.stages.ledger.stages.get(f"{self.stages.prepared.prefix}{stage}", {})


def describe_stages(prepared: PreparedBackbone, tables: Sequence[str]) -> list[Prepared]:
    """Return what training, dump and every table of one backbone would do."""
    name = f"{prepared.config.name}, seed {prepared.config.backbone.seed}"
    stages = [replace(stage, title=f"{name}: {stage.command}") for stage in prepared.stages]
    for table in tables:
        fit = prepared.describe_fit(table, settings_of(table, prepared.config.rebalance))
        stages.append(replace(fit, title=f"{name}: {table}"))
    return stages


def settings_of(table: str, settings: RebalanceConfig) -> RebalanceConfig:
    """Return the settings of a table: a configuration's, with `--method all` or those of an ablation in their place."""
    changes = {"method": ["all"]} if table == METHODS else read_tree(find_config(f"ablations/{table}"))["rebalance"]
    return RebalanceConfig.model_validate(settings.model_dump(exclude_unset=True) | changes)
