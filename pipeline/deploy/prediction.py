"""Predictions of images: one row each, and their text for a terminal, as CSV and as JSON lines."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len, chop_cells

from pipeline.longtail import GROUPS
from pipeline.results.files import csv_line
from pipeline.text import Shown, printable

CHANGED = "◀"  # as the tables of stage 2 mark a row
GAP = "  "


@dataclass(frozen=True)
class Guess:
    """A class and its probability (0…1)."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, most probable first.

    Arguments:
        stage1: those by the head before rebalancing; None without a comparison.
    """

    path: str
    guesses: tuple[Guess, ...]
    stage1: tuple[Guess, ...] | None = None

    @property
    def changed(self) -> bool:
        """True where rebalancing changed the first answer."""
        return self.stage1 is not None and self.stage1[0].name != self.guesses[0].name

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"path": self.path, "top": [vars(g) for g in self.guesses]}
        if self.stage1 is None:
            return row
        return row | {"stage1": [vars(g) for g in self.stage1], "changed": self.changed}


@dataclass
class ChangedAnswers:
    """Count of first answers that rebalancing changed, by the groups of classes from and to which; grows by `add`.

    Arguments:
        groups: group of each class name.
        moves: (group before, group after) → changed answers.
    """

    groups: Mapping[str, str]
    images: int = 0
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, row: Prediction) -> None:
        self.images += 1
        if row.changed and row.stage1:
            self.moves[self.groups[row.stage1[0].name], self.groups[row.guesses[0].name]] += 1

    @property
    def changed(self) -> int:
        return self.moves.total()

    @property
    def by_group(self) -> dict[str, dict[str, int]]:
        """`from` and `to`: how many of the changed answers were and are classes with many, medium, few images."""
        return {
            end: {group: sum(n for move, n in self.moves.items() if move[i] == group) for group in GROUPS}
            for i, end in enumerate(("from", "to"))
        }

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "changed": self.changed, **self.by_group}

    def __str__(self) -> str:
        text = f"rebalancing changed the first answer of {self.changed:,} of {count_images(self.images)}"
        ends = [
            f"{end} classes with {', '.join(f'{group} ({n:,})' for group, n in numbers.items() if n)}"
            for end, numbers in self.by_group.items()
        ]
        return f"{text}, {' '.join(ends)} training images" if self.changed else text


@dataclass(frozen=True)
class Predictions(Shown):
    """Predictions of all images, in order.

    Arguments:
        skipped: a reason for each file or name that gave none.
        compared: counts of a comparison with the head before rebalancing.
    """

    rows: tuple[Prediction, ...]
    skipped: tuple[str, ...]
    compared: ChangedAnswers | None = None

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Prediction:
        return self.rows[i]

    def to_dict(self) -> dict[str, Any]:
        document = {"predictions": [row.to_dict() for row in self.rows], "skipped": list(self.skipped)}
        return document if self.compared is None else document | {"compared": self.compared.to_dict()}

    def __str__(self) -> str:
        lines = [*table_lines(self.rows, [row.path for row in self.rows], width=120)]
        lines += [] if self.compared is None else [str(self.compared)]
        return "\n".join([*lines, *(f"left out: {reason}" for reason in self.skipped)])


def count_images(number: int) -> str:
    return f"{number:,} image{'' if number == 1 else 's'}"


def json_lines(rows: Iterable[Prediction]) -> Iterator[str]:
    """Yield one JSON document a line."""
    return (json.dumps(row.to_dict(), ensure_ascii=False) for row in rows)


def csv_lines(rows: Iterable[Prediction]) -> Iterator[str]:
    """Yield lines of CSV with a header: path, class_1, probability_1, …, and stage1_class_1, …, changed where compared."""
    for number, row in enumerate(rows):
        columns: dict[str, Any] = {"path": row.path}
        for prefix, guesses in (("", row.guesses), ("stage1_", row.stage1 or ())):
            for place, guess in enumerate(guesses, 1):
                columns |= {
                    f"{prefix}class_{place}": guess.name,
                    f"{prefix}probability_{place}": f"{guess.probability:.6f}",
                }
        if row.stage1 is not None:
            columns["changed"] = int(row.changed)
        if number == 0:
            yield csv_line(columns)
        yield csv_line(columns.values())


def table_lines(rows: Iterable[Prediction], paths: Sequence[str], *, width: int) -> Iterator[str]:
    """Yield the rows as a table of at most `width` columns; one whose first answer rebalancing changed ends with a mark.

    Arguments:
        paths: those of all images, read or not: their common folder is printed once, the longest rest decides the first
            column. Answers that a line does not hold go below one another.
    """
    paths = [printable(path) for path in paths]
    root = _common_folder(paths)
    longest = max((cell_len(path) for path in paths), default=0) - cell_len(root)
    widths: list[int] = []
    for row in rows:
        compared = row.stage1 is not None
        if not widths:
            column = max(len("image"), min(longest, width * 2 // 5))
            rest = width - column - len(GAP) - (2 * len(GAP) + len(CHANGED) if compared else 0)
            widths = [column, *([rest // 2] * 2 if compared else [rest])]
            if root:
                yield from (f"{count_images(len(paths))} below {root}", "")
            titles = ["image", "rebalanced", "before"] if compared else ["image", "most probable"]
            yield from _lines([[title] for title in titles], widths)
        cells = [chop_cells(printable(row.path)[len(root) :], widths[0])]
        cells += [_packed(guesses, w) for guesses, w in zip((row.guesses, row.stage1 or ()), widths[1:], strict=False)]
        yield from _lines(cells + [[CHANGED]] * row.changed, widths)


def _common_folder(paths: Sequence[str]) -> str:
    """Return the folder that all of several paths begin with, with its last slash; an empty text where there is none."""
    folders = {os.path.dirname(path) for path in paths}
    if len(paths) < 2 or "" in folders or len({os.path.isabs(folder) for folder in folders}) > 1:
        return ""
    common = os.path.commonpath(folders)
    return os.path.join(common, "") if common else ""


def _packed(guesses: Sequence[Guess], width: int) -> list[str]:
    """Return lines of `cat 97.1%, dog 2.0%`, none longer than the width."""
    lines = [""]
    for number, guess in enumerate(guesses):
        text = f"{printable(guess.name)} {100 * guess.probability:.1f}%" + "," * (number + 1 < len(guesses))
        joined = f"{lines[-1]} {text}".lstrip()
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += chop_cells(text, width)
    return [line for line in lines if line]


def _lines(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """Yield the lines of one row; a last cell beyond the widths is as wide as it is."""
    for parts in zip_longest(*cells, fillvalue=""):
        room = [*widths, *[0] * (len(parts) - len(widths))]
        padded = (part + " " * (w - cell_len(part)) for part, w in zip(parts, room, strict=True))
        yield GAP.join(padded).rstrip()
