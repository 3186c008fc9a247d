"""The choice among settings by validation scores. The test split is no argument, so nothing can be selected on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """The selected setting.

    Arguments:
        index: its number.
        score: its mean validation score.
        standard_error: of that score.
        within_one_se: all settings whose score is at most one standard error below.
        runner_up: the best setting of another method, or of the same where there is no other; None for a single setting.
    """

    index: int
    score: float
    standard_error: float
    within_one_se: tuple[int, ...]
    runner_up: int | None = None


def select(
    val_scores: np.ndarray,
    *,
    sampling_error: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
    preferred: int | None = None,
) -> Choice:
    """Return the setting with the highest mean validation score, the first among equals; or the preferred one.

    Arguments:
        val_scores: (M, S) balanced accuracy of M settings in S repetitions.
        sampling_error: (M,) standard error of a setting's score that comes from the validation samples being few;
            repetitions on the same samples do not lower it. It adds in squares to the standard error over repetitions.
        methods: (M,) the method of each setting, None for a single method.
        preferred: number of a setting that is taken where its score is within one standard error of the highest.
    """
    val_scores = np.asarray(val_scores, np.float64)
    mean = val_scores.mean(1)
    best = int(mean.argmax())
    repetitions = val_scores.shape[1]
    spread = val_scores[best].std(ddof=1) / math.sqrt(repetitions) if repetitions > 1 else 0.0
    error = math.hypot(spread, sampling_error[best] if sampling_error is not None else 0.0)
    near = np.flatnonzero(mean >= mean[best] - error)
    best = preferred if preferred is not None and preferred in near else best
    rest = [i for i in range(len(mean)) if i != best]
    rivals = [i for i in rest if methods is not None and methods[i] != methods[best]]
    runner_up = max(rivals or rest, key=lambda i: mean[i], default=None)
    return Choice(best, float(mean[best]), error, tuple(int(i) for i in near), runner_up)
