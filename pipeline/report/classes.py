"""Class by class in the page: what hovering over a class tells, and a table to sort, filter and leaf through."""

from collections.abc import Sequence
from html import escape

import numpy as np

from pipeline.longtail import GROUPS, class_groups, group_index
from pipeline.report import assets
from pipeline.report.study import Row, Study

COLUMNS = ("Class", "Training images", "Group", "Test images", "Before", "After", "Change")


def class_data(study: Study, table: Sequence[Row] | None, key: str) -> str:
    """Return the script element with the data of every class, largest first.

    Arguments:
        table: the rows of the figure `class_change`, or None where it was not drawn.
    """
    counts, store = study.counts, study.first.store
    group = np.array(GROUPS)[group_index(counts)]
    tested = np.bincount(store.labels("test")[store.valid("test")], minlength=len(counts))
    start = study.start.removeprefix("the ")
    rows = []
    for i, c in enumerate(study.by_size.tolist()):
        row = table[i] if table else {}
        accuracy = [row.get(column) for column in (start, "selected", "change")]
        rows.append([store.class_names[c], int(counts[c]), str(group[c]), *accuracy, int(tested[c])])
    return assets.data(f"classes-{key}", {"rows": rows})


def class_table(study: Study, key: str) -> str:
    """The table, empty until the page's script fills it."""
    present = [g for g, mask in class_groups(study.counts).items() if mask.any()]
    options = "".join(f"<option>{g}</option>" for g in present)
    head = "".join(f"<th scope=col><button type=button>{name}</button></th>" for name in COLUMNS)
    start, selected = escape(study.start.removeprefix("the ")), "the selected head"
    return (
        f'<div class=classes data-classes="classes-{key}" hidden><h3>Every class</h3>'
        f"<div class=choose><label>Name <input type=search size=18></label>"
        f"<label>Group <select><option value=''>all</option>{options}</select></label>"
        "<span class=found role=status></span></div>"
        f"<div class=scroll><table class='main sortable'><thead><tr>{head}</tr></thead><tbody></tbody></table></div>"
        "<div class='choose pager'><button type=button>◀ before</button><span></span>"
        "<button type=button>next ▶</button></div>"
        f"<p class=note>Test accuracy in %: before is {start}, after {selected}. Click on a heading to sort.</p></div>"
        "<p class=note>The table of all classes needs JavaScript; its numbers are in the CSV.</p>"
    )
