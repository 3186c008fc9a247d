"""The tables of stage 2, made from the documents that `--json` prints: the same on a terminal and in a page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.method_names import start_name
from pipeline.results.head_id import HeadId, chosen_text
from pipeline.results.mean_std import difference, measured, over_rows
from pipeline.results.table import Column, Line, Table

if TYPE_CHECKING:
    from rich.console import Group

Document = Mapping[str, Any]
COLUMNS = ("many", "medium", "few", "all", "ece")
DIFFERENCES = ("many", "medium", "few", "all")
TITLES = {"all": "All", "many": "Many", "medium": "Medium", "few": "Few", "ece": "ECE"}
SPLITS = {"val": "validation", "kfold": "folds of the training features"}
PAPER = "another, far larger network (CIFAR100-LT, imbalance factor 100), so no number compares with those to its left"


def number_columns(columns: Sequence[str] = DIFFERENCES) -> list[Column]:
    """Return the heads of the columns of measures."""
    return [Column(TITLES[column], min_width=6) for column in columns]


def results_table(document: Document) -> Table:
    """Return accuracies and ECE on the test split, mean ± std: reference rows, the selected one, then the others.

    Arguments:
        document: what `rebalance --json` prints, or the combination of several backbones' documents.
    """
    tested: dict[HeadId, list[Document]] = {}
    for row in document["results"]:
        if row["split"] == "test":
            tested.setdefault(HeadId.of_row(row), []).append(row)
    selected, start = HeadId.of_row(document["selected"]), start_name(document.get("fingerprint"))
    order = sorted(tested, key=lambda head: (_rank(head, selected), head.lam or 0.0))
    mark = "◀ selected" if document["selected"]["chosen_on"] else "◀ given"
    near = {HeadId.of_row(row) for row in document.get("within_one_se", ())}
    lines = []
    for head, following in zip(order, [*order[1:], None], strict=True):
        marked = mark if head == selected else "within 1 SE" if head in near else ""
        ends = following is None or _rank(following, selected) // 10 != _rank(head, selected) // 10
        cells = [over_rows(tested[head], column) for column in COLUMNS]
        lines.append(Line([head.name(start), *cells, marked], strong=head == selected, ends_block=ends))
    several = any(len(rows) > 1 for rows in tested.values()) or document["selected"]["n"] > 1
    return Table(
        [Column("head", left=True, min_width=9), *number_columns(COLUMNS), Column("", left=True, width=11)],
        lines,
        "Test accuracy in %, mean ± std" if several else "Test accuracy in %",
        caption(document),
    )


def results_tables(document: Document) -> "Group":
    """Return results_table, what was chosen for each method, differences from other rows, and the recommendation."""
    advice = "\n".join(document.get("recommendation", ())) or None
    return stacked(results_table(document), chosen_table(document), differences_table(document), advice)


def stacked(*tables: Table | str | None) -> "Group":
    """Return the tables that there are, one below the other."""
    from rich.console import Group

    first, *rest = [table for table in tables if table is not None]
    return Group(first, *(part for table in rest for part in ("", table)))


def differences_table(document: Document) -> Table | None:
    """Return the selected row less others on the same test samples; None where nothing was compared."""
    compared = document.get("differences") or {"rows": ()}
    if not compared["rows"]:
        return None
    start = start_name(document.get("fingerprint"))
    return Table(
        [Column("less", left=True, no_wrap=True), *number_columns()],
        [Line([label, *difference_cells(row)]) for label, row in labelled(compared["rows"], start)],
        f"{HeadId.of_row(document['selected']).name(start)} less other rows, in points, with 95 % intervals",
        differences_caption(compared),
    )


def differences_caption(compared: Document) -> str:
    """Return how the intervals were made and what they leave out."""
    return (
        f"Paired bootstrap of {compared['samples']:,} test samples within their classes, {compared['resamples']:,} "
        "resamples. Covers sampling of the test images only, not retraining."
    )


def labelled(rows: Sequence[Document], start: str) -> list[tuple[str, Document]]:
    """Return (name, row) of each other head once, though it may have two roles."""
    runners_up = [HeadId.of_row(row) for row in rows if row["against"] == "runner_up"]
    once = {HeadId.of_row(row): row for row in rows}
    return [(head.name(start) + (" (runner-up)" if head in runners_up else ""), row) for head, row in once.items()]


def difference_cells(row: Document) -> list[str]:
    """Return the cells of a row of differences: `+0.4 [−0.1, 0.9]`, or a dash for an empty group."""
    return [difference(row[column]) for column in DIFFERENCES]


def chosen_table(document: Document) -> Table | None:
    """Return what tuning chose for each method, on which score, of how many trials; None where nothing was tuned."""
    if not document.get("chosen"):
        return None
    split = SPLITS[document["selected"]["chosen_on"]]
    start = start_name(document.get("fingerprint"))
    return Table(
        [
            Column("head", left=True),
            Column("trials"),
            Column(f"All on {split} in %"),
            Column("chosen", left=True),
            Column("at the border of its grid", left=True),
        ],
        [
            Line(
                (
                    *(HeadId.of_row(row).without_lam.name(start), str(row["trials"]), f"{row['score']:.1f}"),
                    *(chosen_text(row), ", ".join(row["border"])),
                )
            )
            for row in document["chosen"]
        ],
        f"Chosen for each method on {split}",
    )


def tries_table(document: Document) -> Table:
    """Return the settings of stage 1 that were tried, by validation accuracy; document: of tries.json."""
    n, data, network = len(document["seeds"]), document["dataset"], document["network"]
    seeds = f"n = {n} seed{'s' if n > 1 else ''} ({', '.join(map(str, document['seeds']))})"
    single = "" if n > 1 else "; one training each, whose spread is unknown: --seeds 0,1,2 shows it"
    selected, lines = document["selected"], []
    for row in document["tries"]:
        is_selected = row["name"] == selected["name"] and bool(selected["chosen_on"])
        mark = "◀ selected" if is_selected else "within 1 SE" if row["within_one_se"] else ""
        mark = f"diverged: seed {', '.join(map(str, row['diverged']))}" if row["diverged"] else mark
        cells = [over_rows(row["runs"], column) for column in DIFFERENCES]
        lines.append(Line([row["name"], *cells, mark], strong=is_selected))
    return Table(
        [Column("setting", left=True), *number_columns(), Column("", left=True)],
        lines,
        "Validation accuracy of the last epoch in %" + (", mean ± std" if n > 1 else ""),
        f"{network_text(network)}; {data['name']}, imbalance {data['imbalance_factor']:g}; {seeds}{single}; the test split "
        "was not looked at.",
    )


def evaluation_table(document: Document) -> Table:
    """Return the heads of a file on one split; document: what `evaluate --json` prints."""
    left_out = f"; {document['left_out']} unreadable images left out" if document["left_out"] else ""
    return Table(
        [Column("head", left=True), *number_columns(COLUMNS)],
        [
            Line([HeadId.of_row(row).name(document["start"]), *(measured(row, column) for column in COLUMNS)])
            for row in document["settings"]
        ],
        f"Accuracy on {document['split']} in %, mean ± std over batch orders{left_out}",
    )


def ablation_tables(document: Document) -> list[Table]:
    """Return the variants with their λ and accuracies, and where there is one, how far each is from the loss alone."""
    rows, on = document["rows"], _chosen_on(document)
    papers, n = any(row["paper"] for row in rows), max(row["n"] for row in rows)
    text = caption({**document, "selected": {"n": n, "chosen_on": on}})
    text = text.replace("; selected on", "; * λ of each row selected on")
    text = text.replace("'s formulation", "'s formulation where a row says no other")
    variants = Table(
        [Column("variant", left=True, no_wrap=True), Column("λ"), *number_columns(), *[Column("paper")] * papers],
        [
            Line(
                [row["name"], _lam(row), *(measured(row, column) for column in DIFFERENCES)]
                + [paper_text(row["paper"])] * papers
            )
            for row in rows
        ],
        f"{document['name']}: test accuracy in %{', mean ± std' if n > 1 else ''}",
        text + (f"\nPaper: many/medium/few/all as published, on {PAPER}." if papers else ""),
    )
    if not document["against"]:
        return [variants]
    several = any(row.get("against") not in (None, document["against"]) for row in rows)
    names = [Column(title, left=True, no_wrap=True) for title in ("variant", "less")[: 1 + several]]
    differences = Table(
        [*names, *number_columns()],
        [
            Line([row["name"], *[row["against"]] * several, *difference_cells(row["less_alone"])])
            for row in rows
            if row["less_alone"]
        ],
        f"Less {'the loss alone' if several else document['against']}, in points, with 95 % intervals",
        differences_caption(document["bootstrap"]),
    )
    return [variants, differences]


def ablation_row(row: Document) -> dict[str, Any]:
    """Return a variant as one line of table.csv."""
    flat = {key: row.get(key) for key in ("name", "method", "loss", "lam", "chosen_on", "n", "against")}
    flat |= {key: row[key] for column in (*DIFFERENCES, "ece") for key in (column, f"{column}_std")}
    for column in DIFFERENCES:
        less = (row["less_alone"] or {}).get(column) or {}
        flat |= {f"less_alone_{column}_{key}": less.get(key) for key in ("difference", "low", "high")}
        flat[f"paper_{column}"] = row["paper"].get(column)
    return flat


def network_text(network: Document) -> str:
    """Return `cifar_resnet32, 470,004 parameters, 64-d features`, as far as the store of the features says."""
    parts = [str(network.get("network", "network unknown"))]
    if network.get("parameters"):
        parts.append(f"{network['parameters']:,} parameters")
    if network.get("feature_width"):
        parts.append(f"{network['feature_width']}-d features")
    return ", ".join(parts)


def caption(document: Document) -> str:
    """Return what the numbers were made from and selected on, as every table of ours says it."""
    network, selected, settings = document.get("network", {}), document["selected"], document.get("settings", {})
    parts = [network_text(network)]
    if "augmentation" in network:
        parts.append(f"stage 1 with {network['augmentation']}")
    if settings:
        augmented = settings.get("views_stored", 1) - 1
        views = f"{augmented} augmented view{'s' if augmented != 1 else ''}"
        parts += [
            f"fitted on {views if settings['views'] == 'augmented' else 'the clean view'} (encoder in evaluation mode)",
            "mixed formulation" if settings["formulation"] == "mixed" else f"{settings['formulation']}'s formulation",
            "no test-time flips",
        ]
    if "backbones" in document:
        repeated = f"n = {document['backbones']} backbones"
    else:
        n = len(settings["seeds"]) if document.get("chosen") else selected["n"]  # what is not trained has one row
        repeated = f"n = {n} batch order{'s' if n != 1 else ''} of one backbone"
    if selected["chosen_on"]:
        choice = f"selected on {SPLITS[selected['chosen_on']]}; no row was selected on the test split"
    else:
        choice = "one setting was given, nothing was selected"
    return f"{', '.join(parts)}; {repeated}; {choice}." + "".join(
        f"\n{sentence}" for sentence in sentences(document.get("notes", ()))
    )


def sentences(notes: Sequence[str]) -> list[str]:
    """Return notes as sentences that begin with a capital letter."""
    return [f"{note[0].upper()}{note[1:]}." for note in notes]


def _chosen_on(document: Document) -> str | None:
    return next((row["chosen_on"] for row in document["rows"] if row["chosen_on"]), None)


def _lam(row: Document) -> str:
    return "–" if row["lam"] is None else f"{row['lam']:g}" + "*" * bool(row["chosen_on"])


def paper_text(paper: Mapping[str, float] | None) -> str:
    """Return `71.9/54.2/35.7/54.8`, what the paper prints of many, medium, few and all; nothing where it prints none."""
    return "/".join(f"{paper[c]:g}" if c in paper else "–" for c in DIFFERENCES) if paper else ""


def _rank(head: HeadId, selected: HeadId) -> int:
    """Blocks of ten: references, the selected row, the sweep."""
    if head == selected:
        return 10
    references = {"baseline": 0, "ce": 1, "cb": 2}
    return references.get(head.method, 3 if head.method == "iwb" and head.lam == 0 else 20)
