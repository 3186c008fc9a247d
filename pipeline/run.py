"""From images to report in one go: each stage is done once, and redone only if what it depends on has changed."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache import CacheError, Otherwise, is_url, locate, write_durably
from pipeline import distributed
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.backbone.external_checkpoint import load_external_for_run, origin_text
from pipeline.backbone.reporter import TrainingReporter
from pipeline.backbone.train import train_backbone
from pipeline.config import Config
from pipeline.console import Talk, clock
from pipeline.data import Dataset, load_dataset
from pipeline.distributed import Ranks
from pipeline.dump import dump_features
from pipeline.errors import ConfigError, DataError
from pipeline.paths import read_document, recorded_document, recorded_path
from pipeline.provenance import provenance
from pipeline.rebalance import rebalance
from pipeline.rebalance.combine_seeds import combine
from pipeline.rebalance.methods.settings import candidates
from pipeline.rebalance.selection import AUTO, parse_lam
from pipeline.rebalance.tuning import is_comparison
from pipeline.report import write_report
from pipeline.report.table import results_tables
from pipeline.results.differences import read_hits
from pipeline.text import Shown

STAGE_1 = ("backbone/metrics.jsonl", "backbone/diagnostics.csv")  # what a report shows of it


@dataclass(frozen=True)
class RunResult(Shown):
    """A finished run: its folder, the results document (DESIGN: rebalance --json), report, and seconds by stage."""

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


@dataclass(frozen=True)
class ExternalBackbone:
    """A network from elsewhere that takes the place of stage 1; the fields are load_external's."""

    path: Path | None = None
    model: str | None = None
    key_map: Path | None = None
    probe: bool = False


@dataclass
class Ledger:
    """What each stage was made from, and how long it took: `run.json` of a run."""

    path: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    redone: list[str] = field(default_factory=list)

    def __post_init__(self):
        try:
            self.stages = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
        except (OSError, ValueError, KeyError):
            self.stages = {}

    def up_to_date(self, stage: str, inputs: Any) -> bool:
        """Whether the stage was made from these inputs and every file it wrote is still as it was."""
        known = self.stages.get(stage, {})
        files = known.get("outputs", {})
        whole = all(file_digest(self.path.parent / name) == digest for name, digest in files.items())
        return known.get("inputs") == _digest(inputs) and bool(files) and whole

    def outputs(self, stage: str) -> list[Path]:
        return [self.path.parent / name for name in self.stages[stage]["outputs"]]

    def did(
        self, stage: str, seconds: float, *, inputs: Any = None, outputs: Sequence[Path] = (), **facts: Any
    ) -> None:
        self.redone.append(stage)
        self.stages[stage] = {
            "seconds": round(seconds, 2),
            "inputs": _digest(inputs),
            "outputs": {str(p.relative_to(self.path.parent)): file_digest(p) for p in outputs},
            **facts,
        }

    def write(self, *, command: str = "run", **facts: Any) -> None:
        write_durably(self.path, json.dumps(provenance(command=command, stages=self.stages, **facts), indent=1))


