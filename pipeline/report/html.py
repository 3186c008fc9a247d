"""report.html: one file with everything a run has to say, its figures inside, nothing fetched from a network."""

import base64
import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import refuse_unwritable, write_durably
from pipeline.errors import ConfigError
from pipeline.prepared import Prepared, Write, replaced_or_new
from pipeline.report import assets, sections
from pipeline.report.ablation import read_ablations
from pipeline.report.classes import class_data, class_table
from pipeline.report.explorer import explorer
from pipeline.report.outdated import PAGE, results_digest
from pipeline.report.study import Row, Study, labels, read_study, results_files
from pipeline.results.tables import ablation_row
from pipeline.text import Shown

if TYPE_CHECKING:
    from pipeline.report.drawing import Drawing

Section = tuple[str, str]  # heading and HTML


@dataclass(frozen=True)
class Report(Shown):
    """A written report.

    Arguments:
        path: of the page.
        figures: PNG files beside it.
        rows: the main table, accuracies and ECE in %.
        repeated: the repetitions that ± is over, in words.
    """

    path: Path
    figures: tuple[Path, ...]
    rows: tuple[Row, ...]
    repeated: str

    def to_dict(self) -> dict[str, Any]:
        figures = [str(figure) for figure in self.figures]
        return {"report": str(self.path), "figures": figures, "repeated": self.repeated, "rows": list(self.rows)}

    def __str__(self) -> str:
        return "\n".join([f"report: {self.path}", *(f"picture: {figure}" for figure in self.figures)])


@dataclass(frozen=True, eq=False)
class Part:
    """The content of a page about one run, of its ablations, or of several runs together."""

    title: str
    header: str
    sections: list[Section]
    figures: list[Path]
    rows: list[Row]
    repeated: str
    data: str = ""


@dataclass(frozen=True, eq=False)
class PreparedReport:
    """A page whose runs were read and whose folder can be written; `write` draws it.

    Arguments:
        studies: each run with its study; None for a folder that has ablations alone.
    """

    studies: dict[Path, Study | None]
    folder: Path

    @property
    def description(self) -> Prepared:
        texts: list[str] = []
        numbers: list[dict[str, Any]] = []
        for run, study in self.studies.items():
            if study is None:
                names = [document["name"] for document in read_ablations(run)]
                texts.append(f"{run}: ablations {', '.join(names)}")
                numbers.append({"run": str(run), "ablations": names})
                continue
            rows, backbones = sum(len(backbone.rows) for backbone in study.backbones), len(study.backbones)
            texts.append(f"{run}: {backbones} backbone(s), {rows:,} rows; selected: {study.first.selected}")
            numbers.append({"run": str(run), "backbones": backbones, "rows": rows})
        writes = tuple(
            Write(path, None, replaced_or_new(path)) for path in (self.folder / "report.html", self.folder / "figures")
        )
        if len(texts) == 1:
            return Prepared("report", {}, {"run": texts[0]}, numbers[0], writes)
        return Prepared("report", {}, {"runs": "; ".join(texts)}, {"runs": numbers}, writes)

    def write(self) -> Report:
        studies, folder, runs = self.studies, self.folder, [*self.studies]
        folder.mkdir(parents=True, exist_ok=True)
        if len(runs) == 1:
            (study,) = studies.values()
            parts = [_one(runs[0], study, folder, "", "0")]
            title, header, main = parts[0].title, parts[0].header, _body(parts[0], "0")
        else:
            names = dict(zip(runs, labels(runs), strict=True))
            with_results = {names[run]: study for run, study in studies.items() if study}
            together = [_together(with_results, folder)] if len(with_results) > 1 else []
            each_run = [
                _one(run, study, folder, f"{i}-{run.resolve().name}/", str(i))
                for i, (run, study) in enumerate(studies.items(), 1)
            ]
            title, parts = " · ".join(names.values()), [*together, *each_run]
            titles = [*("Side by side" for _ in together), *names.values()]
            links = "".join(f"<a href='#part-{i}'>{escape(t)}</a>" for i, t in enumerate(titles))
            header = f"<p class=lead>{len(runs)} runs</p><nav aria-label=runs>{links}</nav>"
            main = "".join(
                f"<div class=run id=part-{i}><h2 class=name>{escape(t)}</h2>{part.header}{_body(part, str(i))}</div>"
                for i, (part, t) in enumerate(zip(parts, titles, strict=True))
            )
        digest = results_digest(runs)
        path = write_durably(folder / PAGE, page(title, header, main, digest))
        figures = tuple(f for part in parts for f in part.figures)
        rows = (parts[0] if len(parts[0].rows) else parts[-1]).rows
        return Report(path, figures, tuple(rows), "; ".join(dict.fromkeys(p.repeated for p in parts if p.repeated)))


def prepare_report(run: Path | Sequence[Path], *, out: Path | None = None) -> PreparedReport:
    """Return the page that `write_report` would draw, checked; nothing is written.

    Arguments and raises: those of `write_report`.
    """
    runs = list(dict.fromkeys([Path(run)] if isinstance(run, str | Path) else map(Path, run)))
    if not runs:
        raise ConfigError("no run given; name one, such as runs/digits-lt")
    folder = out or (runs[0] if len(runs) == 1 else Path("report"))
    studies = {path: None if not results_files(path) and read_ablations(path) else read_study(path) for path in runs}
    for study in filter(None, studies.values()):
        for backbone in study.backbones:
            backbone.refuse_other_accuracy(backbone.selected)  # DataError also where they are missing
    try:
        refuse_unwritable(folder)
    except PermissionError as error:
        raise ConfigError(f"{folder}: no permission to write there; name another folder with --out") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ConfigError(f"{folder}: {error.strerror}; name a folder you may write to with --out") from error
    return PreparedReport(studies, folder)


