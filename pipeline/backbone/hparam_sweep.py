"""Several settings of stage 1, each trained with the same seeds, and the choice among them by validation accuracy.

The test split is never looked at: nothing here can be selected on it.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache import write_durably
from pipeline import distributed
from pipeline.backbone.prepare import PreparedTraining, prepare_training
from pipeline.backbone.reporter import TrainingReporter
from pipeline.backbone.train import train
from pipeline.config import Config, apply_setting, make_config
from pipeline.console import Talk, percent
from pipeline.data import Dataset, load_dataset
from pipeline.distributed import Ranks, planned_ranks
from pipeline.errors import ConfigError, Diverged
from pipeline.prepared import Prepared, Write, device_numbers, replaced_or_new
from pipeline.provenance import provenance
from pipeline.results.files import csv_text, write_artefact
from pipeline.results.mean_std import means_and_stds
from pipeline.results.selection import Choice, select
from pipeline.results.tables import tries_table
from pipeline.text import Shown

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

MEASURES = ("all", "many", "medium", "few")
IMAGES = (
    "data.augment",
    "data.policy",
    "data.rand_n",
    "data.rand_m",
    "data.cutout",
)  # what leaves the data as they are


@dataclass(frozen=True)
class SweepPoint:
    """One setting: values by key, the name of its folder, the configuration that they give."""

    values: Mapping[str, Any]
    name: str
    config: Config


@dataclass(frozen=True, eq=False)
class PreparedSweep:
    """Trainings that have passed every check.

    Arguments:
        description: what they would do; `--dry-run` prints it.
        trainings: of every point one for each seed, the points outermost.
    """

    description: Prepared
    points: tuple[SweepPoint, ...]
    seeds: tuple[int, ...]
    trainings: tuple[PreparedTraining, ...]


@dataclass(frozen=True)
class SweepResult(Shown):
    """The settings of stage 1 that were tried.

    Arguments:
        out: the folder of `tries.json`.
        document: its content.
    """

    out: Path
    document: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"out": str(self.out), **self.document}

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield tries_table(self.document)
        yield from (f"{note[0].upper()}{note[1:]}." for note in self.document["notes"])
        yield f"all numbers: {self.out / 'tries.json'}"
        selected = self.document["selected"]
        yield f"next: pipeline dump-features --checkpoint {selected['checkpoint']}"
        if selected["set"]:
            options_text = " ".join(f"--set {key}={_text(value)}" for key, value in selected["set"].items())
            yield f"or, in a run of its own: {options_text}"


def grid(config: Config, options: Sequence[str]) -> list[SweepPoint]:
    """Return every combination of the values of options such as `backbone.weight_decay=5e-4,1e-3`, the first key outermost.

    Raises ConfigError naming the option: no KEY=V1,V2, a key given twice or not of training, a value that does not fit.
    """
    choices: dict[str, list[str]] = {}
    for option in options:
        key, _, text = (part.strip() for part in option.partition("="))
        values = [v for v in re.split(r",(?![^\[]*\])", text) if v.strip()]
        if not values or key in choices:
            raise ConfigError(
                f"--try {option}: expected KEY=VALUE,VALUE,…, each key once: backbone.weight_decay=5e-4,1e-3"
            )
        if key == "backbone.seed" or not (key.startswith("backbone.") or key in IMAGES):
            raise ConfigError(
                f"--try {option}: only keys of training can be tried, which are backbone.… and {', '.join(IMAGES)}"
                + ("; several seeds: --seeds 0,1,2" if key == "backbone.seed" else "")
            )
        choices[key] = values
    points = [
        _point(config, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())
    ]
    names = [point.name for point in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--try: {twice[0]} comes twice")
    return points


def prepare_sweep(
    config: Config,
    options: Sequence[str],
    *,
    out: Path | str,
    seeds: Sequence[int] | None = None,
    device: str = "auto",
    world: int = 1,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> PreparedSweep:
    """Return the trainings of `sweep_hparams`, all of them checked; nothing is written.

    Arguments: those of `sweep_hparams`; world, ranks: as in `prepare_training`.
    Raises: ConfigError: options that make no sense, or no validation split to choose on; what `prepare_training` raises.
    """
    points, seeds, out = grid(config, options), tuple(seeds or (config.backbone.seed,)), Path(out)
    ranks = ranks or planned_ranks(device, world)
    images = load_dataset(config.data)  # no option changes them
    refuse_without_validation(images)
    trainings, parts = [], []
    for point, seed in itertools.product(points, seeds):
        settings = point.config.backbone.model_copy(update={"seed": seed})
        training = prepare_training(
            point.config.model_copy(update={"backbone": settings}),
            out=out / "tries" / point.name / f"seed-{seed}", overwrite=overwrite, images=images, ranks=ranks,
        )  # fmt: skip
        facts = {name: training.description.facts[name] for name in ("network", "trains")}
        trainings.append(training)
        parts.append(replace(training.description, title=f"{point.name}, seed {seed}", facts=facts, notes=()))
    numbers = {"trainings": len(parts)} | {key: sum(p.numbers[key] for p in parts) for key in ("steps", "images")}
    first = trainings[0].description
    facts = {key: text for key, text in first.facts.items() if key not in ("network", "trains")}
    facts["trains"] = (
        f"{len(points)} setting(s) × {len(seeds)} seed(s): {numbers['steps']:,} steps, {numbers['images']:,} images"
    )
    description = Prepared(
        "train-backbone",
        config.model_dump(mode="json", include={"name", "data", "backbone"}),
        facts,
        numbers | device_numbers(ranks, first.numbers["precision"]),
        tuple(Write(out / name, None, replaced_or_new(out / name)) for name in ("tries.json", "tries.csv")),
        first.notes,
        tuple(parts),
    )
    return PreparedSweep(description, tuple(points), seeds, tuple(trainings))


def sweep_hparams(
    config: Config,
    options: Sequence[str],
    *,
    out: Path,
    seeds: Sequence[int] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    talk: Talk | None = None,
) -> SweepResult | None:
    """Train every setting with every seed in out/tries/NAME/seed-N, or go on; choose; write tries.json and tries.csv.

    The setting with the highest balanced validation accuracy of the last epoch, mean over seeds, is selected; a setting
    with a training that diverged never is.

    Arguments:
        options: such as `backbone.lr=0.1,0.2`; several give every combination.

    Returns: None on ranks other than the first.
    Raises: what `prepare_sweep` and training raise.
    """
    talk = talk or Talk(quiet=True)
    with distributed.ranks(device) as ranks:
        sweep = ranks.together(
            lambda: prepare_sweep(config, options, out=out, seeds=seeds, overwrite=overwrite, ranks=ranks)
        )
        runs: list[list[dict[str, Any]]] = []
        facts: dict[str, Any] = {}
        pairs = itertools.product(sweep.points, sweep.seeds)
        for number, ((point, seed), training) in enumerate(zip(pairs, sweep.trainings, strict=True)):
            talk.say(f"── {point.name}, seed {seed} ({number + 1} of {len(sweep.trainings)})")
            line: dict[str, Any] | None = None
            with talk.progress("training") as bar:
                try:
                    result = train(training, ranks=ranks, report=TrainingReporter(talk, bar, brief=number > 0))
                    line, facts = result.last, {"network": result.network, "dataset": result.dataset}
                except Diverged as error:
                    talk.say(f"diverged: {error}")
            run = _run(seed, training.out / "last.pt", line)
            talk.say(f"balanced validation accuracy of the last epoch: {percent(run['all'])}")
            if seed == sweep.seeds[0]:
                runs.append([])
            runs[-1].append(run)
        if not ranks.first:
            return None
        document = compare(sweep.points, runs, seeds=sweep.seeds) | facts
        document["provenance"] = provenance(
            command="train-backbone", config=config.model_dump(mode="json"), tried=list(options), ranks=ranks.world
        )
        write_artefact(out / "tries.json", "sweep", document)
        write_durably(
            out / "tries.csv", csv_text([{**row["set"], **run} for row in document["tries"] for run in row["runs"]])
        )
        return SweepResult(out, document)


def compare(
    points: Sequence[SweepPoint], runs: Sequence[Sequence[Mapping[str, Any]]], *, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return the document: every setting with its runs, mean and std over seeds, and the one selected on validation.

    Arguments:
        runs: for each setting one per seed, as `_run` makes them; accuracies are None where the training diverged.
    """
    alive = [i for i, point_runs in enumerate(runs) if all(run["all"] is not None for run in point_runs)]
    if not alive:
        raise Diverged("every setting diverged; lower backbone.lr or set backbone.warmup_epochs")
    choice = select(
        np.array([[run["all"] for run in runs[i]] for i in alive]),
        sampling_error=[float(np.mean([run["standard_error"] for run in runs[i]])) for i in alive],
    )
    best, near = alive[choice.index], {alive[i] for i in choice.within_one_se}
    several = len(points) > 1
    rows = [
        {
            "name": point.name,
            "set": dict(point.values),
            "n": len(seeds),
            **means_and_stds(point_runs, MEASURES),
            "diverged": [run["seed"] for run in point_runs if run["all"] is None],
            "within_one_se": several and i in near,
            "runs": [dict(run) for run in point_runs],
        }
        for i, (point, point_runs) in enumerate(zip(points, runs, strict=True))
    ]
    selected = {
        key: rows[best][key] for key in ("name", "set", "n", *(f"{m}{s}" for m in MEASURES for s in ("", "_std")))
    }
    return {
        "seeds": list(seeds),
        "tries": rows,
        "selected": selected
        | {
            "chosen_on": "val" if several else None,
            "standard_error": choice.standard_error,
            "checkpoint": runs[best][0]["checkpoint"],
        },
        "notes": _notes(points, best, near, choice) if several else [],
    }


