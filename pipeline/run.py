"""From images to report in one go: each stage is done once, and done again only where its inputs have changed."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.backbone.checkpoint import Checkpoint, load_checkpoint
from pipeline.backbone.external_checkpoint import origin_text
from pipeline.backbone.reporter import TrainingReporter
from pipeline.backbone.train import train
from pipeline.concatenate import concatenate_stores
from pipeline.config import Config, RebalanceConfig
from pipeline.console import Talk, clock
from pipeline.distributed import Ranks
from pipeline.dump import DumpResult, dump_features
from pipeline.ledger import Ledger, file_digest
from pipeline.paths import read_document, recorded_document, recorded_path
from pipeline.rebalance import ablate, rebalance
from pipeline.rebalance.combine_seeds import combine
from pipeline.report import write_report
from pipeline.report.ablation import write_accuracy_figure
from pipeline.results.differences import read_hits
from pipeline.results.files import write_artefact
from pipeline.results.tables import results_tables
from pipeline.run_prepare import ExternalBackbone, PreparedBackbone, prepare_run, training_is_good
from pipeline.text import Shown

STAGE_1 = ("backbone/metrics.jsonl", "backbone/diagnostics.csv")  # files that a report shows
RESULT_FILES = (".json", ".csv", ".safetensors")


@dataclass(frozen=True)
class RunResult(Shown):
    """A finished run.

    Arguments:
        results: the document of `pipeline rebalance --json`, over all backbones.
        pictures: the report's figures as PNG.
        stages: seconds by stage, of the run that did it.
        redone: the stages that this run did; the others were up to date.
    """

    out: Path
    results: dict[str, Any]
    report: Path
    pictures: tuple[Path, ...]
    stages: dict[str, float]
    redone: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "report": str(self.report),
            "pictures": [str(p) for p in self.pictures],
            "seconds": self.stages,
            "redone": list(self.redone),
            **self.results,
        }

    def __rich_console__(self, console, options):
        yield results_tables(self.results)
        totals: dict[str, float] = {}
        for stage, seconds in self.stages.items():
            totals[stage.rpartition("/")[2]] = totals.get(stage.rpartition("/")[2], 0.0) + seconds
        yield "time: " + ", ".join(f"{stage} {clock(seconds)}" for stage, seconds in totals.items())
        yield f"report: {self.report}"
        yield from (f"picture: {picture}" for picture in self.pictures)


@dataclass
class BackboneStages:
    """The stages of one backbone, each done only where it is not done yet or its inputs have changed.

    Arguments:
        ledger: the record that every stage done is noted in.
        ranks: the processes that compute.
        device: as `--device` names it.
        facts: are noted with every stage.
        finished: is called after a stage was noted.
    """

    prepared: PreparedBackbone
    ledger: Ledger
    ranks: Ranks
    device: str
    talk: Talk
    facts: Mapping[str, Any] = field(default_factory=dict)
    finished: Callable[[], object] = lambda: None

    def backbone(self) -> Checkpoint:
        """Return the backbone: trained to its end, now or before, or that of another program."""
        prepared = self.prepared
        if prepared.training is None:
            assert prepared.external is not None
            self.talk.say(f"{origin_text(prepared.external)}, kept in {prepared.out / 'backbone' / 'last.pt'}")
            self.talk.notes((prepared.external.external or {}).get("notes", ()))
            return prepared.external
        started = time.perf_counter()
        with self.talk.progress("training") as bar:
            trained = train(prepared.training, ranks=self.ranks, report=TrainingReporter(self.talk, bar))
        if trained.trained_epochs:
            self._record("train-backbone", started)
        else:
            self.talk.say(f"{trained.checkpoint}: trained to the end, by this configuration on these images")
        return load_checkpoint(trained.checkpoint)

    def features(self, backbone: Checkpoint) -> DumpResult:
        """Return the store of the backbone's features, complete."""
        prepared, started = self.prepared, time.perf_counter()
        with self.talk.progress("dumping") as bar, training_is_good(prepared.store):
            dumped = dump_features(
                backbone, prepared.config, out=prepared.store, device=self.device, overwrite=prepared.overwrite,
                report=bar.move, images=prepared.images,
                keep_in=prepared.out / "backbone" if prepared.external else None,
            )  # fmt: skip
        if dumped.written:
            self._record("dump-features", started)
        return dumped

    def fit(self, stage: str, settings: RebalanceConfig, *, digest: str, **inputs: Any) -> Path:
        """Return the document of the heads fitted on the features, in the folder that is named as the stage.

        Arguments:
            digest: of the store.
            inputs: what else the document depends on.
        """
        folder, inputs = (
            self.prepared.out / stage,
            {"store": digest, **inputs, "settings": settings.model_dump(mode="json")},
        )
        stale = self.ranks.first and not self.ledger.up_to_date(self.prepared.prefix + stage, inputs)
        if self.ranks.largest(stale):
            started, work = time.perf_counter(), ablate if settings.variants else rebalance
            with self.talk.progress("fitting") as bar:
                result = work(
                    self.prepared.store, settings, out=folder, device=self.device, report=self.talk.say, move=bar.move
                )
            if settings.variants and self.ranks.first:
                write_accuracy_figure(result.to_dict(), folder)
            outputs = sorted(path for path in folder.iterdir() if path.suffix in RESULT_FILES)
            self._record(stage, started, inputs=inputs, outputs=outputs)
        else:
            self.talk.say(f"{folder}: up to date")
        return folder / ("ablation.json" if settings.variants else "results.json")

    def _record(self, stage: str, started: float, **entry: Any) -> None:
        self.ledger.record(self.prepared.prefix + stage, time.perf_counter() - started, **entry, **self.facts)
        self.finished()


