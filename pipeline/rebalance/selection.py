"""Which λ are tried and which setting is chosen. The test split is no argument here, so it cannot be selected on."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.errors import ConfigError

AUTO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # the coarse grid; `refine` adds the fine one
SELECTED_LAM = "the selected λ, "  # begins the note of at_the_border
FORMS = "expected λ in [0, 1]: 0.05, 0.01,0.05,0.1, 0.01:0.5:log:32, 0.1:0.5:lin:5 or auto"


def parse_lam(text: str) -> tuple[float, ...] | None:
    """The λ that a text means, ascending and each once; None for `auto`.

    0.05 | 0.01,0.05,0.1 | FROM:TO:log:HOW_MANY | FROM:TO:lin:HOW_MANY. Raises ConfigError naming the value and valid
    forms.
    """
    if text.strip() == "auto":
        return None
    lams = [lam for grid in _grids(text) for lam in grid.lams()]
    return tuple(sorted({float(f"{lam:.6g}") for lam in lams}))


def count_lam(text: str) -> int:
    """How many λ a text asks for, none of them made; raises what parse_lam does. For `auto` the most it may try."""
    return 2 * len(AUTO) if text.strip() == "auto" else sum(grid.steps for grid in _grids(text))


def refine(lams: Sequence[float], near: Collection[float], *, more: int = 7) -> tuple[float, ...]:
    """The fine grid of `auto`: `more` new λ where the best may lie, which is from the λ before `near` to the one after.

    near: those of lams (ascending) that the scores cannot tell from the best. Each new λ halves the widest gap, as a
    factor, that is left: so the grid is fine around a clear best, and even over all of them where none is.
    """
    at = [i for i, lam in enumerate(lams) if lam in near]
    grid = list(lams[max(at[0] - 1, 0) : at[-1] + 2])
    for _ in range(more):
        gap = max(range(len(grid) - 1), key=lambda i: grid[i + 1] / grid[i])
        grid.insert(gap + 1, float(f"{math.sqrt(grid[gap] * grid[gap + 1]):.2g}"))
    return tuple(sorted(set(grid) - set(lams)))


class Grid(NamedTuple):
    """`steps` λ from low to high."""

    low: float
    high: float
    steps: int
    logarithmic: bool = False

    def lams(self) -> list[float]:
        space = np.geomspace if self.logarithmic else np.linspace
        return space(self.low, self.high, self.steps).tolist()


def _grids(text: str) -> list[Grid]:
    numbers = [part if ":" in part else _number(part, text) for part in text.strip().split(",")]
    return [_grid(part) if isinstance(part, str) else Grid(part, part, 1) for part in numbers]


def _grid(part: str) -> Grid:
    fields = part.split(":")
    if len(fields) != 4 or fields[2] not in ("log", "lin") or not fields[3].strip().isdigit() or int(fields[3]) < 2:
        raise ConfigError(f"--lam {part}: {FORMS}")
    low, high, steps = _number(fields[0], part), _number(fields[1], part), int(fields[3])
    if low >= high or (fields[2] == "log" and low == 0):
        raise ConfigError(f"--lam {part}: FROM must be less than TO, and more than 0 on a log grid; {FORMS}")
    return Grid(low, high, steps, fields[2] == "log")


def _number(part: str, whole: str) -> float:
    try:
        lam = float(part)
    except ValueError:
        lam = math.nan
    if not 0 <= lam <= 1:  # also false for nan
        raise ConfigError(f"--lam {whole!r}: {part.strip() or 'nothing'} is no λ; {FORMS}")
    return lam


def at_the_border(lam: float | None, asked: Sequence[float | None], *, auto: bool = False) -> list[str]:
    """What a person should know of a selected λ beyond which none was tried, and what to type; λ ends at 1 by its
    definition. auto: whether nobody named the λ.
    """
    tried = sorted({other for other in asked if other})
    if not lam or len(tried) < 2 or tried[0] < lam < tried[-1] or lam == 1:
        return []
    side, low, high = ("smallest", lam / 10, tried[1]) if lam == tried[0] else ("largest", tried[-2], min(1, 10 * lam))
    of, others = "that auto tries" if auto else "of those given", "smaller" if side == "smallest" else "larger"
    return [
        f"{SELECTED_LAM}{lam:g}, is the {side} {of}: {others} ones may do as well or better, and "
        f"--lam {low:g}:{high:g}:log:8 tries them"
    ]
