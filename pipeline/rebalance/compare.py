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
    """The result of tuning.

    Arguments:
        winners: the best trial of each method asked for.
        tuned: the best trials of all tuned methods with their number of trials, JSON-ready.
        trials: every trial with its scores on the split that is chosen on.
    """

    winners: list[HeadId]
    tuned: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    notes: list[str]


def compare(sweep: Sweep, config: RebalanceConfig, split: str, report: Callable[[str], object]) -> Comparison:
    """Fit the trials of one method after the other and keep the heads of the best.

    The reference rows are tuned like everything else; iwb at λ = 0 takes the learning rate of iwb, where that is asked
    for, else of cb.

    Arguments:
        report: called with a line on each method.
    """
    methods = method_names(config.method)
    reference = [s.method for s in references(config) if s.method not in ("baseline", "iwb")]
    comparison = Comparison([], [], [], [])
    rates: dict[str, float | None] = {}
    for method in dict.fromkeys([*reference, *methods]):
        trials, best = _tune(sweep, method, config, split)
        comparison.trials.extend(_trial(sweep, s, split) | {"chosen": s == best} for s in trials)
        rates[method] = best.lr
        if method in methods:
            comparison.winners.append(best)
        if method != "baseline":
            border = edges(best, trials)
            comparison.tuned.append(_winner(best, sweep, split, len(trials), border))
            report(_line(comparison.tuned[-1], comparison.trials[-len(trials) :]))
        curve = [s for s in trials if method == "iwb" and s.lr == best.lr and s not in sweep.diverged]
        sweep.keep_only([best, *curve, BASELINE], trials=trials)
    sweep.add([HeadId("iwb", config.loss, 0.0, rates.get("iwb", rates["cb"]))])
    at_border = [c["method"] for c in comparison.tuned if c["border"]]
    if at_border:
        comparison.notes.append(
            f"the best trial lies at the border of its grid, so that a better one may lie beyond, for {', '.join(at_border)}"
        )
    idle = [s.method for s in comparison.winners if s.method not in ("baseline", "ce") and _stays(sweep, s, split)]
    if idle:
        comparison.notes.append(
            f"{', '.join(idle)}: at the best of the trials every group is within {ALIKE:g} points of the stage-1 head, so on "
            "these features the method has no effect"
        )
    lams, all_lams = lams_of(config), parse_lam(config.lam)
    if "iwb" in methods and all_lams and len(lams) < len(all_lams):
        tried_lams = ", ".join(f"{lam:g}" for lam in lams)
        comparison.notes.append(
            f"iwb: λ shares its {config.trials} trials with the learning rate, so λ {tried_lams} of the {len(all_lams)} "
            "asked for were tried; --trials gives all methods more"
        )
    if "iwb-la" in methods:
        tries = ", ".join(f"{lam:g}" for lam in sorted({lam for lam, _ in TRIALS}))
        comparison.notes.append(
            f"iwb-la tries λ {tries} with its own loss: --lam, --loss and --formulation do not change it"
        )
    free = [c["method"] for c in comparison.tuned if isinstance(RIVALS.get(c["method"]), Free)]
    if free:
        comparison.notes.append(
            f"each trained method has {config.trials} trials; a method without training tries its whole grid"
        )
    return comparison


def _tune(sweep: Sweep, method: str, config: RebalanceConfig, split: str) -> tuple[list[HeadId], HeadId]:
    """Return every trial of a method and the best of them."""
    trials: list[HeadId] = []
    best: HeadId | None = None
    while new := next_trials(method, config, trials, best):
        sweep.add(new)
        trials += new
        alive = [s for s in trials if s not in sweep.diverged]
        if not alive:
            raise PipelineError(
                f"{method}: fitting diverged at every learning rate; lower them: --lr {config.lr / 100:g}"
            )
        best = alive[sweep.choose(alive, split).index]
    assert best is not None
    return trials, best


def _stays(sweep: Sweep, setting: HeadId, split: str) -> bool:
    """Return true where the accuracies of a setting are those of the stage-1 head, on the split that is chosen on."""
    scored = sweep.scored[split]
    (start,) = (scores.summary for (s, _), scores in scored.items() if s == BASELINE)
    pairs = [(scored[setting, seed].summary[g], start[g]) for seed in sweep.seeds_of(setting) for g in (*GROUPS, "all")]
    return all(abs(a - b) < ALIKE for a, b in pairs if a is not None and b is not None)


def _trial(sweep: Sweep, setting: HeadId, split: str) -> dict[str, Any]:
    seeds = sweep.seeds_of(setting)
    scores = [] if setting in sweep.diverged else [sweep.scored[split][setting, seed].summary for seed in seeds]
    facts = setting.to_dict() | {"parameters": setting.parameters, "split": split, "n": len(seeds)}
    return facts | means_and_stds(scores) | {"diverged": not scores}


def _winner(best: HeadId, sweep: Sweep, split: str, trials: int, border: list[str]) -> dict[str, Any]:
    mean = float(np.mean([sweep.scored[split][best, seed].summary["all"] for seed in sweep.seeds_of(best)]))
    return best.to_dict() | {"parameters": best.parameters, "trials": trials, "score": mean, "border": border}


def _line(winner: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    diverged = sum(t["diverged"] for t in trials)
    scores = [t["all"] for t in trials if t["all"] is not None]
    failures = f", {diverged} diverged" if diverged else ""
    several = f"{len(trials)} trials{failures}, {trials[0]['split']} {min(scores):.1f} … {max(scores):.1f}"
    return f"{winner['method']}: {several}; best {chosen_text(winner)}"
