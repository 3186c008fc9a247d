"""The target of the norm term, and what other methods make of the lengths of class vectors: numbers for figures."""

from dataclasses import dataclass

import numpy as np

from pipeline.report.study import Backbone
from pipeline.results.head_id import HeadId

TAU = 0.7  # of τ-norm, as Kang et al. (ICLR 2020) choose it on ImageNet-LT
ROWS_TO_FIT = 2**19  # rows × epochs that MaxNorm may take for a picture: seconds on a CPU
PRODUCTS_TO_FIT = 2**37  # multiplications, too
EPOCHS = 10
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
class Other:
    """Lengths (C,) of class vectors of another method; told: where they come from."""

    name: str
    norms: np.ndarray
    told: str


def log_base(backbone: Backbone) -> str:
    """2 or e, of the logarithm in NC."""
    return backbone.results.get("settings", {}).get("log_base") or "2"


def number_of(backbone: Backbone) -> np.ndarray:
    """NC (C,) in the logarithm that the run took. [IWB paper, Eq. 3]"""
    counts = backbone.store.counts
    ratio = counts.sum() / (counts + 1)
    return np.log(ratio) if log_base(backbone) == "e" else np.log2(ratio)


def target_of(backbone: Backbone) -> Target | None:
    """Of the selected head. [IWB paper, Eq. 3–7]

    None where another target was used than number × vector hardness, or there are too many features for a figure.
    """
    chosen, rule = backbone.selected, backbone.results.get("settings", {})
    heads, weight, _ = backbone.heads
    mine = [i for i, head in enumerate(heads) if chosen.matches(head)]
    usual = {"hardness": "vector", "number": True, "divergence": "kl"}
    if chosen.method != "iwb" or not mine or any(rule.get(key, value) != value for key, value in usual.items()):
        return None
    directions = backbone.directions.get("train")
    if directions is None or chosen.lam is None:
        return None
    unit, vectors = directions.sums.sum(0) / backbone.store.valid("train").sum(), weight[mine[0]]
    hardness = (1 - vectors @ unit / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)) / 2
    return Target(number_of(backbone), hardness, chosen.lam)


def target_norms(backbone: Backbone, target: Target | None) -> np.ndarray | None:
    """(C,) the target shifted to the mean length of the selected head: the norm term fixes only differences."""
    norms = backbone.norms(backbone.selected)
    return None if target is None or norms is None else target.norms - target.norms.mean() + norms.mean()


def tau_norm(backbone: Backbone) -> Other:
    """Of τ-norm, at the run's own τ or the literature's, scaled to the mean length of the head it starts from."""
    before = np.linalg.norm(backbone.store.classifier[0].astype(np.float64), axis=1)
    norms, own = backbone.norms(TAU_NORM), _parameters(backbone, TAU_NORM)
    tau, told = own.get("tau", TAU), "chosen in this run"
    if norms is None:
        norms, tau, told = before ** (1 - TAU), TAU, "as Kang et al. chose it on ImageNet-LT, not in this run"
    norms = norms * (before.mean() / max(norms.mean(), 1e-30))
    told = f"τ-norm: τ = {tau:g}, {told}; drawn at the mean length of the head it starts from, as its scale decides nothing."
    return Other(f"τ-norm, τ = {tau:g}", norms, told)


def maxnorm(backbone: Backbone) -> Other | None:
    """Of MaxNorm: of the run's own head, or of one fitted here for the picture; None where fitting takes longer."""
    norms = backbone.norms(MAXNORM)
    if norms is not None:
        own = "".join(f", {name} {value:g}" for name, value in _parameters(backbone, MAXNORM).items())
        return Other("MaxNorm", norms, f"MaxNorm: this run's own head{own}.")
    rows, (classes, width) = backbone.store.rows("train"), backbone.store.classifier[0].shape
    if rows * EPOCHS > ROWS_TO_FIT or 3 * rows * EPOCHS * classes * width > PRODUCTS_TO_FIT:
        return None
    from pipeline.rebalance.engine.features import Features
    from pipeline.rebalance.engine.fit import Schedule
    from pipeline.rebalance.load import read_split
    from pipeline.rebalance.methods import RIVALS, Trained
    from pipeline.rebalance.methods.fit import Trial, fit

    rule, train = RIVALS["maxnorm"], read_split(backbone.store, "train")
    assert isinstance(rule, Trained)
    assert rule.lr is not None
    features = Features([train.features], train.labels, backbone.store.counts, *backbone.store.classifier)
    schedule = Schedule(epochs=EPOCHS, lr=rule.lr, batch_size=rule.batch, augmented=False)
    [[head]] = fit(rule, [Trial(rule.lr, rule.grid[0])], features, seeds=(0,), schedule=schedule)
    told = (
        f"MaxNorm: fitted for this picture on the clean view at the literature's settings (weight decay "
        f"{rule.grid[0]['weight_decay']:g}, learning rate {rule.lr:g}, batches of {rule.batch}, {EPOCHS} epochs, class-balanced "
        "loss, one batch order): not tuned, and in no table."
    )
    return Other("MaxNorm (fitted for this picture)", np.linalg.norm(head.arrays[0].astype(np.float64), axis=1), told)


def _parameters(backbone: Backbone, kind: HeadId) -> dict[str, float]:
    """The numbers that tuning chose for a method."""
    chosen = (c["parameters"] for c in backbone.results.get("chosen", ()) if c["method"] == kind.method)
    return {name: value for name, value in next(chosen, {}).items() if isinstance(value, int | float)}
