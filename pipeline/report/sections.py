"""The written parts of a run's page: headline, tables, data and what made it, as HTML."""

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from pipeline.longtail import BOUNDS, class_groups
from pipeline.paths import names_only
from pipeline.report.study import COLUMNS, SPLITS, Row, Study
from pipeline.results.head_id import BASELINE, HeadId, chosen_text
from pipeline.results.mean_std import MeanStd, difference, signed
from pipeline.results.recommendation import recommendation
from pipeline.results.table import Column, Line, Table
from pipeline.results.tables import (
    DIFFERENCES,
    TITLES,
    differences_caption,
    labelled,
    network_text,
    sentences,
)


@dataclass(frozen=True, eq=False)
class SummaryRow:
    """One line of the main table."""

    name: str
    selected: bool
    cells: dict[str, MeanStd]

    def to_dict(self) -> Row:
        numbers = {column: cell.mean for column, cell in self.cells.items()}
        spreads = {f"{column}_std": cell.std for column, cell in self.cells.items()}
        return {"name": self.name, "selected": self.selected, "n": self.cells["all"].n, **numbers, **spreads}


def summary(study: Study, extra: HeadId | None = None) -> list[SummaryRow]:
    """The main table: stage 1, the loss alone, λ = 0, what everybody would try, the selected head, `extra`; on test."""
    lines: list[tuple[str, HeadId | Sequence[HeadId]]] = [
        (study.start.removeprefix("the "), BASELINE),
        (study.first.loss_only.name(), study.first.loss_only),
        (study.at(0.0).name(), study.at(0.0)),
    ]
    tuned = {row["method"] for row in study.document.get("chosen", ())}
    for method in ("logit-adjust", "logistic-balanced", "iwb"):
        heads = [
            HeadId(method, study.at(0.0).loss if method == "iwb" else None, b.tuned_lam(method))
            for b in study.backbones
        ]
        if method in tuned and heads != study.selected:
            lines.append((_name_of(heads), heads))
    lines.append((_selected_name(study), study.selected))
    if extra is not None:
        lines.append((f"{extra} (given)", extra))
    table = []
    for name, kinds in lines:
        cells = {column: study.spread(kinds, "test", column) for column in (*COLUMNS, "ece")}
        measured = {column: cell for column, cell in cells.items() if cell is not None}
        if measured:
            table.append(SummaryRow(name, kinds == study.selected, measured))
    return table


def result(study: Study, lines: Sequence[SummaryRow]) -> str:
    """The main table, and what is to be known of it."""
    return _table(study, lines) + choice(study) + _near(study) + _norm_term(study)


def advice(study: Study) -> str:
    """Return the recommendation, a sentence a line; nothing where results of an older version have none."""
    sentences = recommendation(study.document)
    return f"<ul class=advice>{''.join(f'<li>{escape(s)}</li>' for s in sentences)}</ul>" if sentences else ""


def lead(study: Study) -> str:
    network = study.first.network
    named = f"{escape(network_text(network))}; " if network else ""
    return (
        f"<p class=lead>{named}{len(study.counts):,} classes, {study.counts.sum():,} training images. Top-1 accuracy "
        f"on test, a group's accuracy being the mean over its {study.averaged}; {escape(study.repeated)}.</p>"
    )


def tiles(study: Study, lines: Sequence[SummaryRow]) -> str:
    """The selected head's numbers, large, with what they were before stage 2."""
    reference, selected, tile_list = lines[0], lines[-1], []
    for column in COLUMNS:
        a, b = (line.cells[column].mean for line in (reference, selected))
        if a is not None and b is not None:
            name = TITLES[column] + (f" ({BOUNDS[column]} images)" if column in BOUNDS else "")
            sign, mark = ("up", "▲") if b > a else ("down", "▼")
            change = f"<em class={sign}>{mark} {abs(b - a):.1f} against {study.start}</em>"
            if not round(b - a, 1):
                change = f"<em>as with {study.start}</em>"
            tile_list.append(f"<div class=tile><span>{name}</span><b>{b:.1f}<small> %</small></b>{change}</div>")
    return f"<div class=tiles>{''.join(tile_list)}</div>"


def _table(study: Study, lines: Sequence[SummaryRow]) -> str:
    order = ("many", "medium", "few", "all", "ece")
    below = {column: study.classes_of(column) for column in order[:-1]} | {"ece": "calibration error"}
    columns_present = [c for c in order if any(line.cells[c].mean is not None for line in lines)]
    columns = [Column("Head"), *(Column(TITLES[c], below[c]) for c in columns_present)]
    table = Table(
        columns, [Line([row.name, *(row.cells[c] for c in columns_present)], strong=row.selected) for row in lines]
    )
    note = "All numbers in %. Test split, evaluated after the choice was made; not selected on."
    if any(cell.std is not None for line in lines for cell in line.cells.values()):
        only = "" if len(study.backbones) > 1 else ", which says nothing of another training of the network"
        note += f" ± is one standard deviation over {escape(study.repeated)}{only}."
    return f"{table.html()}<p class=note>{note}</p>{_differences(study)}"


