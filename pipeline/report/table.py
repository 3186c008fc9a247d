"""The table of stage 2, as a person reads it in a terminal."""

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from pipeline.method_names import start_name
from pipeline.results.head_id import HeadId, chosen_text

COLUMNS = ("many", "medium", "few", "all", "ece")
DIFFERENCES = ("many", "medium", "few", "all")


def results_table(document: Mapping[str, Any]) -> Table:
    """Many, medium, few, all and ECE on the test split, mean ± std: reference rows, the selected one, then the others.

    document: what `rebalance --json` prints, or the combination of several backbones' documents.
    """
    tested: dict[HeadId, list[Mapping[str, Any]]] = {}
    for row in document["results"]:
        if row["split"] == "test":
            tested.setdefault(HeadId.of_row(row), []).append(row)
    selected = HeadId.of_row(document["selected"])
    order = sorted(tested, key=lambda head: (_rank(head, selected), head.lam or 0.0))
    start = start_name(document.get("fingerprint"))
    chosen = "◀ selected" if document["selected"]["chosen_on"] else "◀ given"
    near = {HeadId.of_row(facts) for facts in document.get("within_one_se", ())}
    several = any(len(rows) > 1 for rows in tested.values()) or document["selected"]["n"] > 1
    title = "Test accuracy in %, mean ± std" if several else "Test accuracy in %"
    table = Table(title=title, caption=caption(document), caption_justify="left", title_justify="left", box=box.SIMPLE)
    table.add_column("head", min_width=9)
    for column in COLUMNS:
        table.add_column("ECE" if column == "ece" else column.capitalize(), justify="right", min_width=6)
    table.add_column("", width=11)  # narrow terminals fold the others
    for i, setting in enumerate(order):
        mark = chosen if setting == selected else "within 1 SE" if setting in near else ""
        cells = [spread(tested[setting], column) for column in COLUMNS]
        last_of_block = i + 1 == len(order) or _rank(order[i + 1], selected) // 10 != _rank(setting, selected) // 10
        style = "bold" if setting == selected else None
        table.add_row(setting.name(start), *cells, mark, style=style, end_section=last_of_block)
    return table


def results_tables(document: Mapping[str, Any]) -> Group:
    """results_table, and below it what was chosen for each method and how far the selected row differs from others."""
    below = (chosen_table(document), differences_table(document))
    return Group(results_table(document), *(part for table in below if table for part in ("", table)))


