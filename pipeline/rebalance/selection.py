"""Which λ are tried and which setting is chosen. The test split is no argument here, so it cannot be selected on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError

AUTO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # the coarse grid; `refine` adds the fine one
FORMS = "expected λ in [0, 1]: 0.05, 0.01,0.05,0.1, 0.01:0.5:log:32, 0.1:0.5:lin:5 or auto"


@dataclass(frozen=True)
class Choice:
    """The chosen setting by number, its mean score, the standard error of that, and all settings within one of them."""

    index: int
    score: float
    standard_error: float
    within_one_se: tuple[int, ...]


def select(val_scores: np.ndarray, *, sampling_error: Sequence[float] | None = None) -> Choice:
    """The setting with the highest mean validation score; the first among equals.

    val_scores (M, S): balanced accuracy of M settings in S repetitions. sampling_error (M,): standard error of a
    setting's score that comes from the validation samples being few; repetitions on the same samples do not lower it.
    It adds in squares to the standard error over repetitions.
    """
    val_scores = np.asarray(val_scores, np.float64)
    mean = val_scores.mean(1)
    best = int(mean.argmax())
    repetitions = val_scores.shape[1]
    spread = val_scores[best].std(ddof=1) / math.sqrt(repetitions) if repetitions > 1 else 0.0
    error = math.hypot(spread, sampling_error[best] if sampling_error is not None else 0.0)
    near = np.flatnonzero(mean >= mean[best] - error)
    return Choice(best, float(mean[best]), error, tuple(int(i) for i in near))


def parse_lam(text: str) -> tuple[float, ...] | None:
    """The λ that a text means, ascending and each once; None for `auto`.

    0.05 | 0.01,0.05,0.1 | FROM:TO:log:HOW_MANY | FROM:TO:lin:HOW_MANY. Raises ConfigError naming the value and valid
    forms.
    """
    text = text.strip()
    if text == "auto":
        return None
    lams: list[float] = []
    for part in text.split(","):
        lams += _grid(part) if ":" in part else [_number(part, text)]
    return tuple(sorted({float(f"{lam:.6g}") for lam in lams}))


def refine(lams: Sequence[float], best: float, *, more: int = 7) -> tuple[float, ...]:
    """The fine grid of `auto`: `more` λ, a factor apart, between the neighbours of the best one in lams (ascending)."""
    at = lams.index(best)
    low, high = lams[max(at - 1, 0)], lams[min(at + 1, len(lams) - 1)]
    fine = {float(f"{lam:.3g}") for lam in np.geomspace(low, high, more + 2)}
    return tuple(sorted(fine - set(lams)))


def _grid(part: str) -> list[float]:
    fields = part.split(":")
    if len(fields) != 4 or fields[2] not in ("log", "lin") or not fields[3].strip().isdigit() or int(fields[3]) < 2:
        raise ConfigError(f"--lam {part}: {FORMS}")
    low, high, steps = _number(fields[0], part), _number(fields[1], part), int(fields[3])
    if low >= high or (fields[2] == "log" and low == 0):
        raise ConfigError(f"--lam {part}: FROM must be less than TO, and more than 0 on a log grid; {FORMS}")
    grid = np.geomspace(low, high, steps) if fields[2] == "log" else np.linspace(low, high, steps)
    return [float(lam) for lam in grid]


def _number(part: str, whole: str) -> float:
    try:
        lam = float(part)
    except ValueError:
        lam = math.nan
    if not 0 <= lam <= 1:  # also false for nan
        raise ConfigError(f"--lam {whole!r}: {part.strip() or 'nothing'} is no λ; {FORMS}")
    return lam
