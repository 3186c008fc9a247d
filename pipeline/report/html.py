"""report.html: one file with everything a run has to say, its figures inside, nothing fetched from a network."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import write_durably
from pipeline.errors import ConfigError
from pipeline.report import assets, sections
from pipeline.report.classes import class_data, class_table
from pipeline.report.explorer import explorer
from pipeline.report.source import Row, Study, read_study
from pipeline.shown import Shown

if TYPE_CHECKING:
    from pipeline.report.drawing import Drawing

Section = tuple[str, str]  # heading and HTML


@dataclass(frozen=True)
class Report(Shown):
    """A written report: the page, its figures, and the table on top of it."""

    path: Path
    figures: tuple[Path, ...]
    rows: tuple[Row, ...]
    repeated: str

    def to_dict(self) -> dict[str, Any]:
        figures = [str(figure) for figure in self.figures]
        return {"report": str(self.path), "figures": figures, "repeated": self.repeated, "rows": list(self.rows)}

    def __str__(self) -> str:
        return "\n".join([f"report: {self.path}", *(f"picture: {figure}" for figure in self.figures)])


def write_report(run: Path, *, out: Path | None = None) -> Report:
    """Writes report.html, and figures/*.png with their numbers as .csv, into the run's folder or `out`.

    run: a folder with rebalance/results.json, or with seed-N folders of several backbones.
    Raises DataError where results, heads or store are missing or damaged, ConfigError where `out` cannot be written to.
    """
    from pipeline.report.figures import draw_all
    from pipeline.report.progress import of_run

    study, folder = read_study(run), out or run
    writable(folder)
    progress = of_run(run)
    drawn = [*draw_all(study), *([progress] if progress else [])]
    shown = [(drawing, *_kept(drawing, folder)) for drawing in drawn]
    lines = sections.summary(study)
    title = study.folder.resolve().name
    header = f"{sections.lead(study)}{sections.tiles(study, lines)}"
    text = page(title, header, of_one(study, lines, [(d, image) for d, image, _ in shown], "0"))
    path = write_durably(folder / "report.html", text)
    return Report(path, tuple(p for _, _, p in shown), tuple(line.to_dict() for line in lines), study.repeated)


def writable(folder: Path) -> None:
    """Makes the folder; ConfigError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; name a folder you may write to with --out") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: no permission to write there; name another folder with --out")


def of_one(study: Study, lines: Sequence[sections.Line], drawn: Sequence[tuple["Drawing", bytes]], key: str) -> str:
    """The sections of a run. key: tells runs on a page apart."""
    by_name = {drawing.name: drawing for drawing, _ in drawn}
    change = by_name.get("class-change")
    parts: list[Section] = [("Result", sections.result(study, lines))]
    if study.document.get("chosen"):
        parts.append(("Every method, tuned alike", sections.methods(study)))
    for drawing, image in drawn:
        inside = figure(drawing, image, key)
        if drawing.name == "accuracy-lambda":
            inside = explorer(study, drawing.table, key) + inside
        elif drawing is change:
            inside += class_table(study, key)
        parts.append((drawing.title, inside))
    parts += [
        ("Data", sections.data(study)),
        ("What made it", sections.made(study)),
        ("Every head", sections.every_head(study)),
    ]
    told = class_data(study, change.table if change else None, key)
    return f"<div data-run={key}>{told}{contents(parts, key)}{''.join(section(*p, key) for p in parts)}</div>"


def page(title: str, header: str, main: str) -> str:
    """The whole document."""
    name = escape(title)
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>{name} · iwb-pipeline report</title>{assets.style()}"
    )
    top = f"<header><p class=kicker>iwb-pipeline report</p><h1>{name}</h1>{header}</header>"
    body = "\n".join([top, f"<main>{main}</main>", assets.library(), assets.script()])
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n"


def contents(parts: Sequence[Section], key: str) -> str:
    links = "".join(f"<a href='#{_anchor(heading, key)}'>{escape(heading)}</a>" for heading, _ in parts)
    return f"<nav aria-label=contents>{links}</nav>"


def section(heading: str, inside: str, key: str) -> str:
    return f"<section id={_anchor(heading, key)}><h2>{escape(heading)}</h2>{inside}</section>"


def figure(drawing: "Drawing", image: bytes, key: str) -> str:
    """The picture, and beside it the chart that the page's script draws instead."""
    numbers = f"figures/{drawing.name}.csv"
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    told = escape(f"{drawing.title}. {drawing.caption} Numbers in {numbers}.")
    caption = f"{escape(drawing.caption)} Numbers: <code>{numbers}</code>."
    live = ""
    if drawing.chart:
        name = f"chart-{drawing.name}-{key}"
        place = f'<div class=chart data-chart="{name}" role=img aria-label="{escape(drawing.title)}"></div>'
        live = place + assets.data(name, drawing.chart)
    picture = f'<div class=scroll><img src="{source}" alt="{told}"></div>'
    return f"<figure>{picture}{live}<figcaption>{caption}</figcaption></figure>"


def _kept(drawing: "Drawing", folder: Path) -> tuple[bytes, Path]:
    """(the picture, where it was written, its numbers beside it)."""
    from pipeline.report.axes import png

    image = png(drawing.figure)
    path = write_durably(folder / "figures" / f"{drawing.name}.png", image)
    write_durably(path.with_suffix(".csv"), drawing.csv)
    return image, path


def _anchor(heading: str, key: str) -> str:
    return "-".join([*"".join(c if c.isalnum() else " " for c in heading.lower()).split(), key])