def differences_table(document: Mapping[str, Any]) -> Table | None:
    """The selected row less others on the same test samples, with 95 % intervals; None where nothing was compared."""
    found = document.get("differences") or {"rows": ()}
    if not found["rows"]:
        return None
    start = start_name(document.get("fingerprint"))
    table = Table(
        title=f"{HeadId.of_row(document['selected']).name(start)} less other rows, in points, with 95 % intervals",
        caption=differences_caption(found),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("less", no_wrap=True)
    for column in DIFFERENCES:
        table.add_column(column.capitalize(), justify="right", min_width=6)
    for label, row in labelled(found["rows"], start):
        table.add_row(label, *(difference(row[column]) for column in DIFFERENCES))
    return table


def differences_caption(found: Mapping[str, Any]) -> str:
    """How the intervals were made and what they leave out."""
    return (
        f"Paired bootstrap of {found['samples']:,} test samples within their classes, {found['resamples']:,} resamples; it "
        "speaks of other samples of these classes, not of other trainings."
    )


def labelled(rows: Sequence[Mapping[str, Any]], start: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, row) of each other setting once, though it may stand in two roles."""
    ran_up = [HeadId.of_row(row) for row in rows if row["against"] == "runner_up"]
    once = {HeadId.of_row(row): row for row in rows}
    return [(s.name(start) + (" (runner-up)" if s in ran_up else ""), row) for s, row in once.items()]


def difference(value: Mapping[str, float] | None) -> str:
    """`+0.4 [−0.1, 0.9]`, or a dash for an empty group."""
    if value is None:
        return "–"
    point, low, high = (round(value[key], 1) or 0.0 for key in ("difference", "low", "high"))  # no −0.0
    return f"{point:+.1f} [{low:.1f}, {high:.1f}]".replace("-", "−")


def chosen_table(document: Mapping[str, Any]) -> Table | None:
    """What tuning chose for each method, on what score, out of how many trials; None where nothing was tuned."""
    if not document.get("chosen"):
        return None
    on = _split_name(document["selected"]["chosen_on"])
    start = start_name(document.get("fingerprint"))
    table = Table(title=f"Chosen for each method on {on}", title_justify="left", box=box.SIMPLE)
    for column, justify in (("head", "left"), ("trials", "right"), (f"All on {on} in %", "right"), ("chosen", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("at the border of its grid")
    for row in document["chosen"]:
        cells = (str(row["trials"]), f"{row['score']:.1f}", chosen_text(row), ", ".join(row["border"]))
        table.add_row(HeadId.of_row(row).without_lam.name(start), *cells)
    return table


def tries_table(document: Mapping[str, Any]) -> Table:
    """The settings of stage 1 that were tried, by validation accuracy; document: tries.json."""
    n, data, network = len(document["seeds"]), document["dataset"], document["network"]
    title = "Validation accuracy of the last epoch in %" + (", mean ± std" if n > 1 else "")
    seeds = f"n = {n} seed{'s' if n > 1 else ''} ({', '.join(map(str, document['seeds']))})"
    alone = "" if n > 1 else "; one training each, whose spread is unknown: --seeds 0,1,2 shows it"
    told = (
        f"{network['network']}, {network['parameters']:,} parameters, {network['feature_width']}-d features; "
        f"{data['name']}, imbalance {data['imbalance_factor']:g}; {seeds}{alone}; the test split was not looked at."
    )
    table = Table(title=title, caption=told, caption_justify="left", title_justify="left", box=box.SIMPLE)
    table.add_column("setting", overflow="fold")
    columns = [c for c in COLUMNS if c != "ece"]
    for column in columns:
        table.add_column(column.capitalize(), justify="right", min_width=6)
    table.add_column("")
    selected = document["selected"]
    for row in document["tries"]:
        is_it = row["name"] == selected["name"] and selected["chosen_on"]
        mark = "◀ selected" if is_it else "within 1 SE" if row["within_one_se"] else ""
        mark = f"diverged: seed {', '.join(map(str, row['diverged']))}" if row["diverged"] else mark
        cells = [spread(row["runs"], column) for column in columns]
        table.add_row(row["name"], *cells, mark, style="bold" if is_it else None)
    return table


def network_text(network: Mapping[str, Any]) -> str:
    """`cifar_resnet32, 470,004 parameters, 64-d features`, as far as the store of the features says."""
    parts = [str(network.get("network", "network unknown"))]
    if network.get("parameters"):
        parts.append(f"{network['parameters']:,} parameters")
    if network.get("feature_width"):
        parts.append(f"{network['feature_width']}-d features")
    return ", ".join(parts)


def caption(document: Mapping[str, Any]) -> str:
    """What the numbers were made from and chosen on; METHODS wants it beside every table."""
    network, selected, settings = document.get("network", {}), document["selected"], document.get("settings", {})
    parts = [network_text(network)]
    if "augmentation" in network:
        parts.append(f"stage 1 with {network['augmentation']}")
    if settings:
        stored = settings.get("views_stored", 1)
        seen = (
            f"{stored - 1} augmented view{'s' if stored != 2 else ''}"
            if settings["views"] == "augmented"
            else "the clean view"
        )
        parts += [
            f"fitted on {seen} (encoder in evaluation mode)",
            "mixed formulation" if settings["formulation"] == "mixed" else f"{settings['formulation']}'s formulation",
            "no test-time flips",
        ]
    if "backbones" in document:
        repeated = f"n = {document['backbones']} backbones"
    else:
        n = len(settings["seeds"]) if document.get("chosen") else selected["n"]  # what is not trained has one row
        repeated = f"n = {n} batch order{'s' if n != 1 else ''} of one backbone"
    if selected["chosen_on"]:
        how = f"selected on {_split_name(selected['chosen_on'])}; no row was selected on the test split"
    else:
        how = "one setting was given, nothing was selected"
    notes = "".join(f"\n{note[0].upper()}{note[1:]}." for note in document.get("notes", ()))
    return f"{', '.join(parts)}; {repeated}; {how}.{notes}"


def html_table(corner: str, heads: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A plain table of the page; lines: the name of each and its cells."""
    head = "".join(f"<th>{escape(text)}</th>" for text in (corner, *heads))
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for first, cells in lines
    )
    return f"<div class=scroll><table class=main><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def spread(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    """`41.2 ± 0.3` over rows, or of the one row that carries its own std; a dash for an empty group."""
    values = [row[column] for row in rows if row[column] is not None]
    if not values:
        return "–"
    std = statistics.stdev(values) if len(values) > 1 else rows[0].get(f"{column}_std")
    return f"{statistics.fmean(values):.1f}" + (f" ± {std:.1f}" if std is not None else "")


def _rank(head: HeadId, selected: HeadId) -> int:
    """Blocks of ten: references, the selected row, the sweep."""
    if head == selected:
        return 10
    references = {"baseline": 0, "ce": 1, "cb": 2}
    return references.get(head.method, 3 if head.method == "iwb" and head.lam == 0 else 20)


def _split_name(split: str) -> str:
    return {"val": "validation", "kfold": "folds of the training features"}.get(split, split)