def write_report(run: Path | Sequence[Path], *, out: Path | None = None) -> Report:
    """Write report.html, and figures/*.png with their numbers as .csv, into the run's folder or `out`.

    Arguments:
        run: a folder with rebalance/results.json, or with seed-N folders of several backbones; or that of an ablation, or
            of several. Of more than one run, the page has them side by side and then each for itself.
        out: the folder of the page; by default the run's, of several runs ./report.
    Raises:
        DataError: results, heads or store are missing or damaged.
        ConfigError: `out` cannot be written to.
    """
    return prepare_report(run, out=out).write()


def _one(run: Path, study: Study | None, folder: Path, below: str, key: str) -> Part:
    """A run with its ablations, its figures written. below: the folder under figures/ that they go to."""
    from pipeline.report.ablation import ablation_section, accuracy_figure
    from pipeline.report.figures import draw_all
    from pipeline.report.progress import of_run

    figures: list[Path] = []

    def shown(drawing: "Drawing") -> str:
        image, path = drawing.write(folder / "figures" / below)
        figures.append(path)
        return figure(drawing, image, key, f"figures/{below}{drawing.name}.csv")

    ablations: list[Section] = []
    documents = read_ablations(run)
    for document in documents:
        drawing = accuracy_figure(document)
        name = "".join(c if c.isalnum() or c in "-." else "-" for c in document["name"])
        inside = ablation_section(document)
        if drawing:
            inside += shown(replace(drawing, name=f"ablation-{name}"))
        ablations.append((f"Ablation {document['name']}", inside))
    if study is None:
        rows = [ablation_row(row) | {"ablation": d["name"]} for d in documents for row in d["rows"]]
        network = documents[0].get("network", {}).get("network", "network unknown")
        lead_text = f"<p class=lead>{escape(network)}; each variant was chosen for itself, without the test split.</p>"
        return Part(run.resolve().name, lead_text, ablations, figures, rows, "")
    lines, progress = sections.summary(study), of_run(run)
    parts: list[Section] = [("Result", sections.result(study, lines))]
    if study.document.get("chosen"):
        parts.append(("Every method, tuned alike", sections.methods(study)))
    change = None
    for drawing in (*draw_all(study), *([progress] if progress else [])):
        inside = shown(drawing)
        if drawing.name == "accuracy-lambda":
            inside = explorer(study, drawing.table, key) + inside
        elif drawing.name == "class-change":
            change = drawing.table
            inside += class_table(study, key)
        parts.append((drawing.title, inside))
    parts += [
        *ablations,
        ("Data", sections.data(study)),
        ("Origin", sections.origin(study)),
        ("Every head", sections.every_head(study)),
    ]
    header = f"{sections.lead(study)}{sections.advice(study)}{sections.tiles(study, lines)}"
    rows = [line.to_dict() for line in lines]
    return Part(run.resolve().name, header, parts, figures, rows, study.repeated, class_data(study, change, key))


def _together(studies: dict[str, Study], folder: Path) -> Part:
    from pipeline.report.compared import compared, draw_compared

    table, rows = compared(studies)
    parts: list[Section] = [("The runs", table)]
    figures = []
    for drawing in draw_compared(studies):
        image, path = drawing.write(folder / "figures")
        figures.append(path)
        parts.append((drawing.title, figure(drawing, image, "all", f"figures/{drawing.name}.csv")))
    return Part("Side by side", "", parts, figures, rows, "")


def _body(part: Part, key: str) -> str:
    inside = "".join(section(*s, key) for s in part.sections)
    return f"<div data-run={key}>{part.data}{contents(part.sections, key)}{inside}</div>"


def page(title: str, header: str, main: str, digest: str = "") -> str:
    """The whole document; digest: of the results that it shows."""
    name = escape(title)
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<meta name=results content={digest or 'none'}><meta name=color-scheme content='light dark'>"
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


def figure(drawing: "Drawing", image: bytes, key: str, numbers: str) -> str:
    """The picture, and beside it the chart that the page's script draws instead; numbers: where its CSV lies."""
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    alt_text = escape(f"{drawing.title}. {drawing.caption} Numbers in {numbers}.")
    caption = f"{escape(drawing.caption)} Numbers: <code>{escape(numbers)}</code>."
    name = f"chart-{drawing.name}-{key}"
    place = f'<div class=chart data-chart="{name}" role=group aria-label="{escape(drawing.title)}"></div>'
    live = place + assets.data(name, drawing.chart)
    picture = f'<div class=scroll><img src="{source}" alt="{alt_text}"></div>'
    return f"<figure>{picture}{live}<figcaption>{caption}</figcaption></figure>"


def _anchor(heading: str, key: str) -> str:
    return "-".join([*"".join(c if c.isalnum() else " " for c in heading.lower()).split(), key])
