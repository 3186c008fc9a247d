"""From images to the paper's tables: stage 1, features, then every table on them; what is done and still whole stays."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache import write_durably
from pipeline.bench.rebalance import bench_rebalance
from pipeline.config import Config, load_config
from pipeline.console import Talk
from pipeline.distributed import Ranks, choose_device, planned_ranks, ranks
from pipeline.errors import ConfigError
from pipeline.ledger import Ledger
from pipeline.prepared import Prepared, Write, device_numbers, replaced_or_new
from pipeline.reproduce import page
from pipeline.reproduce.backbone import TABLES, Progress, ReproducedBackbone, describe_stages
from pipeline.reproduce.bundle import keep
from pipeline.reproduce.parallel_training import train_side_by_side
from pipeline.reproduce.rows import Row, over_backbones
from pipeline.run import BackboneStages
from pipeline.run_prepare import PreparedBackbone, prepare_backbone, with_seed
from pipeline.text import Shown

PLAN = (  # what is most valuable first
    ("reproduce/cifar100-if100", (0,)),
    ("reproduce/cifar100-if100", (0, 1, 2)),
    ("reproduce/cifar100-if50", (0,)),
    ("reproduce/cifar100-resnet32", (0,)),
)


@dataclass(frozen=True)
class Part:
    """One configuration with the seeds of its backbones; name and sets are what was typed for it."""

    config: Config
    seeds: tuple[int, ...]
    name: str
    sets: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What to type after a command to mean this configuration."""
        return " ".join([self.name, *(f"--set {s}" for s in self.sets)])


def plan(names: Sequence[str] = (), *, seeds: tuple[int, ...] | None = None, sets: Sequence[str] = ()) -> list[Part]:
    """The parts of named configurations, one backbone each unless seeds say more; without names the whole plan.

    Raises ConfigError for a name or setting that is wrong.
    """
    asked = [(name, (0,)) for name in names] or PLAN
    return [Part(load_config(name, sets), seeds or own, name, tuple(sets)) for name, own in asked]


def refuse_unknown(tables: Sequence[str]) -> None:
    if unknown := [t for t in tables if t not in TABLES]:
        raise ConfigError(f"--tables {','.join(unknown)}: unknown; known: {', '.join(TABLES)}")


def prepare_reproduce(
    parts: Sequence[Part] | None = None,
    *,
    out: Path,
    folder: Path | None = None,
    tables: Sequence[str] = TABLES,
    device: str = "auto",
) -> Prepared:
    """Return what `reproduce` would do; raises what it would raise before its first step."""
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


def _prepare(part: Part, seed: int, *, out: Path, processes: Ranks) -> PreparedBackbone:
    """Return the stages of one backbone of a part, checked."""
    folder = out / part.config.name / f"seed-{seed}"
    return prepare_backbone(
        with_seed(part.config, seed), out=folder, store=folder / "features.zarr", planned=processes, running=processes,
        prefix=f"seed-{seed}/",
    )  # fmt: skip


@dataclass(frozen=True)
class Reproduction(Shown):
    """The finished tables: rows as in reproduction.json by configuration, the two files, and what to keep.

    deviations: in what each configuration departs from the paper. seconds: by step. redone: the steps that this call did;
    the others were there.
    """

    data: Path
    page: Path
    kept: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    deviations: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    redone: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        paths = {"data": str(self.data), "page": str(self.page), "kept": str(self.kept)}
        rows = [row for of_one in self.rows.values() for row in of_one]
        return paths | {"seconds": self.seconds, "redone": self.redone, "deviations": self.deviations, "rows": rows}

    def __str__(self) -> str:
        number = sum(map(len, self.rows.values()))
        done = f"{len(self.redone)} of {len(self.seconds)} steps done now, the others were there"
        return f"{number} rows in {self.data}; tables: {self.page}; to keep: {self.kept}\n{done}"


def reproduce(
    parts: Sequence[Part] | None = None,
    *,
    out: Path = Path("runs/reproduce"),
    folder: Path | None = None,
    tables: Sequence[str] = TABLES,
    side_by_side: int | None = None,
    bench: bool = False,
    device: str = "auto",
    talk: Talk | None = None,
) -> Reproduction:
    """Does every part in order, by default the whole plan: its backbones, and the tables on them.

    Backbones lie under out/CONFIG-NAME/seed-N (backbone/, features.zarr). Whatever is there and made from the same
    inputs stays: a finished training or store of the same configuration and images is taken up. After each backbone
    reproduction.json and .md in `folder` (default: out) hold what there is, and out/keep what should be kept.
    side_by_side: how many backbones train at once, each in a process of its own, by default two on a GPU, else one.
    bench: on a GPU also the speed of stage 2, once.
    Raises what the stages raise; everything finished stays.
    """
    talk, folder, on_gpu = talk or Talk(quiet=True), folder or out, choose_device(device).type == "cuda"
    parts, side_by_side = plan() if parts is None else parts, side_by_side or (2 if on_gpu else 1)
    refuse_unknown(tables)
    steps = ("train-backbone", "dump-features", *tables)
    progress = Progress([f"{p.config.name}/{step}" for p in parts for _ in p.seeds for step in steps], talk)
    found = Reproduction(folder / "reproduction.json", folder / "reproduction.md", out / "keep")
    for part in parts:
        config, name = part.config, part.config.name
        place = out / name
        talk.say(f"{name}, seeds {', '.join(map(str, part.seeds))}: {place}")
        if side_by_side > 1:
            train_side_by_side(config, part.seeds, place=place, at_once=side_by_side, device=device, talk=talk)
        ledger, each = Ledger(place / "reproduce.json"), list[list[Row]]()
        for seed in part.seeds:
            with ranks(device) as processes:
                prepared = _prepare(part, seed, out=out, processes=processes)
                stages = BackboneStages(prepared, ledger, processes, device, talk)
                backbone = ReproducedBackbone(stages, name=part.name, words=part.words)
                each.append(backbone.rows(tables, progress))
            if name not in found.deviations:
                found.deviations[name] = backbone.deviations
                talk.say("\n".join(f"deviation: {sentence}" for sentence in backbone.deviations))
            done = ",".join(map(str, part.seeds[: len(each)]))
            found.rows[name] = over_backbones(each, command=f"pipeline reproduce {part.words} --seeds {done}")
            page.write(folder, found.rows[name], {name: found.deviations[name]})
            keep(backbone.folder, found.kept / f"{name}-seed-{seed}", documents=tables)
        found.seconds.update((f"{name}/{step}", entry["seconds"]) for step, entry in ledger.stages.items())
        found.redone.extend(f"{name}/{step}" for step in ledger.redone)
    file = found.kept / "bench-rebalance.json"
    if bench and on_gpu and not file.is_file():
        measured = bench_rebalance(device=device, large=True, say=talk.say)
        write_durably(file, json.dumps(measured.to_dict(), indent=1, allow_nan=False))
        talk.say(f"bench rebalance: {file}")
    return found
