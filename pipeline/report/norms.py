"""The lengths of class vectors: by class before and after, beside other methods' and the target; and against class size."""

import numpy as np

from pipeline.report.chart import (
    BLACK,
    BLUE,
    GREEN,
    LIGHT,
    ORANGE,
    PURPLE,
    chart,
    class_axis,
    panel,
    panel_titles,
    rounded,
    trace,
)
from pipeline.report.drawing import AFTER, ALONE, BEFORE, TARGET, Drawing, class_table
from pipeline.report.norm_targets import log_base, maxnorm, number_of, target_norms, target_of, tau_norm
from pipeline.report.study import Row, Study

TAU_NORM: Row = {"color": GREEN, "dash": "dashdot", "symbol": "triangle-down"}
MAXNORM: Row = {"color": PURPLE, "dash": "longdash", "symbol": "diamond"}


def weight_norms(study: Study) -> Drawing:
    """Length of every class vector before and after and with other methods, largest class first, of the first backbone."""
    backbone, order = study.first, study.by_size
    selected, store = backbone.selected, backbone.store
    start_norms = np.linalg.norm(store.classifier[0].astype(np.float64), axis=1)
    aim = target_norms(backbone, target_of(backbone))
    rival_norms = {"tau-norm": tau_norm(backbone), "maxnorm": maxnorm(backbone)}
    rivals = {kind: rival for kind, rival in rival_norms.items() if rival and kind != selected.method}
    lines: list[tuple[str, np.ndarray | None, Row]] = [
        (study.start.removeprefix("the "), start_norms, BEFORE | {"symbol": "square", "fill": "white"}),
        (
            backbone.loss_only.name(),
            backbone.norms(backbone.loss_only),
            ALONE | {"symbol": "triangle-up", "fill": "white"},
        ),
        *((rival.name, rival.norms, TAU_NORM if kind == "tau-norm" else MAXNORM) for kind, rival in rivals.items()),
        (str(selected), backbone.norms(selected), AFTER),
        ("target P of the norm term, at the same mean", aim, TARGET),
    ]
    table: list[Row] = class_table(study)
    traces = [_images_ground(study)]
    for label, values, style in lines:
        if values is None:
            continue
        for row in table:
            row[label] = rounded(float(values[row["class"]]))
        traces.append(trace(label, range(1, len(order) + 1), values[order], style, of_classes=True))
    names = [store.class_names[c] for c in order]
    title = _length_title(start_norms[order], backbone.norms(selected), order, start=study.start)
    caption = f"{title}. Classes from largest to smallest{_first_backbone_note(study)}; mean over batch orders. "
    caption += "Grey: training images."
    if aim is not None:
        caption += " The norm term fixes only differences of lengths: its target is drawn at the mean of the heads."
    caption = " ".join([caption, *(rival.source for rival in rivals.values())])
    if rival_norms["maxnorm"] is None:
        caption += " MaxNorm is not drawn, because it is not among the heads of this run; `--method maxnorm` adds it."
    interactive = chart(
        traces,
        x=class_axis(names, study.counts),
        y={"title": "length of the class vector ‖W‖", "rangemode": "tozero", "overlaying": "y2", "tickmode": "auto"},
        yaxis2={"title": "training images per class", "type": "log", "dtick": 1, "side": "right", "showgrid": False},
    )
    heading = "Length of the class vectors, before and after"
    return Drawing("weight-norms", heading, caption, table, interactive, title, 5.2)


def _images_ground(study: Study) -> Row:
    """Training images per class as grey ground, on a second, logarithmic axis."""
    counts = study.counts[study.by_size]
    ground: Row = {"yaxis": "y2", "fill": "tozeroy", "fillcolor": LIGHT, "hoverinfo": "skip"}
    style: Row = {"color": LIGHT, "width": 0}
    return trace("training images", range(1, len(counts) + 1), counts, style, **ground)