def _differences(study: Study) -> str:
    """The selected head less others on the same test samples; nothing where nothing was compared."""
    compared = study.document.get("differences") or {"rows": ()}
    rows = labelled(compared["rows"], study.start.removeprefix("the "))
    present = [c for c in DIFFERENCES if any(row[c] for _, row in rows)]
    if not rows:
        return ""
    columns = [Column("Difference from"), *(Column(TITLES[c]) for c in present)]
    table = Table(columns, [Line([label, *(difference(row[c]) for c in present)]) for label, row in rows])
    note = f"The selected head less each of these, in points, with 95 % intervals. {differences_caption(compared)}"
    return f"{table.html()}<p class=note>{note}</p>"


def choice(study: Study) -> str:
    """Which λ was chosen, on what, out of which."""
    texts = [f"{k.lam:g}" for k in study.selected if k.lam is not None]
    if not texts:
        tried = study.document.get("selection", {}).get("settings_tried")
        if study.chosen_on is None or not tried:
            return ""
        name, split = study.first.selected.name(), SPLITS[study.choosing_split]
        return f"<p><strong>{escape(name)}</strong> was chosen on {split}; {tried:,} settings were tried there, none on test.</p>"
    if study.chosen_on is None:
        return f"<p>λ = {texts[0]} was given, not chosen.</p>"
    zero = [0.0] if any(k.lam == 0 for k in study.selected) else []
    candidates = ", ".join(f"{lam:g}" for lam in [*zero, *study.lams])
    split_text = "the validation split" if study.chosen_on == "val" else "held-out folds of the training features"
    basis = f"on {split_text} among {candidates}, the test split unseen"
    if len(set(texts)) == 1:
        alike = "by the mean over backbones " if len(texts) > 1 else ""
        return f"<p><strong>λ = {texts[0]}</strong> was chosen {alike}{basis}.</p>"
    by_backbone = ", ".join(f"{b.name}: {lam}" for b, lam in zip(study.backbones, texts, strict=True))
    return f"<p>Each backbone chose its own λ {basis}: <strong>{escape(by_backbone)}</strong>.</p>"


def methods(study: Study) -> str:
    """Return the table of tuned methods: trials, chosen parameters, accuracy on validation and test."""
    present = [
        c for c in ("all", "many", "medium", "few") if study.spread(BASELINE, "test", c)
    ]  # the widest may be cut off
    columns = [Column("Method"), Column("Trials"), Column("Chosen", left=True)]
    columns += [Column("All", f"on {SPLITS[study.choosing_split]}"), *(Column(TITLES[c], "on test") for c in present)]
    lines = []
    for row in study.document["chosen"]:
        method = HeadId.of_row(row)
        heads = [replace(method, lam=b.tuned_lam(method.method)) for b in study.backbones]
        cells = [str(row["trials"]), chosen_text(row), f"{row['score']:.1f}"]
        tested = (study.spread(heads, "test", column) for column in present)
        lines.append(Line([method.without_lam.name(), *cells, *tested], strong=heads == study.selected))
    notes = " ".join(sentences(study.document.get("notes", ())))
    return f"{Table(columns, lines).html()}<p class=note>{escape(notes)} All trials are in trials.csv.</p>"


def _near(study: Study) -> str:
    """Return the heads within one standard error of the chosen one."""
    heads = [HeadId.of_row(row) for row in study.document.get("within_one_se", ())]
    if len(heads) < 2:
        return ""
    several = len({head.method for head in heads}) > 1
    names = [head.name(study.start.removeprefix("the ")) if several else f"{head.lam:g}" for head in heads]
    listed = escape(", ".join(names))
    return f"<p>Within one standard error of the best on the same split: {'' if several else 'λ = '}{listed}.</p>"


def _norm_term(study: Study) -> str:
    """Return the gain by the norm term over its loss only."""
    if study.first.selected.lam is None:
        return ""
    parts, loss_only = [], study.first.loss_only
    for column in COLUMNS:
        without, with_term = (study.spread(k, "test", column) for k in (loss_only, study.selected))
        if without and with_term and without.mean is not None and with_term.mean is not None:
            parts.append(f"{column} {signed(with_term.mean - without.mean)}")
    return f"<p>The norm term itself, against {loss_only.name()}: {', '.join(parts)} points.</p>" if parts else ""


