"""Accuracy against λ in the page: a chart of all groups, and a slider over the λ that were tried."""

from collections.abc import Sequence

import numpy as np

from pipeline.report import assets
from pipeline.report.chart import BLACK, BLUE, ORANGE, RED, bars, chart, errors, kept_apart, plain, trace
from pipeline.report.drawing import BY_GROUP
from pipeline.report.study import COLUMNS, SPLITS, Row, Study
from pipeline.results.mean_std import MeanStd
from pipeline.results.tables import TITLES

BARS = [(BLACK, "."), (RED, "/"), (BLUE, ""), (ORANGE, "x")]  # before, the loss alone, chosen, at the slider
TICKS = 0.06  # of the axis of λ: labels closer than this run into each other
STAR: Row = {"color": ORANGE, "symbol": "star", "size": 11, "edge": BLACK, "dash": "none"}


def places(lams: Sequence[float], references: int) -> tuple[list[float], list[float]]:
    """(where `before` references stand, where the λ stand) on a line: logarithmic where the positive λ span a decade.

    λ = 0, which has no logarithm, stands one step below the smallest, and the references below that.
    """
    positive = [lam for lam in lams if lam > 0]
    wide = len(positive) > 1 and positive[-1] >= 10 * positive[0]
    scale = np.log10(positive) if wide else np.array(positive, dtype=float)
    step = float(scale[-1] - scale[0]) / 8 or 0.25
    positions = ([float(scale[0]) - step] if 0.0 in lams else []) + scale.tolist()
    return [positions[0] - step * (references - i) for i in range(references)], positions


def lambda_chart(study: Study, table: Sequence[Row]) -> Row:
    """Every group over λ, the references at its left; one split shown at a time, test first. table: the figure's."""
    lams, references = _lams(table), _references(table)
    aside, positions = places(lams, len(references))
    splits, columns = list(dict.fromkeys(r["split"] for r in table)), list(dict.fromkeys(r["classes"] for r in table))
    traces = []
    for split in splits:
        visibility: Row = {"meta": {"split": split}, "visible": split == splits[-1]}
        for column in columns:
            panel_rows = [r for r in table if (r["split"], r["classes"]) == (split, column)]
            if not panel_rows:
                continue
            by_line, by_lam = (
                {r["line"]: r for r in panel_rows},
                {r["lam"]: r for r in panel_rows if r["lam"] is not None},
            )
            rows = [row for name in references for row in (by_line.get(name), None)] + [by_lam.get(lam) for lam in lams]
            texts = [_told(row, column) if row else None for row in rows]
            traces.append(
                trace(
                    column,
                    [*(x for place in aside for x in (place, None)), *positions],
                    [row and row["mean"] for row in rows],
                    BY_GROUP[column],
                    **errors([row["std"] if row else None for row in rows], BY_GROUP[column]["color"]),
                    text=plain(texts),
                    hovertemplate="%{text}<extra></extra>",
                    connectgaps=False,
                    legendgroup=column,
                    **visibility,
                )
            )
        if study.chosen_on:
            selected = {k.lam for k in study.selected} - {None}  # of a method without λ
            stars = [r for r in table if r["split"] == split and r["lam"] in selected]
            x, y = [positions[lams.index(r["lam"])] for r in stars], [r["mean"] for r in stars]
            traces.append(
                trace(f"chosen on {SPLITS[study.choosing_split]}", x, y, STAR, hoverinfo="skip", **visibility)
            )
    ticks = kept_apart(positions, TICKS)
    names = [study.start.removeprefix("the "), "loss alone"]
    axis: Row = {
        "title": "λ, scale of the target norms",
        "tickvals": [*aside, *(positions[i] for i in ticks)],
        "ticktext": plain([*names[: len(aside)], *(f"{lams[i]:.2g}" for i in ticks)]),
        "zeroline": False,
    }
    return chart(traces, x=axis, y="accuracy [%]", height=460)


