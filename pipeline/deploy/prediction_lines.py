"""Predictions as text, line by line as they come: for a terminal, as CSV, as JSON lines."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len, chop_cells

from pipeline.deploy.predict import Guess, Prediction, counted

CHANGED = "◀"  # as the tables of stage 2 mark a row
GAP = "  "


def json_lines(rows: Iterable[Prediction]) -> Iterator[str]:
    """One JSON document a line."""
    return (json.dumps(row.to_dict(), ensure_ascii=False) for row in rows)


def csv_lines(rows: Iterable[Prediction]) -> Iterator[str]:
    """Lines of CSV with a header: path, class_1, probability_1, …, and stage1_class_1, …, changed where compared."""
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
            yield _csv(columns)
        yield _csv(columns.values())


def table_lines(rows: Iterable[Prediction], paths: Sequence[str], *, width: int) -> Iterator[str]:
    """The rows as a table of at most `width` columns; one whose first answer rebalancing changed ends with a mark.

    paths: of all images, read or not: the folder they have in common is told once, the longest rest decides the first
    column. Answers that a line does not hold go below one another.
    """
    paths = [_text(path) for path in paths]
    root = _common_folder(paths)
    longest = max((cell_len(path) for path in paths), default=0) - cell_len(root)
    widths: list[int] = []
    for row in rows:
        compared = row.stage1 is not None
        if not widths:
            first = max(len("image"), min(longest, width * 2 // 5))
            rest = width - first - len(GAP) - (2 * len(GAP) + len(CHANGED) if compared else 0)
            widths = [first, *([rest // 2] * 2 if compared else [rest])]
            if root:
                yield from (f"{counted(len(paths))} below {root}", "")
            titles = ["image", "rebalanced", "before"] if compared else ["image", "most probable"]
            yield from _lines([[title] for title in titles], widths)
        cells = [chop_cells(_text(row.path)[len(root) :], widths[0])]
        cells += [_packed(guesses, w) for guesses, w in zip((row.guesses, row.stage1 or ()), widths[1:], strict=False)]
        yield from _lines(cells + [[CHANGED]] * row.changed, widths)


def _common_folder(paths: Sequence[str]) -> str:
    """The folder that all of several paths begin with, with its last slash; nothing where there is none."""
    folders = {os.path.dirname(path) for path in paths}
    if len(paths) < 2 or "" in folders or len({os.path.isabs(folder) for folder in folders}) > 1:
        return ""
    common = os.path.commonpath(folders)
    return os.path.join(common, "") if common else ""


def _text(path: str) -> str:
    """A file's name as it can be printed, which not all bytes can that a file system takes."""
    return path.encode(errors="backslashreplace").decode()


def _packed(guesses: Sequence[Guess], width: int) -> list[str]:
    """Lines of `cat 97.1%, dog 2.0%`, none longer than the width."""
    lines = [""]
    for number, guess in enumerate(guesses):
        text = f"{guess.name} {100 * guess.probability:.1f}%" + "," * (number + 1 < len(guesses))
        joined = f"{lines[-1]} {text}".lstrip()
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += chop_cells(text, width)
    return [line for line in lines if line]


def _lines(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """The lines of one row; a last cell beyond the widths is as wide as it is."""
    for parts in zip_longest(*cells, fillvalue=""):
        room = [*widths, *[0] * (len(parts) - len(widths))]
        padded = (part + " " * (w - cell_len(part)) for part, w in zip(parts, room, strict=True))
        yield GAP.join(padded).rstrip()


def _csv(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()