def data(study: Study) -> str:
    store, counts, data = study.first.store, study.counts, study.first.training.get("dataset", {})
    groups = [f"{int(m.sum()):,} {g} ({BOUNDS[g]} images)" for g, m in class_groups(counts).items()]
    lines = [
        ("Images", ", ".join(f"{store.rows(s):,} {s}" for s in store.splits if store.rows(s))),
        ("Classes", f"{len(counts):,}: {', '.join(groups)}"),
        ("Images per class", f"{counts.max():,} … {counts.min():,}, imbalance {counts.max() / counts.min():.4g}"),
        ("Source", data.get("name")),
        ("Fingerprint", data.get("fingerprint")),
        ("Fingerprint covers", data.get("fingerprint_covers")),
        *(("Note", note) for note in dict.fromkeys([*data.get("notes", ()), *study.document.get("notes", ())])),
    ]
    return _facts(lines)


def origin(study: Study) -> str:
    """Return network, stages, commands, versions and configuration behind the results."""
    first, store = study.first, study.first.store
    stage1, dump, stage2 = first.training, store.provenance, first.rebalancing
    views = f"{store.views('train')} view(s) of each training image, {store.dtype}, digest {store.digest[:16]}"
    lines: list[tuple[str, Any]] = [("Features", views), ("Repeated", study.repeated)]
    if n := first.network:
        lines.insert(0, ("Network", network_text(n)))
    if first.metrics:
        took = _clock(sum(m.get("seconds", 0) for m in first.metrics))
        device = f"{stage1.get('device', 'unknown device')}, {stage1.get('ranks', 1)} rank(s)"
        lines.append(("Stage 1", f"{first.metrics[-1]['epoch']} epochs in {took} on {device}"))
    times = [f"{stage} {_clock(entry['seconds'])}" for stage, entry in study.stages.items() if "seconds" in entry]
    lines.append(("Times", ", ".join(times)))
    timing = first.results.get("timing", {})
    if timing.get("heads"):
        text = f"{timing['heads']} heads fitted in {timing['fit_s']:.1f} s, features loaded in {timing['load_s']:.1f} s"
        lines.append(("Stage 2", text))
    trained = "Stage 1" if stage1.get("command") == "train-backbone" else "Backbone"
    for name, record in ((trained, stage1), ("Dump", dump), ("Stage 2", stage2)):
        if command := record.get("command") or " ".join(
            record.get("argv", ())[1:2]
        ):  # what else was typed names places
            when = (record.get("created") or "").replace("T", " ").replace("+00:00", " UTC")
            lines.append((f"{name} command", f"pipeline {command}"))
            lines.append(
                (f"{name} made", f"{when}; git {record.get('git') or 'unknown'}; {record.get('platform', '')}")
            )
    versions: Row = next((m["versions"] for m in (stage2, dump, stage1) if m.get("versions")), {})
    lines.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    config = dump.get("config") or stage1.get("config")
    if not config:
        return _facts(lines)
    text = escape(json.dumps(names_only(config), indent=1, ensure_ascii=False))
    return f"{_facts(lines)}<details><summary>Configuration</summary><pre>{text}</pre></details>"


def every_head(study: Study) -> str:
    """All rows of all backbones, folded away."""
    names = ["backbone", "method", "loss", "λ", "seed", "split", "many", "medium", "few", "all", "ECE"]
    splits = SPLITS | {"test": "test, not selected on"}
    lines = []
    for backbone in study.backbones:
        for row in backbone.rows:
            facts = [row["method"], row.get("loss"), row.get("lam"), row.get("seed"), splits.get(row["split"])]
            texts = [None if f is None else f"{f:g}" if isinstance(f, float) else str(f) for f in facts]
            numbers = [MeanStd(row.get(column)) for column in ("many", "medium", "few", "all", "ece")]
            lines.append(Line([backbone.name, *texts, *numbers]))
    table = Table([Column(name) for name in names], lines).html("", scroll="scroll tall")
    return f"<details><summary>{len(lines):,} rows, as in results.json</summary>{table}</details>"


def _facts(lines: Iterable[tuple[str, Any]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in lines if v)}</dl>"


def _name_of(heads: Sequence[HeadId]) -> str:
    """Return the name of a tuned method, without its λ where backbones differ in it."""
    return heads[0].name() if len(set(heads)) == 1 else heads[0].without_lam.name()


def _selected_name(study: Study) -> str:
    basis = f"chosen on {SPLITS[study.choosing_split]}" if study.chosen_on else "given"
    lams = {k.lam for k in study.selected if k.lam is not None}
    if not lams:
        return study.first.selected.name()
    if len(lams) == 1:
        return f"{study.first.selected} ({basis})"
    return f"{study.first.selected.without_lam.name()}, λ of each backbone ({basis})"


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
