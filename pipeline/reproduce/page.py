"""reproduction.md and reproduction.json: the rows as tables, in the sections of their configurations."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache import write_durably
from pipeline.errors import DataError
from pipeline.reproduce.paper import GROUPS
from pipeline.reproduce.rows import METHODS, Row, merged
from pipeline.results.files import json_text
from pipeline.results.mean_std import MeanStd, difference, minus
from pipeline.results.table import Column, Line, Table
from pipeline.results.tables import paper_text

LAMS_SHOWN = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1)
TITLES = {
    METHODS: "Every method, each tuned for itself on validation",
    "table3": "Table 3: what the target is made of",
    "table4": "Table 4: how the norms are pulled to it",
    "figure5": "Figure 5: accuracy over λ",
    "formulations": "Text against code, in every combination",
}
NOTES = {
    METHODS: "The paper's rivals were trained end to end, on several networks: its column is what it prints, not what the same "
    "rule gives on these features. `cb`, `ce` and `iwb` have the loss and norm term of the configuration's formulation.",
    "formulations": "A row's name: whose KL term (the text's, or the code's with its direction and its gradient through the "
    "target), its weight, the base of its logarithm, the form of the class-balanced loss.",
}


def write(folder: Path, rows: Sequence[Row], deviations: Mapping[str, Sequence[str]]) -> tuple[Path, Path]:
    """Write rows into folder/reproduction.json and their tables into folder/reproduction.md; return both paths.

    Other tables, sections of other configurations and all text around the sections stay as they are.

    Arguments:
        deviations: sentences on the differences of each configuration from the paper.
    Raises: DataError: reproduction.json cannot be read.
    """
    data, page = folder / "reproduction.json", folder / "reproduction.md"
    everything = merged(_read(data), rows)
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Reproduction\n"
    for config, sentences in deviations.items():
        text = with_section(text, config, section([r for r in everything if r["config"] == config], sentences))
    write_durably(data, json_text(everything) + "\n")
    write_durably(page, text)
    return data, page


def with_section(text: str, name: str, content: str) -> str:
    """Return the text with the part between the markers of `name` replaced, or put behind everything else."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    part = f"{begin}\n{content.strip()}\n{end}"
    if begin in text and end in text:
        return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: part, text, flags=re.DOTALL)
    return f"{text.rstrip()}\n\n{part}\n"


def section(rows: Sequence[Row], deviations: Sequence[str]) -> str:
    """Return the section of a configuration: its differences from the paper, and its tables."""
    first = rows[0]
    network = f"{first['network']}, {first['parameters']:,} parameters, {first['width']}-d"
    lines = [f"## {first['config']}: {first['data']}, {network}", ""]
    lines += [f"- {sentence}" for sentence in deviations]
    for table in sorted({r["table"] for r in rows}, key=[*TITLES].index):
        of_table = [r for r in rows if r["table"] == table]
        lines += ["", f"### {TITLES[table]} ({network})", "", _table(of_table).markdown()]
        lines += ["", _caption(of_table), *([NOTES[table]] if table in NOTES else [])]
        lines += [sentence] if (sentence := worth_of_selection(of_table)) else []
    return "\n".join(lines)


def worth_of_selection(rows: Sequence[Row]) -> str:
    """Return a sentence on the λ that is best on the test split: no result, but the most that selection may cost."""
    texts = []
    for name in (r["row"] for r in rows if r["chosen"]):
        selected = next(r for r in rows if r["row"] == name)
        curve = [r for r in rows if r["row"].startswith(f"{name}, λ ")]
        if curve:
            best = max(curve, key=lambda r: r["ours"]["all"])
            lam = best["row"].rpartition(", ")[2]
            texts.append(f"{name} {best['ours']['all']:.1f} at {lam} instead of {selected['ours']['all']:.1f}")
    return f"Had λ been chosen on the test split, which is no result: {'; '.join(texts)} (All)." if texts else ""


def _table(rows: Sequence[Row]) -> Table:
    compared = any(r["less_cb"] for r in rows)
    titles = ["row", "chosen", "n", "Many", "Medium", "Few", "All", "paper", "ours − paper"]
    lines = []
    for r in (r for r in rows if _shown(r)):
        cells = [MeanStd(r["ours"][g], r["ours_std"][g], r["n"]) for g in GROUPS]
        less = (
            [r.get("less_cb_of"), *(difference((r["less_cb"] or {}).get(g)) for g in ("few", "all"))]
            if compared
            else []
        )
        lines.append(
            Line(
                [
                    r["row"],
                    _selection(r["chosen"]),
                    str(r["n"]),
                    *cells,
                    paper_text(r["paper"]) or "–",
                    _apart(r),
                    *less,
                ]
            )
        )
    return Table([Column(title) for title in titles + ["less", "Few", "All"] * compared], lines)


def _shown(r: Row) -> bool:
    """Return true for a row of the page: of a curve only the points at LAMS_SHOWN."""
    _, curve, lam = r["row"].rpartition(", λ ")
    return not curve or not lam.replace(".", "").isdigit() or float(lam) in LAMS_SHOWN


def _caption(rows: Sequence[Row]) -> str:
    fitted = [r for r in rows if r["row"] != "CE (stage 1)"]
    views = ", ".join(dict.fromkeys(r["views"] for r in fitted))
    devices, n_of = ({r[key] for r in fitted} for key in ("device", "n_of"))
    seconds = max(r["time_s"] for r in fitted)
    several = " and ".join(sorted(n_of))
    return (
        f"Test accuracy in %, mean ± std; n: {several}. Fitted on views: {views}. Chosen on validation, test read afterwards. "
        f"{seconds:.0f} s in all on {', '.join(sorted(devices))}: `{rows[-1]['command']}`. Paper: many/medium/few/all."
    )


def _selection(values: Mapping[str, Any]) -> str:
    texts = [f"{'λ' if k == 'lam' else k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
    return ", ".join(texts) or "–"


def _apart(r: Row) -> str:
    return "/".join("–" if d is None else minus(f"{d:+.1f}") for d in (r["difference"] or {}).values()) or "–"


def _read(path: Path) -> list[Row]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); move it away and run the same command again") from error
