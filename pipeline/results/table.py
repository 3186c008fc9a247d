"""One table for every place that prints one: terminal, page, Markdown and CSV."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from pipeline.results.files import csv_line
from pipeline.results.mean_std import MeanStd, number_texts
from pipeline.text import Shown

if TYPE_CHECKING:
    import rich.table

Cell = str | MeanStd | None


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Arguments:
        below: a second, smaller line of the head, on pages only.
        left: text rather than numbers.
        width, min_width: in letters, on terminals only; no_wrap: cells are never folded there.
    """

    title: str
    below: str = ""
    left: bool = False
    width: int | None = None
    min_width: int | None = None
    no_wrap: bool = False


@dataclass(frozen=True)
class Line:
    """The cells of a line; strong: the selected one; ends_block: a rule follows it on terminals."""

    cells: Sequence[Cell]
    strong: bool = False
    ends_block: bool = False


@dataclass(frozen=True)
class Table(Shown):
    """Columns, the first of which names the lines, and lines with as many cells."""

    columns: Sequence[Column]
    lines: Sequence[Line] = field(default_factory=list)
    title: str = ""
    caption: str = ""

    def __rich__(self) -> "rich.table.Table":
        from rich import box
        from rich.table import Table as RichTable

        justify: dict[str, object] = {"caption_justify": "left", "title_justify": "left", "box": box.SIMPLE}
        table = RichTable(title=self.title or None, caption=self.caption or None, **justify)  # type: ignore[arg-type]
        for column in self.columns:
            table.add_column(
                column.title,
                justify="left" if column.left else "right",
                width=column.width,
                min_width=column.min_width,
                no_wrap=column.no_wrap,
            )
        for line in self.lines:
            style = "bold" if line.strong else None
            table.add_row(*map(cell_text, line.cells), style=style, end_section=line.ends_block)
        return table

    def html(self, classes: str = "main", *, scroll: str = "scroll") -> str:
        """Return the table of a page; title and caption are the page's business."""
        texts = ["", *(" class=text" if c.left else "" for c in self.columns[1:])]
        heads = (
            f"<th{text}>{escape(c.title)}{f'<small>{escape(c.below)}</small>' if c.below else ''}</th>"
            for c, text in zip(self.columns, texts, strict=True)
        )
        body = "".join(_html_line(line, texts) for line in self.lines)
        attribute = f" class={classes}" if classes else ""
        table = f"<table{attribute}><thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div class='{scroll}'>{table}</div>"

    def markdown(self) -> str:
        """Return a GitHub-flavoured table; `|` in a cell is escaped."""
        lines = [
            [column.title for column in self.columns],
            *map(_texts, self.lines),
        ]
        heads, *rows = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n".join([heads, "|" + "---|" * len(self.columns), *rows])

    def csv(self) -> str:
        """Return the texts of the table, mean and standard deviation together."""
        lines = [[column.title for column in self.columns], *map(_texts, self.lines)]
        return "".join(f"{csv_line(line)}\n" for line in lines)


def cell_text(cell: Cell) -> str:
    """Return the text of a cell, a dash for None."""
    return "–" if cell is None else str(cell)


def _texts(line: Line) -> list[str]:
    return [cell_text(cell) for cell in line.cells]


def _html_line(line: Line, texts: Sequence[str]) -> str:
    first, *rest = line.cells
    cells = "".join(f"<td{text}>{_html(cell)}</td>" for cell, text in zip(rest, texts[1:], strict=True))
    return f"<tr{' class=chosen' if line.strong else ''}><th>{_html(first)}</th>{cells}</tr>"


def _html(cell: Cell) -> str:
    if not isinstance(cell, MeanStd):
        return escape(cell_text(cell))
    mean, *std = number_texts(cell)
    return mean + "".join(f"<small> ± {text}</small>" for text in std)