def run_pipeline(
    config: Config,
    *,
    out: Path,
    store: Path | str | None = None,
    seeds: Sequence[int] | None = None,
    external: ExternalBackbone | None = None,
    device: str = "auto",
    overwrite: bool = False,
    talk: Talk | None = None,
) -> RunResult | None:
    """Trains, dumps, rebalances and reports under `out`, continuing whatever is there; None on ranks other than the first.

    store: where the features go, under it seed-N for each of several backbones; features.zarr in the run if None.
    seeds: one backbone each under out/seed-N on the same subset, combined by choosing λ on their mean validation accuracy.
    brought: the checkpoint to take instead of training one.
    Raises what the stages raise; everything finished stays.
    """
    talk = talk or Talk(quiet=True)
    external = external or (ExternalBackbone() if config.backbone.frozen else None)
    places = places_of(config, out, seeds, external)
    with distributed.ranks(device) as ranks:
        ranks.together(lambda: refuse_other_kind(out, seeds))
        ranks.together(lambda: reach(store))
        images = None if external else ranks.together(lambda: load_dataset(config.data))
        ranks.together(lambda: refuse_endless(config, images) if images else None)
        ledger = Ledger(out / "run.json")
        documents = [
            _one_backbone(
                c,
                p,
                store_of_seed(p, store, named=bool(seeds)),
                ledger,
                ranks,
                device,
                overwrite,
                talk,
                named=bool(seeds),
                external=external,
                images=images,
            )
            for p, c in places.items()
        ]
        if not ranks.first:
            return None
        if seeds:
            results = combine(documents, [read_hits(place / "rebalance" / "test_hits.safetensors") for place in places])
            write_durably(out / "results.json", json.dumps(recorded_document(results, out), indent=1))
        else:
            results = documents[0]
        report, pictures = _report(out, list(places), ledger, talk)
        ledger.write(
            config=config.model_dump(mode="json"), seeds=list(seeds or [config.backbone.seed]), ranks=ranks.world
        )
        seconds = {stage: entry["seconds"] for stage, entry in ledger.stages.items()}
        return RunResult(out, results, report, pictures, seconds, tuple(ledger.redone))


def places_of(
    config: Config, out: Path, seeds: Sequence[int] | None, external: ExternalBackbone | None
) -> dict[Path, Config]:
    """Folder of each backbone → its configuration; ConfigError where one is brought and several are to be trained."""
    if external and seeds:
        raise ConfigError(
            "--seeds trains one backbone a seed, --checkpoint and --encoder take one that is there: leave one of them away"
        )
    return {out / f"seed-{s}": with_seed(config, s) for s in seeds} if seeds else {out: config}


def refuse_other_kind(out: Path, seeds: Sequence[int] | None) -> None:
    if seeds and (out / "backbone" / "last.pt").exists():
        raise ConfigError(f"{out} holds a run of one backbone; take another --out for --seeds, or leave --seeds away")
    if not seeds and any(out.glob("seed-*/backbone/last.pt")):
        raise ConfigError(f"{out} holds a run of several backbones; give its --seeds again, or take another --out")


def refuse_endless(config: Config, images: Dataset) -> None:
    """DataError or ConfigError where the images have no split that stage 2 will need, before hours of training."""
    if "test" not in images.splits:
        raise DataError(
            f"{images.name}: no test images, so nothing could be measured; set data.test_per_class, or bring test images"
        )
    asked = candidates(config.rebalance, parse_lam(config.rebalance.lam) or AUTO)
    choice = len(asked) > 1 or is_comparison(config.rebalance)
    if choice and config.rebalance.select_on == "val" and "val" not in images.splits:
        raise ConfigError(
            f"{images.name}: no validation images to choose on; choose over folds of the training features with "
            "--set rebalance.select_on=kfold, give one λ with --set rebalance.lam=0.1, or set data.val_per_class"
        )


def reach(store: Path | str | None) -> None:
    """Looks at a store elsewhere, so that a wrong name or missing credentials are told before hours of training."""
    if store is None or not is_url(store):
        return
    try:
        locate(store).exists()
    except CacheError as error:
        ending = DataError(str(error))
        ending.exit_code = error.exit_code
        raise ending from error


def store_of_seed(out: Path, store: Path | str | None, *, named: bool) -> Path | str:
    """Where a backbone's features go: features.zarr in its folder, or what was asked for, with several seed-N below it."""
    if store is None:
        return out / "features.zarr"
    if not named:
        return store
    return f"{store}/{out.name}" if isinstance(store, str) else store / out.name


