"""From images to the paper's tables: stage 1, features, every table; finished stages are not repeated."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Config, load_config
from pipeline.console import Talk
from pipeline.distributed import Ranks, choose_device, planned_ranks, ranks
from pipeline.errors import ConfigError
from pipeline.ledger import Ledger
from pipeline.prepared import Prepared, Write, device_numbers, replaced_or_new
from pipeline.reproduce import page
from pipeline.reproduce.backbone import TABLES, ReproducedBackbone, StepProgress, describe_stages
from pipeline.reproduce.bundle import keep_files
from pipeline.reproduce.parallel_training import train_side_by_side
from pipeline.reproduce.rows import Row, over_backbones
from pipeline.run import BackboneStages
from pipeline.run_prepare import PreparedBackbone, prepare_backbone, with_seed
from pipeline.text import Shown

PLAN = (  # the most valuable first
    ("reproduce/cifar100-if100", (0,)),
    ("reproduce/cifar100-if100", (0, 1, 2)),
    ("reproduce/cifar100-if50", (0,)),
    ("reproduce/cifar100-resnet32", (0,)),
)


@dataclass(frozen=True)
class ReproductionPart:
    """One configuration with the seeds of its backbones.

    Arguments:
        name, sets: the configuration and its settings as they were typed.
    """

    config: Config
    seeds: tuple[int, ...]
    name: str
    sets: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The arguments of a command that name this configuration."""
        return " ".join([self.name, *(f"--set {s}" for s in self.sets)])


def plan(
    names: Sequence[str] = (), *, seeds: tuple[int, ...] | None = None, sets: Sequence[str] = ()
) -> list[ReproductionPart]:
    """Return the parts of named configurations, one backbone each by default; without names those of PLAN.

    Raises ConfigError for a name or setting that is wrong.
    """
    entries = [(name, (0,)) for name in names] or PLAN
    return [ReproductionPart(load_config(name, sets), seeds or planned, name, tuple(sets)) for name, planned in entries]


def refuse_unknown(tables: Sequence[str]) -> None:
    if unknown := [t for t in tables if t not in TABLES]:
        raise ConfigError(f"--tables {','.join(unknown)}: unknown; known: {', '.join(TABLES)}")


def prepare_reproduce(
    parts: Sequence[ReproductionPart] | None = None,
    *,
    out: Path,
    folder: Path | None = None,
    tables: Sequence[str] = TABLES,
    device: str = "auto",
) -> Prepared:
    """Return what `reproduce` would do; nothing is written.

    Arguments: those of `reproduce`.
    Raises: what it would raise before its first step.
    """
    refuse_unknown(tables)
    processes = planned_ranks(device, 1)
    stages: list[Prepared] = []
    for part in plan() if parts is None else parts:
        for seed in part.seeds:
            stages += describe_stages(_prepare(part, seed, out=out, processes=processes), tables)
    if not stages:
        raise ConfigError("nothing to reproduce: give a configuration")
    page_file = (folder or out) / "reproduction.md"
    numbers = {"out": str(out), "tables": list(tables)} | device_numbers(processes, stages[0].numbers["precision"])
    writes = (Write(page_file, None, replaced_or_new(page_file)), Write(out / "keep", None, "kept files"))
    return Prepared("reproduce", {}, {}, numbers, writes, (), tuple(stages))


def _prepare(part: ReproductionPart, seed: int, *, out: Path, processes: Ranks) -> PreparedBackbone:
    """Return the stages of one backbone of a part, checked."""
    folder = out / part.config.name / f"seed-{seed}"
    return prepare_backbone(
        with_seed(part.config, seed), out=folder, store=folder / "features.zarr", planned=processes, running=processes,
        prefix=f"seed-{seed}/",
    )  # fmt: skip


