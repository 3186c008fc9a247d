"""The λ that `auto` tries, and the λ to try beyond a selected one. The test split has no part in it."""

import math
from collections.abc import Collection, Sequence

AUTO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # the coarse grid; `refine` adds the fine one
SELECTED_LAM = "the selected λ, "  # the beginning of a border note


def refine(lams: Sequence[float], near: Collection[float], *, more: int = 7) -> tuple[float, ...]:
    """Return the fine grid of `auto`: `more` new λ between the neighbours of those that may be best.

    Each new λ halves the widest gap, as a factor, that is left: the grid is fine around a clear best, and even over all λ
    where none is clear.

    Arguments:
        lams: the coarse grid, ascending.
        near: those of lams whose scores cannot be told from the best.
    """
    at = [i for i, lam in enumerate(lams) if lam in near]
    grid = list(lams[max(at[0] - 1, 0) : at[-1] + 2])
    for _ in range(more):
        gap = max(range(len(grid) - 1), key=lambda i: grid[i + 1] / grid[i])
        grid.insert(gap + 1, float(f"{math.sqrt(grid[gap] * grid[gap + 1]):.2g}"))
    return tuple(sorted(set(grid) - set(lams)))


def border_notes(lam: float | None, lams: Sequence[float | None], *, auto: bool = False) -> list[str]:
    """Return a note where the selected λ is the smallest or largest candidate, with the λ to try next; 1 is the limit.

    Arguments:
        lams: λ of all candidates.
        auto: say that `auto` chose them.
    """
    grid = sorted({candidate for candidate in lams if candidate})
    if not lam or len(grid) < 2 or grid[0] < lam < grid[-1] or lam == 1:
        return []
    end, low, high = ("smallest", lam / 10, grid[1]) if lam == grid[0] else ("largest", grid[-2], min(1, 10 * lam))
    source, direction = "that auto tries" if auto else "of those given", "smaller" if end == "smallest" else "larger"
    return [
        f"{SELECTED_LAM}{lam:g}, is the {end} {source}: {direction} ones may do as well or better, and "
        f"--lam {low:g}:{high:g}:log:8 tries them"
    ]