def _one_backbone(
    config: Config,
    out: Path,
    store: Path | str,
    ledger: Ledger,
    ranks: Ranks,
    device: str,
    overwrite: bool,
    talk: Talk,
    *,
    named: bool,
    external: ExternalBackbone | None,
    images: Dataset | None,
) -> dict[str, Any]:
    """Stages 1, dump and 2 of one backbone; the results document."""
    name = f"{out.name}/" if named else ""
    if named:
        talk.say(f"── {out.name}")

    def timed(stage: str, work: Callable[[], Any], happened: Callable[[Any], bool], **record: Any) -> Any:
        started = time.perf_counter()
        result = work()
        if happened(result):
            ledger.did(name + stage, time.perf_counter() - started, **record)
        return result

    if external:
        backbone, images = load_external_for_run(
            external.path, config, out / "backbone", model=external.model, key_map=external.key_map, probe=external.probe,
            overwrite=overwrite, ranks=ranks,
        )  # fmt: skip
        config = backbone.config
        ranks.together(lambda: refuse_endless(config, images))
        talk.say(f"{origin_text(backbone)}, kept in {out / 'backbone' / 'last.pt'}")
        talk.notes((backbone.external or {}).get("notes", ()))
    else:
        with talk.progress("training") as bar:
            reporter = TrainingReporter(talk, bar)
            trained = timed(
                "train-backbone",
                lambda: train_backbone(
                    config, out=out / "backbone", device=device, overwrite=overwrite, report=reporter, images=images
                ),
                lambda r: r.trained_epochs > 0,
            )
        backbone = load_checkpoint(trained.checkpoint)
    with talk.progress("dumping") as bar, told_what_stays(store):
        dumped = timed(
            "dump-features",
            lambda: dump_features(
                backbone,
                config,
                out=store,
                device=device,
                overwrite=overwrite,
                report=bar.move,
                images=images,
                keep_in=out / "backbone" if external else None,
            ),
            lambda r: r.written > 0,
        )
    whole = f"{store}: complete, all checksums hold"
    talk.say(str(dumped) if dumped.written or dumped.skipped else whole)
    folder = out / "rebalance"
    inputs = {
        "store": dumped.digest,
        "at": recorded_path(store, out),
        "settings": config.rebalance.model_dump(mode="json"),
    }
    if not ranks.largest(ranks.first and not ledger.up_to_date(name + "rebalance", inputs)):
        talk.say(f"{folder}: up to date")
    else:
        started = time.perf_counter()
        rebalance(store, config.rebalance, out=folder, device=device)
        outputs = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".csv", ".safetensors")]
        ledger.did(name + "rebalance", time.perf_counter() - started, inputs=inputs, outputs=outputs)
    if not ranks.first:
        return {}
    return read_document(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder)


@contextmanager
def told_what_stays(store: Path | str) -> Iterator[None]:
    """Of a store that was made otherwise a run is not to be told to begin anew: its training is good."""
    try:
        yield
    except (DataError, Otherwise) as error:
        if not isinstance(error, Otherwise) and not isinstance(error.__cause__, Otherwise):
            raise
        cause = str(error).partition(" Choose another --out")[0]
        remedy = "give another --store" if isinstance(store, str) else f"remove {store}"
        raise DataError(f"{cause} The training is good: {remedy}, then the same command makes its features") from error


def _report(out: Path, backbones: Sequence[Path], ledger: Ledger, talk: Talk) -> tuple[Path, tuple[Path, ...]]:
    """report.html and its pictures, drawn again if any backbone's results or training curve has changed."""
    made_from = [p / name for name in ("rebalance/results.json", *STAGE_1) for p in backbones]
    inputs, html = [file_digest(p) for p in made_from], out / "report.html"
    if not ledger.redone and ledger.up_to_date("report", inputs):
        talk.say(f"{html}: up to date")
    else:
        started = time.perf_counter()
        written = write_report(out)
        numbers = [figure.with_suffix(".csv") for figure in written.figures]
        ledger.did("report", time.perf_counter() - started, inputs=inputs, outputs=[html, *written.figures, *numbers])
    return html, tuple(p for p in ledger.outputs("report") if p.suffix == ".png")


def with_seed(config: Config, seed: int) -> Config:
    """The configuration of another backbone on the same subset."""
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"seed": seed})})


def file_digest(path: Path) -> str | None:
    """sha256 of a file's content, None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