def run_pipeline(
    config: Config,
    *,
    out: Path,
    store: Path | str | None = None,
    seeds: Sequence[int] | None = None,
    external: ExternalBackbone | None = None,
    encoders: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    talk: Talk | None = None,
) -> RunResult | None:
    """Train, dump, rebalance and report under `out`, and continue what is there.

    Arguments:
        store: the features, by default features.zarr in the run; of several backbones each has a seed-N below it.
        seeds: of the backbones, one each under out/seed-N on the same subset; λ is selected on their mean validation
            accuracy.
        external: the checkpoint that replaces the training.
        encoders: pretrained networks that replace it, each with a store under out/ENCODER; heads are fitted on their
            features side by side.
    Returns: the result on the first rank, None on others.
    Raises: what the stages raise, such as ConfigError and DataError; everything finished stays.
    """
    talk = talk or Talk(quiet=True)
    with distributed.ranks(device) as ranks:
        prepared = prepare_run(
            config,
            out=out,
            store=store,
            seeds=seeds,
            external=external,
            encoders=encoders,
            overwrite=overwrite,
            ranks=ranks,
        )
        ledger = Ledger(out / "run.json")
        documents = []
        for backbone in prepared.backbones:
            if seeds:
                talk.say(f"── {backbone.out.name}")
            documents.append(_results(BackboneStages(backbone, ledger, ranks, device, talk)))
        if not ranks.first:
            return None
        folders = [backbone.out for backbone in prepared.backbones]
        results = documents[0]
        if seeds:
            results = combine(
                documents, [read_hits(folder / "rebalance" / "test_hits.safetensors") for folder in folders]
            )
            write_artefact(out / "results.json", "results", recorded_document(results, out))
        report, pictures = _report(out, folders, ledger, talk)
        ledger.write(
            command="run", config=config.model_dump(mode="json"), seeds=list(seeds or [config.backbone.seed]), ranks=ranks.world
        )  # fmt: skip
        seconds = {stage: entry["seconds"] for stage, entry in ledger.stages.items()}
        return RunResult(out, results, report, pictures, seconds, tuple(ledger.redone))


def _results(stages: BackboneStages) -> dict[str, Any]:
    """Return the results document of one backbone, after its stages; an empty one on ranks other than the first."""
    prepared = stages.prepared
    digest = _side_by_side(stages) if prepared.encoders else _dumped(stages)
    path = recorded_path(prepared.store, prepared.out)
    document = stages.fit("rebalance", prepared.config.rebalance, digest=digest, at=path)
    if not stages.ranks.first:
        return {}
    return read_document(json.loads(document.read_text(encoding="utf-8")), document.parent)


def _dumped(stages: BackboneStages) -> str:
    """Return the digest of the store of one backbone."""
    dumped = stages.features(stages.backbone())
    complete = f"{stages.prepared.store}: complete, all checksums hold"
    stages.talk.say(str(dumped) if dumped.written or dumped.skipped else complete)
    return dumped.digest


def _side_by_side(stages: BackboneStages) -> str:
    """Return the digest of the store that holds the features of several encoders side by side, after their dumps."""
    prepared = stages.prepared
    for encoder in prepared.encoders:
        stages.talk.say(f"── {encoder.out.name}")
        _dumped(replace(stages, prepared=encoder))
    stores = [encoder.store for encoder in prepared.encoders]
    stages.talk.say(f"features side by side: {prepared.store}")
    return stages.ranks.together(
        lambda: concatenate_stores(stores, prepared.store, overwrite=prepared.overwrite) if stages.ranks.first else ""
    )


def _report(out: Path, folders: Sequence[Path], ledger: Ledger, talk: Talk) -> tuple[Path, tuple[Path, ...]]:
    """Return report.html and its pictures, drawn again where results or training curves have changed."""
    sources = [folder / name for name in ("rebalance/results.json", *STAGE_1) for folder in folders]
    inputs, html = [file_digest(path) for path in sources], out / "report.html"
    if not ledger.redone and ledger.up_to_date("report", inputs):
        talk.say(f"{html}: up to date")
    else:
        started = time.perf_counter()
        report = write_report(out)
        numbers = [figure.with_suffix(".csv") for figure in report.figures]
        outputs = [html, *report.figures, *numbers]
        ledger.record("report", time.perf_counter() - started, inputs=inputs, outputs=outputs)
    return html, tuple(path for path in ledger.outputs("report") if path.suffix == ".png")
