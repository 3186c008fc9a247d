"""Several settings of stage 1, each trained with the same seeds, and the choice among them by validation accuracy.

The test split is never looked at: nothing here can be selected on it.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache import write_durably
from pipeline import distributed
from pipeline.backbone.train import train_backbone
from pipeline.config import Config, apply_setting, make_config
from pipeline.console import Talk, TrainingReporter, percent
from pipeline.data import load_dataset
from pipeline.errors import ConfigError, Diverged
from pipeline.provenance import provenance
from pipeline.rebalance.selection import Choice, select
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
class Try:
    """One setting: values by key, the name of its folder, the configuration they give."""

    values: Mapping[str, Any]
    name: str
    config: Config


@dataclass(frozen=True)
class TriesResult(Shown):
    """What `tries.json` says, and where it lies."""

    out: Path
    document: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"out": str(self.out), **self.document}

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from pipeline.report.table import tries_table

        yield tries_table(self.document)
        yield from (f"{note[0].upper()}{note[1:]}." for note in self.document["notes"])
        yield f"all numbers: {self.out / 'tries.json'}"
        chosen = self.document["selected"]
        yield f"next: pipeline dump-features --checkpoint {chosen['checkpoint']}"
        if chosen["set"]:
            keep = " ".join(f"--set {key}={_text(value)}" for key, value in chosen["set"].items())
            yield f"or, in a run of its own: {keep}"


def grid(config: Config, options: Sequence[str]) -> list[Try]:
    """Every combination of the values of options such as `backbone.weight_decay=5e-4,1e-3`, the first key outermost.

    Raises ConfigError naming the option: no KEY=V1,V2, a key given twice or not of training, a value that does not fit.
    """
    asked: dict[str, list[str]] = {}
    for option in options:
        key, _, text = (part.strip() for part in option.partition("="))
        values = [v for v in re.split(r",(?![^\[]*\])", text) if v.strip()]
        if not values or key in asked:
            raise ConfigError(
                f"--try {option}: expected KEY=VALUE,VALUE,…, each key once: backbone.weight_decay=5e-4,1e-3"
            )
        if key == "backbone.seed" or not (key.startswith("backbone.") or key in IMAGES):
            raise ConfigError(
                f"--try {option}: only keys of training can be tried, which are backbone.… and {', '.join(IMAGES)}"
                + ("; several seeds: --seeds 0,1,2" if key == "backbone.seed" else "")
            )
        asked[key] = values
    found = [_try(config, dict(zip(asked, values, strict=True))) for values in itertools.product(*asked.values())]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--try: {twice[0]} comes twice")
    return found


def try_settings(
    config: Config,
    options: Sequence[str],
    *,
    out: Path,
    seeds: Sequence[int] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    talk: Talk | None = None,
) -> TriesResult | None:
    """Trains every setting with every seed in out/tries/NAME/seed-N, or goes on, chooses, writes tries.json and tries.csv.

    Chosen is the highest balanced validation accuracy of the last epoch, mean over seeds; with a single setting nothing
    is. None on ranks other than the first. A training that diverges is told and its setting never chosen. Raises
    ConfigError where there is no validation split to choose on, and what training raises.
    """
    talk, seeds = talk or Talk(quiet=True), tuple(seeds or (config.backbone.seed,))
    tries = grid(config, options)
    with distributed.ranks(device) as ranks:
        ranks.together(lambda: refuse_without_validation(config))
        runs: list[list[dict[str, Any]]] = []
        facts: dict[str, Any] = {}
        for number, (one, seed) in enumerate(itertools.product(tries, seeds)):
            folder = out / "tries" / one.name / f"seed-{seed}"
            talk.say(f"── {one.name}, seed {seed} ({number + 1} of {len(tries) * len(seeds)})")
            settings = one.config.backbone.model_copy(update={"seed": seed})
            with talk.progress("training") as bar:
                reporter = TrainingReporter(talk, bar, brief=number > 0)
                line: dict[str, Any] | None = None
                try:
                    trained = train_backbone(
                        one.config.model_copy(update={"backbone": settings}),
                        out=folder, device=device, overwrite=overwrite, report=reporter,
                    )  # fmt: skip
                    line, facts = trained.last, {"network": trained.network, "dataset": trained.dataset}
                except Diverged as error:
                    talk.say(f"diverged: {error}")
            run = _run(seed, folder / "last.pt", line)
            talk.say(f"balanced validation accuracy of the last epoch: {percent(run['all'])}")
            if seed == seeds[0]:
                runs.append([])
            runs[-1].append(run)
        if not ranks.first:
            return None
        document = compare(tries, runs, seeds=seeds) | facts
        document["provenance"] = provenance(
            command="train-backbone", config=config.model_dump(mode="json"), tried=list(options), ranks=ranks.world
        )
        write_durably(out / "tries.json", json.dumps(document, indent=1))
        write_durably(out / "tries.csv", _csv(document["tries"]))
        return TriesResult(out, document)


def compare(
    tries: Sequence[Try], runs: Sequence[Sequence[Mapping[str, Any]]], *, seeds: Sequence[int]
) -> dict[str, Any]:
    """The document: every setting with its runs, mean and std over seeds, and which was chosen on validation.

    runs: of each setting one for every seed, as `_run` makes them; accuracies None where the training diverged.
    """
    alive = [i for i, of_one in enumerate(runs) if all(run["all"] is not None for run in of_one)]
    if not alive:
        raise Diverged("every setting diverged; lower backbone.lr or set backbone.warmup_epochs")
    choice = select(
        np.array([[run["all"] for run in runs[i]] for i in alive]),
        sampling_error=[float(np.mean([run["standard_error"] for run in runs[i]])) for i in alive],
    )
    best, near = alive[choice.index], {alive[i] for i in choice.within_one_se}
    several = len(tries) > 1
    rows = [
        {
            "name": one.name,
            "set": dict(one.values),
            "n": len(seeds),
            **_spread(of_one),
            "diverged": [run["seed"] for run in of_one if run["all"] is None],
            "within_one_se": several and i in near,
            "runs": [dict(run) for run in of_one],
        }
        for i, (one, of_one) in enumerate(zip(tries, runs, strict=True))
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
        "notes": _notes(tries, best, near, choice) if several else [],
    }


def _notes(tries: Sequence[Try], best: int, near: set[int], choice: Choice) -> list[str]:
    others = [tries[i].name for i in sorted(near) if i != best]
    found = []
    if others:
        found.append(
            f"validation cannot tell {tries[best].name} from {'; '.join(others)}: within one standard error, "
            f"{choice.standard_error:.1f} points"
        )
    for key, value in tries[best].values.items():
        values = sorted({one.values[key] for one in tries}) if _is_number(value) else []
        if len(values) > 2 and value in (values[0], values[-1]) and value != 0:  # 0 is off: nothing lies beyond
            found.append(
                f"the chosen {key} {_text(value)} lies at the border of what was tried; a better one may lie beyond"
            )
    return found


def refuse_without_validation(config: Config) -> None:
    if load_dataset(config.data).val is None:
        raise ConfigError(
            "--try and --seeds compare by validation accuracy, and these data have no validation split; hold images out "
            "with data.val_per_class, or name them with data.val_list"
        )


def _try(config: Config, texts: Mapping[str, str]) -> Try:
    tree = config.model_dump(mode="json")
    settings = [f"{key}={text}" for key, text in texts.items()]
    for setting in settings:
        apply_setting(tree, setting)
    made = make_config(tree, " ".join(f"--try {s}" for s in settings))
    values = {key: reduce(getattr, key.split("."), made) for key in texts}
    named = ",".join(f"{key.removeprefix('backbone.')}={_text(value)}" for key, value in values.items())
    return Try(values, re.sub(r"[^A-Za-z0-9._=,+-]", "_", named) or "as-configured", made)


def _run(seed: int, checkpoint: Path, line: Mapping[str, Any] | None) -> dict[str, Any]:
    """One training by the last line of its metrics; None for one that diverged."""
    line = line or {}
    accuracies = {m: line.get(f"val_{'accuracy' if m == 'all' else m}") for m in MEASURES}
    told = {key: line.get(key) for key in ("train_accuracy", "loss")}
    return {"seed": seed, **accuracies, "standard_error": line.get("val_standard_error"), **told} | {
        "checkpoint": str(checkpoint)
    }


def _spread(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for measure in MEASURES:
        values = [run[measure] for run in runs if run[measure] is not None]
        found[measure] = float(np.mean(values)) if values else None
        found[f"{measure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each training."""
    lines = [{**row["set"], **run} for row in rows for run in row["runs"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """As one would type it: 0.0005, true, class-balanced."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