def _length_title(start_norms: np.ndarray, selected_norms: np.ndarray | None, order: np.ndarray, *, start: str) -> str:
    tenth = max(1, len(order) // 10)
    text = "The smallest class against the largest"
    if tenth > 1:
        text = f"The {tenth} smallest classes against the {tenth} largest"
    whose = "their" if tenth > 1 else "its"
    when = f"after {start}" if start == "stage 1" else f"in {start}"
    text += f": {_ratio(start_norms[-tenth:], start_norms[:tenth])} of {whose} length {when}"
    if selected_norms is None:
        return text
    return text + f", {_ratio(selected_norms[order[-tenth:]], selected_norms[order[:tenth]])} rebalanced"


def _ratio(small: np.ndarray, large: np.ndarray) -> str:
    """Return the ratio of mean norms as text, or a dash for a head that starts from zeros."""
    return f"{small.mean() / large.mean():.2f}" if large.mean() else "–"


def norm_against_size(study: Study) -> Drawing:
    """Length of class vectors against the logarithm of class size, before and after; and the target over λ."""
    backbone = study.first
    size = np.log(study.counts.astype(np.float64))
    start_norms = np.linalg.norm(backbone.store.classifier[0].astype(np.float64), axis=1)
    norms = {study.start.removeprefix("the "): start_norms}
    if (selected_norms := backbone.norms(backbone.selected)) is not None:
        norms[str(backbone.selected)] = selected_norms
    number, target, base = number_of(backbone), target_of(backbone), log_base(backbone)
    aims = {"number coefficient NC": number}
    if target is not None:
        aims["NC · HC, the target P over λ"] = number * target.hardness
    looks: list[Row] = [
        {"color": BLACK, "symbol": "square", "fill": "white"},
        {"color": BLUE, "symbol": "circle"},
    ]
    target_styles: list[Row] = [
        {"color": GREEN, "symbol": "triangle-down", "fill": "white"},
        {"color": ORANGE, "symbol": "diamond"},
    ]
    ends = f"{number[study.by_size[0]]:.1f} for the largest class to {number[study.by_size[-1]]:.1f} for the smallest"
    titles = [_correlations_text(size, norms), f"NC goes from {ends}"]
    table = class_table(study)
    for row in table:
        c = row["class"]
        row |= {name: rounded(values[c]) for name, values in {"ln N": size, **norms, **aims}.items()}
    hardness = (
        ", HC the mean over the clean training features of (1 − cosine to the class vector) / 2" if target else ""
    )
    caption = (
        f"{titles[0]}. A point a class ({len(size):,}){_first_backbone_note(study)}; "
        "lines are least squares. r is Pearson's "
        "correlation of ln N with ‖W‖, ρ Spearman's; N are the class's training images. Right: what the target is made of, "
        f"P = λ · NC · HC; NC = log(ΣN / (N + 1)){hardness}."
    )
    correlations: list[Row] = [
        {"name": f"correlation of ln N with {name}", "pearson": rounded(pearson(size, values))}
        | {"spearman": rounded(spearman(size, values))}
        for name, values in norms.items()
    ]
    pairs = list(zip(norms.items(), looks, strict=False)), list(zip(aims.items(), target_styles, strict=False))
    title = "Length of the class vectors against class size"
    drawn = _size_chart(study, *pairs, base=base, titles=titles)
    return Drawing("norm-size", title, caption, correlations + table, drawn)


Styled = list[tuple[tuple[str, np.ndarray], Row]]


def _size_chart(study: Study, norms: Styled, aims: Styled, *, base: str, titles: list[str]) -> Row:
    """Both panels; hovering tells the class."""
    order, counts = study.by_size, study.counts[study.by_size]
    traces: list[Row] = []
    for (name, values), style in norms:
        traces.append(trace(name, counts, values[order], style | {"dash": "none"}, of_classes=True))
        if line := _fitted(np.log(counts), values[order]):
            line_style: Row = {"color": style["color"], "dash": "solid" if style["symbol"] == "circle" else "dot"}
            traces.append(trace(name, np.exp(line[0]), line[1], line_style, showlegend=False, hoverinfo="skip"))
    for (name, values), style in aims:
        traces.append(trace(name, counts, values[order], style | {"dash": "none"}, of_classes=True, **panel(2)))
    images: Row = {"title": "training images of the class", "type": "log"}
    return chart(
        traces,
        x=images,
        y="length of the class vector ‖W‖",
        xaxis2=images,
        yaxis2={"title": f"coefficient (logarithm to base {base})", "rangemode": "tozero"},
        columns=2,
        annotations=panel_titles(titles),
    )


def _fitted(size: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Both ends of the least squares line; None where all classes are of one size."""
    if np.ptp(size) == 0:
        return None
    slope, level = np.polyfit(size, values, 1)
    ends = np.array([size.min(), size.max()])
    return ends, level + slope * ends


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of two arrays; None where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / length if length > 1e-12 else None


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of the ranks of two arrays, equal values sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, position, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[position]


def _correlations_text(size: np.ndarray, norms: dict[str, np.ndarray]) -> str:
    """Both correlations, before → after."""
    parts = []
    for name, correlation in (("r", pearson), ("ρ", spearman)):
        coefficients = [correlation(size, values) for values in norms.values()]
        texts = ["–" if v is None else f"{v:+.2f}".replace("-", "−") for v in coefficients]
        parts.append(f"{name} {' → '.join(texts)}")
    return f"Length against size: {', '.join(parts)}"


def _first_backbone_note(study: Study) -> str:
    """Return which backbone the heads belong to, or nothing where there is only one."""
    several = len(study.backbones) > 1
    return f", first of {len(study.backbones)} backbones ({study.first.name})" if several else ""
