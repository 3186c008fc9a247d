"""Methods compete: each is tuned on validation, its best setting stands for it, and a weighted mean of them joins in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.config import RebalanceConfig
from pipeline.errors import PipelineError
from pipeline.longtail import GROUPS
from pipeline.method_names import MEMBERS
from pipeline.rebalance.candidates import method_names, parse_lam
from pipeline.rebalance.estimate import estimate_text
from pipeline.rebalance.methods import RIVALS, Free
from pipeline.rebalance.methods.ensemble import balanced_nll, fold, stacking_shares, temperature
from pipeline.rebalance.methods.iwb_la import TRIALS
from pipeline.rebalance.sweep import Sweep
from pipeline.rebalance.tuning import LAMS, edges, lams_of, next_trials, tuned_methods
from pipeline.rebalance.unfinished import Facts, Unfinished, head_entry
from pipeline.results.head_id import BASELINE, HeadId, chosen_text
from pipeline.results.heads import Linear
from pipeline.results.mean_std import means_and_stds

ALIKE = 0.2  # percentage points


@dataclass(frozen=True)
class Comparison:
    """The result of tuning.

    Arguments:
        winners: the best trial of each method asked for.
        tuned: the best trials of all tuned methods with their number of trials, JSON-ready.
        trials: every trial with its scores on the split that is chosen on.
        ensemble: the weighted mean of winners, None where it was not asked for.
    """

    winners: list[HeadId]
    tuned: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    notes: list[str]
    ensemble: HeadId | None = None


def compare(
    sweep: Sweep, config: RebalanceConfig, split: str, unfinished: Unfinished, report: Callable[[str], object]
) -> Comparison:
    """Fit the trials of one method after the other and keep the heads of the best.

    Trials are compared in the first batch order; the best is then fitted in all of them. The reference rows are tuned like
    everything else; iwb at λ = 0 takes the other settings of iwb, where that is asked for, else of cb.

    Arguments:
        unfinished: where each finished method is kept.
        report: called with a line on what will be fitted and how long it takes, and one on each method.
    """
    asked = method_names(config.method)
    methods = tuned_methods(config)
    samples, (classes, width) = len(sweep.features.labels), sweep.features.weight.shape
    report(estimate_text(config, rows=samples, width=width, classes=classes, device=sweep.ranks.device))
    best_of: dict[str, HeadId] = {}
    tuned: list[dict[str, Any]] = []
    all_trials: list[dict[str, Any]] = []
    for number, method in enumerate(methods, 1):
        sweep.progress.begin(method)
        facts = unfinished.piece(method, sweep, partial(_tuned, sweep, method, config, split))
        best, rows = HeadId.from_dict(facts["best"]), facts["trials"]
        best_of[method] = best
        all_trials += rows
        if method != "baseline":
            tuned.append(_winner(best, sweep, split, len(rows), facts["border"]))
            report(f"{number} of {len(methods)}: {_line(tuned[-1], rows)}")
    start = best_of.get("iwb", best_of["cb"])
    equal_norms = HeadId("iwb", config.loss, 0.0, start.lr, start.values)
    unfinished.piece("equal-norms", sweep, partial(sweep.add, [equal_norms]))
    ensemble = None
    if "ensemble" in asked:
        ensemble = add_ensemble(sweep, [best_of[method] for method in MEMBERS])
        best_of["ensemble"] = ensemble
        tuned.append(_winner(ensemble, sweep, split, 1, []))
        report(f"ensemble: {chosen_text(tuned[-1])}")
    winners = [best_of[method] for method in asked]
    return Comparison(winners, tuned, all_trials, _notes(sweep, config, winners, tuned, split), ensemble)


def add_ensemble(sweep: Sweep, members: Sequence[HeadId]) -> HeadId:
    """Add the weighted mean of linear heads to a sweep and return what it is; the values of its setting are the weights.

    The logits of each member are divided by its temperature; the weights have the highest class-balanced likelihood on the
    samples that are chosen on, held towards equal ones. A member that is fitted in several batch orders is their mean.
    """
    labels = torch.as_tensor(sweep.labels_of_logits())
    logits = [sweep.logits(member) for member in members]
    temperatures = [temperature(z, labels) for z in logits]
    scaled = torch.stack([z / t for z, t in zip(logits, temperatures, strict=True)])
    shares = stacking_shares(scaled, labels)
    layers = [sweep.mean_layer(member) for member in members]
    weight, bias = fold(layers, temperatures, shares.tolist())
    names = [member.method for member in members]
    ensemble = HeadId("ensemble", values=tuple((n, round(s, 3)) for n, s in zip(names, shares.tolist(), strict=True)))
    mixed = torch.einsum("k,kmc->mc", shares.to(scaled), scaled).numpy()
    sweep.add_head(ensemble, Linear(weight.float().numpy(), bias.float().numpy()), mixed)
    return ensemble


def _tuned(sweep: Sweep, method: str, config: RebalanceConfig, split: str) -> Facts:
    """Tune a method, leave the heads of its best trial in the sweep and return that trial and the scores of all."""
    trials, best = _tune(sweep, method, config, split)
    rows = [_trial(sweep, s, split) | {"chosen": s == best} for s in trials]
    sweep.keep_only([best, BASELINE], trials=trials)
    if method == "iwb":  # the curve of λ at the best of all other settings
        sweep.add([replace(best, lam=lam) for lam in parse_lam(config.lam) or LAMS])
    return {"best": head_entry(best), "trials": rows, "border": edges(best, trials)}


def _tune(sweep: Sweep, method: str, config: RebalanceConfig, split: str) -> tuple[list[HeadId], HeadId]:
    """Return every trial of a method and the best of them.

    The best has the highest class-balanced likelihood, at its own temperature, among all within one standard error of the
    highest accuracy: likelihood separates settings that accuracy on few samples cannot.
    """
    trials: list[HeadId] = []
    best: HeadId | None = None
    first = config.seeds[:1]
    likelihood: dict[HeadId, float] = {}
    labels = torch.as_tensor(sweep.labels_of_logits())

    def loss(setting: HeadId) -> float:
        if setting not in likelihood:
            logits = sweep.logits(setting)
            likelihood[setting] = balanced_nll(logits, labels, 1 / temperature(logits, labels))
        return likelihood[setting]

    while new := next_trials(method, config, trials, best):
        sweep.add(new, seeds=first)
        trials += new
        best = None
        while best is None:
            alive = [s for s in trials if s not in sweep.diverged]
            if not alive:
                raise PipelineError(
                    f"{method}: fitting diverged at every learning rate; lower them: --lr {config.lr / 100:g}"
                )
            near = sweep.choose(alive, split, seeds=first).within_one_se
            best = min((alive[i] for i in near), key=loss)
            if not next_trials(method, config, trials, best):
                sweep.add([best])  # in the other batch orders, where it may diverge
                best = None if best in sweep.diverged else best
    assert best is not None
    return trials, best


def _notes(
    sweep: Sweep, config: RebalanceConfig, winners: Sequence[HeadId], tuned: Sequence[dict[str, Any]], split: str
) -> list[str]:
    """Return notes on the borders of grids, on methods without an effect, and on how trials were shared out."""
    notes = []
    if at_border := [c["method"] for c in tuned if c["border"]]:
        notes.append(
            f"the best trial lies at the border of its grid, so that a better one may lie beyond, for {', '.join(at_border)}"
        )
    idle = [s.method for s in winners if s.method not in ("baseline", "ce") and _stays(sweep, s, split)]
    if idle:
        notes.append(
            f"{', '.join(idle)}: at the best of the trials every group is within {ALIKE:g} points of the stage-1 head, so on "
            "these features the method has no effect"
        )
    methods = [s.method for s in winners]
    lams, all_lams = lams_of(config), parse_lam(config.lam)
    if "iwb" in methods and all_lams and len(lams) < len(all_lams):
        tried_lams = ", ".join(f"{lam:g}" for lam in lams)
        notes.append(
            f"iwb: λ shares its {config.trials} trials with other settings, so λ {tried_lams} of the {len(all_lams)} asked for "
            "were tried; --trials gives all methods more"
        )
    if "iwb-la" in methods:
        tries = ", ".join(f"{lam:g}" for lam in sorted({lam for lam, _ in TRIALS}))
        notes.append(f"iwb-la tries λ {tries} with its own loss: --lam, --loss and --formulation do not change it")
    if any(isinstance(RIVALS.get(method), Free) for method in methods):
        notes.append(
            f"each trained method has at most {config.trials} trials; a method without training tries its whole grid"
        )
    return notes


def _stays(sweep: Sweep, setting: HeadId, split: str) -> bool:
    """Return true where the accuracies of a setting are those of the stage-1 head, on the split that is chosen on."""
    scored = sweep.scored[split]
    (start,) = (scores.summary for (s, _), scores in scored.items() if s == BASELINE)
    pairs = [(row[g], start[g]) for row in sweep.summaries(setting, split) for g in (*GROUPS, "all")]
    return all(abs(a - b) < ALIKE for a, b in pairs if a is not None and b is not None)


def _trial(sweep: Sweep, setting: HeadId, split: str) -> dict[str, Any]:
    scores = sweep.summaries(setting, split)
    facts = setting.to_dict() | {"parameters": setting.parameters, "split": split, "n": len(scores)}
    return facts | means_and_stds(scores) | {"diverged": not scores}


def _winner(best: HeadId, sweep: Sweep, split: str, trials: int, border: list[str]) -> dict[str, Any]:
    mean = float(np.mean([row["all"] for row in sweep.summaries(best, split)]))
    return best.to_dict() | {"parameters": best.parameters, "trials": trials, "score": mean, "border": border}


def _line(winner: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    diverged = sum(t["diverged"] for t in trials)
    scores = [t["all"] for t in trials if t["all"] is not None]
    failures = f", {diverged} diverged" if diverged else ""
    several = f"{len(trials)} trials{failures}, {trials[0]['split']} {min(scores):.1f} … {max(scores):.1f}"
    return f"{winner['method']}: {several}; best {chosen_text(winner)}"
