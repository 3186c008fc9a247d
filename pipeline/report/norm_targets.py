"""The target of the norm term, and what other methods make of the lengths of class vectors: numbers for figures."""

from dataclasses import dataclass

import numpy as np

from pipeline.report.study import Backbone
from pipeline.results.head_id import HeadId

TAU = 0.7  # of τ-norm, as Kang et al. (ICLR 2020) choose it on ImageNet-LT
MAXNORM = HeadId("maxnorm")
TAU_NORM = HeadId("tau-norm")


@dataclass(frozen=True, eq=False)
class Target:
    """P = λ·NC·HC of a head, mean over the training features: number (C,) is NC, hardness (C,) the mean HC."""

    number: np.ndarray
    hardness: np.ndarray
    lam: float

    @property
    def norms(self) -> np.ndarray:
        return self.lam * self.number * self.hardness


@dataclass(frozen=True, eq=False)
class RivalNorms:
    """Norms (C,) of the class vectors of another method, and a sentence on their source."""

    name: str
    norms: np.ndarray
    source: str


def log_base(backbone: Backbone) -> str:
    """2 or e, of the logarithm in NC."""
    return backbone.results.get("settings", {}).get("log_base") or "2"


def number_of(backbone: Backbone) -> np.ndarray:
    """NC (C,) in the logarithm that the run took. [IWB paper, Eq. 3]"""
    counts = backbone.store.counts
    ratio = counts.sum() / (counts + 1)
    return np.log(ratio) if log_base(backbone) == "e" else np.log2(ratio)


def target_of(backbone: Backbone) -> Target | None:
    """Return the target of the selected head's norm term [IWB paper, Eq. 3–7].

    None where another target was used than number × vector hardness, or there are too many features for a figure.
    """
    selected, rule = backbone.selected, backbone.results.get("settings", {})
    heads, weight, _ = backbone.heads
    indices = [i for i, head in enumerate(heads) if selected.matches(head)]
    usual = {"hardness": "vector", "number": True, "divergence": "kl"}
    if selected.method != "iwb" or not indices or any(rule.get(key, value) != value for key, value in usual.items()):
        return None
    directions = backbone.directions.get("train")
    if directions is None or selected.lam is None:
        return None
    unit, vectors = directions.sums.sum(0) / backbone.store.valid("train").sum(), weight[indices[0]]
    hardness = (1 - vectors @ unit / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)) / 2
    return Target(number_of(backbone), hardness, selected.lam)


def target_norms(backbone: Backbone, target: Target | None) -> np.ndarray | None:
    """(C,) the target shifted to the mean length of the selected head: the norm term fixes only differences."""
    norms = backbone.norms(backbone.selected)
    return None if target is None or norms is None else target.norms - target.norms.mean() + norms.mean()


def tau_norm(backbone: Backbone) -> RivalNorms:
    """Return the norms of τ-norm at the run's own τ or the literature's, at the mean norm of the head it starts from."""
    start_norms = np.linalg.norm(backbone.store.classifier[0].astype(np.float64), axis=1)
    norms, parameters = backbone.norms(TAU_NORM), _parameters(backbone, TAU_NORM)
    tau, source = parameters.get("tau", TAU), "chosen in this run"
    if norms is None:
        norms, tau, source = start_norms ** (1 - TAU), TAU, "as Kang et al. chose it on ImageNet-LT, not in this run"
    norms = norms * (start_norms.mean() / max(norms.mean(), 1e-30))
    source = f"τ-norm: τ = {tau:g}, {source}; drawn at the mean length of the head it starts from, as its scale decides nothing."
    return RivalNorms(f"τ-norm, τ = {tau:g}", norms, source)


def maxnorm(backbone: Backbone) -> RivalNorms | None:
    """Return the class-vector norms of the MaxNorm head of this run, or None where it has none."""
    norms = backbone.norms(MAXNORM)
    if norms is None:
        return None
    parameters = "".join(f", {name} {value:g}" for name, value in _parameters(backbone, MAXNORM).items())
    return RivalNorms("MaxNorm", norms, f"MaxNorm: this run's own head{parameters}.")


def _parameters(backbone: Backbone, kind: HeadId) -> dict[str, float]:
    """The numbers that tuning chose for a method."""
    tuned = (c["parameters"] for c in backbone.results.get("chosen", ()) if c["method"] == kind.method)
    return {name: value for name, value in next(tuned, {}).items() if isinstance(value, int | float)}
