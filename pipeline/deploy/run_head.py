"""The head of a run that is deployed: the selected one, or that of a λ or method."""

from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.report.study import Study, read_study
from pipeline.results.head_id import HeadId
from pipeline.results.heads import Scorer


def rebalanced_head(run: Path | str, *, lam: float | None = None, method: str | None = None) -> Scorer:
    """Return the head that stage 2 selected, or that of a λ or method, for features wherever they come from.

    Arguments:
        run: as for `export_model`, also the results of a store of one's own features; of several backbones or batch orders
            the first is taken.
    Returns: a head whose `array_logits(features)` are the logits (M, C) of an array (M, D), `logits(features)` those of a
        torch tensor; a linear one has `weight` (C, D) and `bias` (C,).
    Raises: DataError: results or the head are missing.
    """
    study = read_study(Path(run))
    _, scorer = study.first.head(requested_head(study, lam=lam, method=method))
    return scorer


def requested_head(study: Study, *, lam: float | None, method: str | None) -> HeadId:
    """Return the selected head, or that of a λ or method; where a method has several λ, the one validation prefers.

    Raises: ConfigError: a λ for a method that has none.
    """
    selected = study.first.selected
    if lam is None and method in (None, selected.method):
        return selected
    name = method or (selected.method if selected.lam is not None else "iwb")
    heads = [head for head in (HeadId.of_row(row) for row, _ in study.first.scorers) if head.method == name]
    losses = {head.loss for head in heads}
    loss = selected.loss if selected.loss in losses else next(iter(sorted(losses, key=str)), None)
    lams = sorted({head.lam for head in heads if head.lam is not None})
    if lam is not None:
        if heads and not lams:
            raise ConfigError(f"--lam {lam:g}: {name} has no λ; leave it out")
        as_printed = next((value for value in lams if f"{value:g}" == f"{lam:g}"), lam)
        return HeadId(name, loss, as_printed)
    tuned = study.first.tuned_lam(name)
    if tuned is None and lams:  # λ = 0 is a reference that nothing was chosen from
        candidates = [HeadId(name, loss, value) for value in lams if value] or [HeadId(name, loss, lams[0])]
        return max(candidates, key=lambda head: _validation_accuracy(study, head))
    return HeadId(name, loss, tuned)


def _validation_accuracy(study: Study, head: HeadId) -> float:
    accuracy = study.spread(head, study.choosing_split, "all")
    return -1.0 if accuracy is None or accuracy.mean is None else accuracy.mean