@dataclass(frozen=True)
class Reproduction(Shown):
    """The finished tables.

    Arguments:
        data, page: reproduction.json and reproduction.md.
        keep: folder of the few small files worth keeping.
        rows: those of reproduction.json by configuration.
        deviations: sentences on the differences of each configuration from the paper.
        seconds: by step.
        redone: steps that this call did; the others were finished.
    """

    data: Path
    page: Path
    keep: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    deviations: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    redone: list[str] = field(default_factory=list)

    @property
    def bench(self) -> Path:
        """The file of the stage-2 benchmark, which the command measures once on a GPU."""
        return self.keep / "bench-rebalance.json"

    def to_dict(self) -> dict[str, Any]:
        paths = {"data": str(self.data), "page": str(self.page), "kept": str(self.keep)}
        rows = [row for config_rows in self.rows.values() for row in config_rows]
        return paths | {"seconds": self.seconds, "redone": self.redone, "deviations": self.deviations, "rows": rows}

    def __str__(self) -> str:
        number = sum(map(len, self.rows.values()))
        done = f"{len(self.redone)} of {len(self.seconds)} steps done now, the others were there"
        return f"{number} rows in {self.data}; tables: {self.page}; to keep: {self.keep}\n{done}"


def reproduce(
    parts: Sequence[ReproductionPart] | None = None,
    *,
    out: Path = Path("runs/reproduce"),
    folder: Path | None = None,
    tables: Sequence[str] = TABLES,
    side_by_side: int | None = None,
    device: str = "auto",
    talk: Talk | None = None,
) -> Reproduction:
    """Make every part in order, by default those of PLAN: its backbones, and the tables on them.

    Backbones lie under out/CONFIG-NAME/seed-N (backbone/, features.zarr). A finished training or store of the same
    configuration and images is used as it is. After each backbone, reproduction.json and reproduction.md hold the tables
    so far, and out/keep the files worth keeping.

    Arguments:
        folder: of reproduction.json and reproduction.md; by default `out`.
        side_by_side: backbones that train at once, each in a process of its own; by default two on a GPU, else one.
    Raises: what the stages raise; every finished stage stays.
    """
    talk, folder, on_gpu = talk or Talk(quiet=True), folder or out, choose_device(device).type == "cuda"
    parts, side_by_side = plan() if parts is None else parts, side_by_side or (2 if on_gpu else 1)
    refuse_unknown(tables)
    steps = ("train-backbone", "dump-features", *tables)
    progress = StepProgress([f"{p.config.name}/{step}" for p in parts for _ in p.seeds for step in steps], talk)
    result = Reproduction(folder / "reproduction.json", folder / "reproduction.md", out / "keep")
    for part in parts:
        config, name = part.config, part.config.name
        place = out / name
        talk.say(f"{name}, seeds {', '.join(map(str, part.seeds))}: {place}")
        if side_by_side > 1:
            train_side_by_side(config, part.seeds, place=place, at_once=side_by_side, device=device, talk=talk)
        ledger, by_backbone = Ledger(place / "reproduce.json"), list[list[Row]]()
        for seed in part.seeds:
            with ranks(device) as processes:
                prepared = _prepare(part, seed, out=out, processes=processes)
                stages = BackboneStages(prepared, ledger, processes, device, talk)
                backbone = ReproducedBackbone(stages, name=part.name, words=part.words)
                by_backbone.append(backbone.rows(tables, progress))
            if name not in result.deviations:
                result.deviations[name] = backbone.deviations
                talk.say("\n".join(f"deviation: {sentence}" for sentence in backbone.deviations))
            done = ",".join(map(str, part.seeds[: len(by_backbone)]))
            result.rows[name] = over_backbones(by_backbone, command=f"pipeline reproduce {part.words} --seeds {done}")
            page.write(folder, result.rows[name], {name: result.deviations[name]})
            keep_files(backbone.folder, result.keep / f"{name}-seed-{seed}", documents=tables)
        result.seconds.update((f"{name}/{step}", entry["seconds"]) for step, entry in ledger.stages.items())
        result.redone.extend(f"{name}/{step}" for step in ledger.redone)
    return result