def explorer(study: Study, table: Sequence[Row], key: str) -> str:
    """The slider with what it moves; hidden until the page's script drives it. key: tells runs on a page apart."""
    lams, references = _lams(table), _references(table)
    splits = {s: SPLITS[s] for s in dict.fromkeys(r["split"] for r in table)}
    columns = [c for c in COLUMNS if any(r["classes"] == c for r in table)]
    selected_lams = sorted({lams.index(k.lam) for k in study.selected if k.lam in lams})
    values = {
        split: {
            column: {
                "references": [_number(table, split, column, line=name) for name in references],
                "lams": [_number(table, split, column, lam=lam) for lam in lams],
            }
            for column in columns
        }
        for split in splits
    }
    colours = [
        bars(name, [], [], color=color, pattern=pattern) for name, (color, pattern) in zip("1234", BARS, strict=True)
    ]
    data = {
        "lams": lams,
        "places": places(lams, len(references))[1],
        "chosen": selected_lams,
        "references": plain(references),
        "groups": [[c, TITLES[c], study.classes_of(c)] for c in columns],
        "splits": splits,
        "values": values,
        "start": study.start,
        "choice": _choice(study, lams, selected_lams),
        "bars": chart(colours, x={"fixedrange": True}, y={"title": "accuracy [%]", "range": [0, 102]}, height=340),
    }
    start = selected_lams[-1] if selected_lams else len(lams) - 1
    radios = "".join(
        f"<label><input type=radio name=split-{key} value={split}{' checked' if split == list(splits)[-1] else ''}> "
        f"{name}{' (not selected on)' if split == 'test' else ''}</label>"
        for split, name in splits.items()
    )
    tiles = "".join(
        f"<div class=tile data-group={c}><span>{TITLES[c]} ({study.classes_of(c)})</span><b></b><em></em></div>"
        for c in columns
    )
    back = f"<button type=button>back to λ = {lams[start]:g}</button>" if selected_lams else ""
    return (
        f'<div class=explorer data-explorer="explorer-{key}" hidden>'
        f"<div class=choose><label for=lam-{key}>λ</label>"
        f"<input type=range id=lam-{key} min=0 max={len(lams) - 1} step=1 value={start} aria-describedby=told-{key}>"
        f"<output for=lam-{key}></output>{back}</div>"
        f"<fieldset><legend>accuracy on</legend>{radios}</fieldset>"
        f"<div class=tiles>{tiles}</div><p class=note id=told-{key}></p>"
        f"<div class=chart role=group aria-label='accuracy of each group, as in the tiles above'></div></div>"
        f"{assets.data(f'explorer-{key}', data)}"
    )


def _choice(study: Study, lams: Sequence[float], selected_lams: Sequence[int]) -> str:
    if not study.chosen_on:
        return "No λ of these was chosen: one setting was given."
    if not selected_lams:
        return f"{study.first.selected} was chosen on {SPLITS[study.choosing_split]}, none of these λ."
    listed_lams = ", ".join(f"{lams[i]:g}" for i in selected_lams)
    whose = " by the backbones, each for itself," if len(selected_lams) > 1 else ""
    return f"λ = {listed_lams} was chosen{whose} on {SPLITS[study.choosing_split]} alone, before test was looked at."


def _lams(table: Sequence[Row]) -> list[float]:
    return sorted({r["lam"] for r in table if r["lam"] is not None})


def _references(table: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["line"] for r in table if r["lam"] is None))


def _number(table: Sequence[Row], split: str, column: str, **key: object) -> list[float | None]:
    """[mean, std] of a row of the figure's table."""
    for row in table:
        if row["split"] == split and row["classes"] == column and key.items() <= row.items():
            return [row["mean"], row["std"]]
    return [None, None]


def _told(row: Row, column: str) -> str:
    value = MeanStd(row["mean"], row["std"])
    line = row["line"] if row["lam"] in (None, 0.0) else f"{row['line']}, λ = {row['lam']:g}"
    return f"{column}, {line}: {value} % (n = {row['n']})"
