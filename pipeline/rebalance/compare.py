"""Methods compete: each is tuned on validation, its best setting stands for it, and a weighted mean of them joins in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.config import RebalanceConfig
from pipeline.errors import PipelineError
from pipeline.longtail import GROUPS
from pipeline.method_names import MEMBERS
from pipeline.rebalance.candidates import is_trained, method_names, parse_lam
from pipeline.rebalance.estimate import comparison_seconds, comparison_work, duration, estimate_text, product_seconds
from pipeline.rebalance.halving import KEPT, SHARES, rungs, share_within
from pipeline.rebalance.methods import RIVALS, Free
from pipeline.rebalance.methods.ensemble import balanced_nll, fold, stacking_shares, temperature
from pipeline.rebalance.methods.iwb_la import TRIALS
from pipeline.rebalance.sweep import Sweep
from pipeline.rebalance.tuning import LAMS, edges, first_trial, lams_of, next_trials, tuned_methods
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
    size: Any = {"rows": samples, "width": width, "classes": classes, "device": sweep.ranks.device}
    size["product"] = product_seconds(**size)
    report(estimate_text(config, **size))
    seconds = {
        share: comparison_seconds(config, **size, share=share, counts=sweep.features.counts)[1] for share in SHARES
    }
    share = sweep.ranks.gathered(share_within(config.budget_seconds, seconds.__getitem__))[0]
    best_of: dict[str, HeadId] = {}
    thinning: list[str] = []
    tuned: list[dict[str, Any]] = []
    all_trials: list[dict[str, Any]] = []
    for number, method in enumerate(methods, 1):
        sweep.progress.begin(method)
        facts = unfinished.piece(method, sweep, partial(_tuned, sweep, method, config, split, share))
        if number == 1:  # a command that was stopped has decided
            share = facts["share"]
            sweep.progress.plan(comparison_work(config, share, sweep.features.counts))
            for smaller in (s for s in SHARES if s >= share):
                sweep.subset(smaller)
            if share < 1:
                thinning = [_thinning_note(sweep, config, share, seconds)]
                report(thinning[0])
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
        members = [*MEMBERS, *(m for m in asked if isinstance(rule := RIVALS.get(m), Free) and rule.member)]
        ensemble = add_ensemble(sweep, [best_of[method] for method in members])
        best_of["ensemble"] = ensemble
        tuned.append(_winner(ensemble, sweep, split, 1, []))
        report(f"ensemble: {chosen_text(tuned[-1])}")
    winners = [best_of[method] for method in asked]
    return Comparison(winners, tuned, all_trials, thinning + _notes(sweep, config, winners, tuned, split), ensemble)


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


def _tuned(sweep: Sweep, method: str, config: RebalanceConfig, split: str, share: float) -> Facts:
    """Tune a method, leave the heads of its best trial in the sweep and return that trial and the scores of all.

    Arguments:
        share: of the training rows on which its settings are compared first, where their fits take long.
    """
    first = share if is_trained(first_trial(method, config)) or method.startswith("logistic") else 1.0
    trials, best = _search(sweep.subset(first), method, config, split, finish=first == 1)
    place_of = dict.fromkeys(trials, sweep.subset(first))
    leading = list(trials)
    for number, larger in rungs(len(trials), first)[1:]:
        leading = _ranked(place_of[leading[0]], leading, config, split, {})[:number]
        sweep.subset(larger).add(leading, seeds=config.seeds[:1])
        place_of |= dict.fromkeys(leading, sweep.subset(larger))
    while first < 1:
        best = _ranked(sweep, leading, config, split, {})[0]
        sweep.add([best])  # in the other batch orders, where it may diverge
        if best not in sweep.diverged:
            break
    rows = [
        _trial(place_of[s], s, split) | {"chosen": s == best} | ({"rows": place_of[s].fraction} if first < 1 else {})
        for s in trials
    ]
    sweep.keep_only([best, BASELINE], trials=trials)
    for subset in sweep.subsets.values():
        subset.keep_only([], trials=trials)
        sweep.fitted, subset.fitted = sweep.fitted + subset.fitted, 0
        sweep.fit_seconds, subset.fit_seconds = sweep.fit_seconds + subset.fit_seconds, 0.0
    if method == "iwb" and share == 1:  # the curve of λ at the best of all other settings
        sweep.add([replace(best, lam=lam) for lam in parse_lam(config.lam) or LAMS])
    return {"best": head_entry(best), "trials": rows, "border": edges(best, trials), "share": share}


def _search(
    sweep: Sweep, method: str, config: RebalanceConfig, split: str, *, finish: bool
) -> tuple[list[HeadId], HeadId]:
    """Return every trial of a method and the best of them.

    Arguments:
        finish: fit the best in all batch orders.
    """
    trials: list[HeadId] = []
    best: HeadId | None = None
    likelihood: dict[HeadId, float] = {}
    while new := next_trials(method, config, trials, best):
        sweep.add(new, seeds=config.seeds[:1])
        trials += new
        best = None
        while best is None:
            best = _ranked(sweep, trials, config, split, likelihood)[0]
            if finish and not next_trials(method, config, trials, best):
                sweep.add([best])  # in the other batch orders, where it may diverge
                best = None if best in sweep.diverged else best
    assert best is not None
    return trials, best


def _ranked(
    sweep: Sweep, trials: Sequence[HeadId], config: RebalanceConfig, split: str, likelihood: dict[HeadId, float]
) -> list[HeadId]:
    """Return the trials that have not diverged, the best first, by the first batch order.

    The best has the highest class-balanced likelihood, at its own temperature, among all within one standard error of the
    highest accuracy: likelihood separates settings that accuracy on few samples cannot. The others follow by accuracy.

    Arguments:
        likelihood: losses that are known; new ones are added.
    Raises: PipelineError: all trials have diverged.
    """
    labels = torch.as_tensor(sweep.labels_of_logits())

    def loss(setting: HeadId) -> float:
        if setting not in likelihood:
            logits = sweep.logits(setting)
            likelihood[setting] = balanced_nll(logits, labels, 1 / temperature(logits, labels))
        return likelihood[setting]

    alive = [s for s in trials if s not in sweep.diverged]
    if not alive:
        raise PipelineError(
            f"{trials[0].method}: fitting diverged at every learning rate; lower them: --lr {config.lr / 100:g}"
        )
    near = [alive[i] for i in sweep.choose(alive, split, seeds=config.seeds[:1]).within_one_se]
    others = [s for s in alive if s not in near]
    return sorted(near, key=loss) + sorted(others, key=lambda s: -(sweep.summaries(s, split)[0]["all"] or 0.0))


def _thinning_note(sweep: Sweep, config: RebalanceConfig, share: float, seconds: Mapping[float, float]) -> str:
    """Return the sentence on how many settings were tried on which part of the training images."""
    parts = [(number, sweep.subset(s).fraction) for number, s in rungs(config.trials, share)]
    texts = [f"{number} of them on {fraction:.0%}" for number, fraction in parts[1:-1]] + [f"{parts[-1][0]} on all"]
    return (
        f"tuning would take about {duration(seconds[1.0])}, more than --budget {config.budget}: at most {parts[0][0]} settings "
        f"of each method that takes long were compared on {parts[0][1]:.0%} of the training images, the better "
        f"{', '.join(texts)}; a class of up to {KEPT} images kept all of them. That takes about {duration(seconds[share])}; "
        "--budget none compares every setting on all images"
    )


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
