"""Methods compete: each is tuned with the same number of trials, and its best setting on validation stands for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import RebalanceConfig
from pipeline.errors import PipelineError
from pipeline.longtail import GROUPS
from pipeline.rebalance.candidates import method_names, parse_lam, references
from pipeline.rebalance.methods import RIVALS, Free
from pipeline.rebalance.methods.iwb_la import TRIALS
from pipeline.rebalance.sweep import Sweep
from pipeline.rebalance.tuning import edges, lams_of, next_trials
from pipeline.results.head_id import BASELINE, HeadId, chosen_text
from pipeline.results.mean_std import means_and_stds

ALIKE = 0.2  # percentage points


@dataclass(frozen=True)
class Comparison:
    """What tuning found.

    winners: the chosen setting of each method asked for. chosen: those of all tuned methods with how many trials each
    had, JSON-ready; trials: every setting tried, with its scores on the choosing split alone.
    """

    winners: list[HeadId]
    chosen: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    notes: list[str]


def compare(sweep: Sweep, config: RebalanceConfig, split: str, report: Callable[[str], object]) -> Comparison:
    """Fits the trials of one method after the other and keeps the heads of the best; report is told a line on each.

    The reference rows are tuned like everything else; iwb at λ = 0 takes the learning rate of iwb, where that is asked
    for, else of cb.
    """
    asked = method_names(config.method)
    reference = [s.method for s in references(config) if s.method not in ("baseline", "iwb")]
    found = Comparison([], [], [], [])
    rates: dict[str, float | None] = {}
    for method in dict.fromkeys([*reference, *asked]):
        tried, best = _tune(sweep, method, config, split)
        found.trials.extend(_trial(sweep, s, split, chosen=s == best) for s in tried)
        rates[method] = best.lr
        if method in asked:
            found.winners.append(best)
        if method != "baseline":
            border = edges(best, tried)
            found.chosen.append(_chosen(best, sweep, split, len(tried), border))
            report(_line(found.chosen[-1], found.trials[-len(tried) :]))
        curve = [s for s in tried if method == "iwb" and s.lr == best.lr and s not in sweep.diverged]
        sweep.keep_only([best, *curve, BASELINE], trials=tried)
    sweep.add([HeadId("iwb", config.loss, 0.0, rates.get("iwb", rates["cb"]))])
    at_border = [c["method"] for c in found.chosen if c["border"]]
    if at_border:
        found.notes.append(
            f"the best trial lies at the border of its grid, so that a better one may lie beyond, for {', '.join(at_border)}"
        )
    idle = [s.method for s in found.winners if s.method not in ("baseline", "ce") and _stays(sweep, s, split)]
    if idle:
        found.notes.append(
            f"{', '.join(idle)}: at the best of the trials every group is within {ALIKE:g} points of the stage-1 head, so on "
            "these features the method has not got going"
        )
    lams, asked_lams = lams_of(config), parse_lam(config.lam)
    if "iwb" in asked and asked_lams and len(lams) < len(asked_lams):
        tried_lams = ", ".join(f"{lam:g}" for lam in lams)
        found.notes.append(
            f"iwb: λ shares its {config.trials} trials with the learning rate, so λ {tried_lams} of the {len(asked_lams)} "
            "asked for were tried; --trials gives all methods more"
        )
    if "iwb-la" in asked:
        tries = ", ".join(f"{lam:g}" for lam in sorted({lam for lam, _ in TRIALS}))
        found.notes.append(
            f"iwb-la tries λ {tries} of its own, with its own loss: --lam, --loss and --formulation are not for it"
        )
    free = [c["method"] for c in found.chosen if isinstance(RIVALS.get(c["method"]), Free)]
    if free:
        found.notes.append(f"{config.trials} trials a trained method; as many as they like for those without training")
    return found


def _tune(sweep: Sweep, method: str, config: RebalanceConfig, split: str) -> tuple[list[HeadId], HeadId]:
    """(every setting tried, the best of them)."""
    tried: list[HeadId] = []
    best: HeadId | None = None
    while new := next_trials(method, config, tried, best):
        sweep.add(new)
        tried += new
        alive = [s for s in tried if s not in sweep.diverged]
        if not alive:
            raise PipelineError(
                f"{method}: fitting diverged at every learning rate; lower them: --lr {config.lr / 100:g}"
            )
        best = alive[sweep.choose(alive, split).index]
    assert best is not None
    return tried, best


def _stays(sweep: Sweep, setting: HeadId, split: str) -> bool:
    """Whether a setting's accuracies on the choosing split are those of the stage-1 head."""
    scored = sweep.scored[split]
    (start,) = (scores.summary for (s, _), scores in scored.items() if s == BASELINE)
    each = [(scored[setting, seed].summary[g], start[g]) for seed in sweep.seeds_of(setting) for g in (*GROUPS, "all")]
    return all(abs(a - b) < ALIKE for a, b in each if a is not None and b is not None)


def _trial(sweep: Sweep, setting: HeadId, split: str, *, chosen: bool) -> dict[str, Any]:
    seeds = sweep.seeds_of(setting)
    scores = [] if setting in sweep.diverged else [sweep.scored[split][setting, seed].summary for seed in seeds]
    told = setting.to_dict() | {"parameters": setting.parameters, "split": split, "n": len(seeds)}
    return told | means_and_stds(scores) | {"diverged": not scores, "chosen": chosen}


def _chosen(best: HeadId, sweep: Sweep, split: str, trials: int, border: list[str]) -> dict[str, Any]:
    mean = float(np.mean([sweep.scored[split][best, seed].summary["all"] for seed in sweep.seeds_of(best)]))
    return best.to_dict() | {"parameters": best.parameters, "trials": trials, "score": mean, "border": border}


def _line(chosen: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    diverged = sum(t["diverged"] for t in trials)
    scores = [t["all"] for t in trials if t["all"] is not None]
    lost = f", {diverged} diverged" if diverged else ""
    several = f"{len(trials)} trials{lost}, {trials[0]['split']} {min(scores):.1f} … {max(scores):.1f}"
    return f"{chosen['method']}: {several}; best {chosen_text(chosen)}"