def _notes(points: Sequence[SweepPoint], best: int, near: set[int], choice: Choice) -> list[str]:
    equals = [points[i].name for i in sorted(near) if i != best]
    notes = []
    if equals:
        notes.append(
            f"validation cannot tell {points[best].name} from {'; '.join(equals)}: within one standard error, "
            f"{choice.standard_error:.1f} points"
        )
    for key, value in points[best].values.items():
        values = sorted({point.values[key] for point in points}) if _is_number(value) else []
        if len(values) > 2 and value in (values[0], values[-1]) and value != 0:  # 0 is off: nothing lies beyond
            notes.append(
                f"the chosen {key} {_text(value)} lies at the border of what was tried; a better one may lie beyond"
            )
    return notes


def refuse_without_validation(images: Dataset) -> None:
    if images.val is None:
        raise ConfigError(
            "--try and --seeds compare by validation accuracy, and these data have no validation split; hold images out "
            "with data.val_per_class, or name them with data.val_list"
        )


def _point(config: Config, texts: Mapping[str, str]) -> SweepPoint:
    tree = config.model_dump(mode="json")
    settings = [f"{key}={text}" for key, text in texts.items()]
    for setting in settings:
        apply_setting(tree, setting)
    checked = make_config(tree, " ".join(f"--try {s}" for s in settings))
    values = {key: reduce(getattr, key.split("."), checked) for key in texts}
    name = ",".join(f"{key.removeprefix('backbone.')}={_text(value)}" for key, value in values.items())
    return SweepPoint(values, re.sub(r"[^A-Za-z0-9._=,+-]", "_", name) or "as-configured", checked)


def _run(seed: int, checkpoint: Path, line: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return one training as tries.json has it, from the last line of its metrics, None for one that diverged."""
    line = line or {}
    accuracies = {m: line.get(f"val_{'accuracy' if m == 'all' else m}") for m in MEASURES}
    return {
        "seed": seed,
        **accuracies,
        "standard_error": line.get("val_standard_error"),
        "train_accuracy": line.get("train_accuracy"),
        "loss": line.get("loss"),
        "checkpoint": str(checkpoint),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """Return the value as one types it: 0.0005, true, class-balanced."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
