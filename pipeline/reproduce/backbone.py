"""One backbone of a reproduction: its training, its features, and every table on them, each done once."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache import open_cache
from pipeline.backbone.build import input_transform
from pipeline.backbone.checkpoint import Checkpoint, load_checkpoint
from pipeline.backbone.reporter import TrainingReporter
from pipeline.backbone.train import train_backbone
from pipeline.backbone.training_dir import TrainingFolder, identity_of
from pipeline.config import Config, RebalanceConfig, find_config, read_tree
from pipeline.console import Talk, clock
from pipeline.data import load_dataset
from pipeline.doctor import device_name
from pipeline.dump import dump_features
from pipeline.rebalance import ablate, rebalance
from pipeline.reproduce.paper import deviations, published_of
from pipeline.reproduce.rows import METHODS, Row, ablation_rows, method_rows
from pipeline.run import Ledger

ABLATIONS = ("table3", "table4", "figure5", "formulations")
TABLES = (METHODS, *ABLATIONS)


@dataclass
class Progress:
    """Which step of how many, and how long the rest takes if each step takes what its kind took before."""

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
        """Seconds, this step included; None while a step of a kind that was never done lies ahead."""
        ahead = self.kinds[self.number - 1 :]
        if any(kind not in self.took for kind in ahead):
            return None
        return sum(sum(self.took[kind]) / len(self.took[kind]) for kind in ahead)


class Backbone:
    """What is under `place`: backbone/, features.zarr, methods/ and the ablations; deviations: filled by `rows`."""

    def __init__(
        self, config: Config, place: Path, name: str, words: str, ledger: Ledger, device: str, talk: Talk
    ):  # name, words: how the configuration was asked for
        self.config, self.place, self.name, self.words = config, place, name, words
        self.ledger, self.device, self.talk = ledger, device, talk
        self.deviations: list[str] = []

    def rows(self, tables: Sequence[str], progress: Progress) -> list[Row]:
        """The rows of the tables, after all that they need was done or found; the test split is read after each choice."""
        with self._step("train-backbone", progress):
            checkpoint = self._train()
        with self._step("dump-features", progress):
            self._dump(checkpoint)
        store = open_cache(self.place / "features.zarr")
        published = published_of(store.counts.tolist())
        self.deviations = deviations(self.config, published, checkpoint.network)
        facts = {
            "config": self.config.name,
            "data": published.name if published else f"{self.config.data.source}, {len(store.counts)} classes",
            **{key: checkpoint.network[key] for key in ("network", "parameters")},
            "width": checkpoint.network["feature_width"],
        }
        rows: list[Row] = []
        for table in tables:
            with self._step(table, progress):
                document = self._table(table, store.digest)
            on = facts | {"device": self._ledger_of(table)["device"]}
            if table == METHODS:
                command = f"pipeline rebalance {self.place} --config {self.name} --method all"
                rows += method_rows(document, on, published, command=command, stage_1=self._stage_1())
            else:
                command = f"pipeline rebalance {self.place} --config ablations/{table}"
                rows += ablation_rows(table, document, on, published, command=command, curves=table == "figure5")
        return rows

    def _train(self) -> Checkpoint:
        out = self.place / "backbone"
        if (found := finished(self.config, out)) is not None:
            self.talk.say(f"{found}: trained to the end, by this configuration on these images")
            return load_checkpoint(found)
        with self.talk.progress("training") as bar:
            reporter = TrainingReporter(self.talk, bar)
            started = time.perf_counter()
            trained = train_backbone(self.config, out=out, device=self.device, report=reporter)
        if trained.trained_epochs:
            self._did("train-backbone", started)
        return load_checkpoint(trained.checkpoint)

    def _dump(self, checkpoint: Checkpoint) -> None:
        started = time.perf_counter()
        with self.talk.progress("dumping") as bar:
            store = self.place / "features.zarr"
            dumped = dump_features(checkpoint, self.config, out=store, device=self.device, report=bar.move)
        if dumped.written:
            self._did("dump-features", started)

    def _table(self, table: str, digest: str) -> dict[str, Any]:
        """The document of a table, made or found."""
        settings, folder = settings_of(table, self.config.rebalance), self.place / table
        inputs = {"store": digest, "settings": settings.model_dump(mode="json")}
        document = folder / ("results.json" if table == METHODS else "ablation.json")
        if self.ledger.up_to_date(self._name(table), inputs):
            self.talk.say(f"{folder}: up to date")
        else:
            started, work = time.perf_counter(), rebalance if table == METHODS else ablate
            work(self.place / "features.zarr", settings, out=folder, device=self.device, report=self.talk.say)
            outputs = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".csv", ".safetensors"))
            self._did(table, started, inputs=inputs, outputs=outputs)
        return json.loads(document.read_text(encoding="utf-8"))

    def _stage_1(self) -> dict[str, Any]:
        """The command that trains this backbone, the seconds it took in all, and where."""
        lines = (self.place / "backbone" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seed = self.config.backbone.seed
        options = "" if seed == 0 else f" --set backbone.seed={seed}"
        where = json.loads((self.place / "backbone" / "run.json").read_text(encoding="utf-8"))
        return {
            "command": f"pipeline train-backbone {self.words}{options}",
            "time_s": sum(json.loads(line)["seconds"] for line in lines),
            "device": self._ledger_of("train-backbone").get("device") or where["device"],
        }

    @contextmanager
    def _step(self, step: str, progress: Progress) -> Iterator[None]:
        kind, started = f"{self.config.name}/{step}", time.perf_counter()
        progress.begin(kind, f"{kind}, seed {self.config.backbone.seed}")
        yield
        progress.end(kind, time.perf_counter() - started)

    def _did(self, step: str, started: float, **record: Any) -> None:
        seconds = time.perf_counter() - started
        self.ledger.did(self._name(step), seconds, device=device_name(self.device), **record)
        self.ledger.write(command="reproduce", config=self.config.model_dump(mode="json"))

    def _name(self, step: str) -> str:
        return f"seed-{self.config.backbone.seed}/{step}"

    def _ledger_of(self, step: str) -> dict[str, Any]:
        return self.ledger.stages.get(self._name(step), {})


def finished(config: Config, out: Path) -> Path | None:
    """The checkpoint of a finished training of this configuration on the same images, wherever these lie, by whatever version.

    None where there is none, or it is not at its end; ConfigError where it is another training's.
    """
    if not (out / "last.pt").is_file():
        return None
    images = load_dataset(config.data)
    transform = input_transform(config.data, config.backbone, images.train).to_dict()
    folder = TrainingFolder(out, identity_of(config.backbone, dataset=images.training_fingerprint, transform=transform))
    state = folder.state()
    return folder.last if state is not None and state["complete"] else None


def settings_of(table: str, own: RebalanceConfig) -> RebalanceConfig:
    """What a table is made with: the configuration's settings, with `--method all` or an ablation's laid over them."""
    over = {"method": ["all"]} if table == METHODS else read_tree(find_config(f"ablations/{table}"))["rebalance"]
    return RebalanceConfig.model_validate(own.model_dump(exclude_unset=True) | over)
