"""`pipeline bench heads`: the recommended head beside scikit-learn's balanced logistic regression and every method.

Everything is chosen on validation. Differences are paired: both heads classify the same test images.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache import Cache
from pipeline.bench.measure import Benchmark, Measure, machine
from pipeline.errors import ConfigError
from pipeline.method_names import start_name
from pipeline.metrics import group_means
from pipeline.rebalance.load import has_validation, open_store, read_split
from pipeline.rebalance.run import rebalance
from pipeline.results.differences import paired_difference, read_hits
from pipeline.results.head_id import BASELINE, HeadId, chosen_text
from pipeline.results.rebalance_result import RebalanceResult

C = tuple(m * 10.0**e for e in range(-4, 1) for m in (1, 3))  # of scikit-learn's logistic regression
SCIKIT_LEARN = "scikit-learn, balanced logistic regression"
LEAST, MEAN, REGRET = -0.3, 1.5, 1.0  # points above scikit-learn on a store and on average, and of regret on average

Say = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class MeasuredHead:
    """One head on the test split.

    Arguments:
        setting: the hyperparameters that validation chose, as text.
        rate: (M,) share of its seeds that classify each test image correctly.
    """

    name: str
    setting: str
    rate: np.ndarray


@dataclass(frozen=True, eq=False)
class MeasuredStore:
    """The heads of one store: the recommended one, scikit-learn's, and one of each method.

    Arguments:
        labels: (M,) of the test images.
        counts: (C,) training images.
        facts: what else the document says of the store.
    """

    name: str
    recommended: MeasuredHead
    scikit_learn: MeasuredHead
    methods: Sequence[MeasuredHead]
    labels: np.ndarray
    counts: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def accuracy(self, head: MeasuredHead) -> dict[str, float | None]:
        """Return all, many, medium and few in %."""
        total = np.bincount(self.labels, minlength=len(self.counts))
        correct = np.bincount(self.labels, head.rate, minlength=len(self.counts))
        return group_means(np.where(total > 0, correct / np.maximum(total, 1), np.nan), self.counts)

    def less(self, first: MeasuredHead, second: MeasuredHead) -> dict[str, Any]:
        """Return the paired difference of two heads in points, with its interval, for all and each group."""
        return paired_difference(first.rate, second.rate, self.labels, self.counts)

    def lead_over(self, head: MeasuredHead) -> dict[str, Any]:
        """Return what the recommended head has more than another, for all classes and the few-shot ones."""
        difference = self.less(self.recommended, head)
        return {group: difference[group] for group in ("all", "few")}

    @property
    def best(self) -> MeasuredHead:
        """The head with the highest accuracy on test, which nobody can choose without it."""
        heads = (self.recommended, self.scikit_learn, *self.methods)
        return max(heads, key=lambda head: self.accuracy(head)["all"] or 0.0)

    def measures(self) -> list[Measure]:
        """Return the accuracy of the recommended head with the table of all heads, its lead and its regret."""
        rows = [
            {"head": head.name, "setting": head.setting, **rounded(self.accuracy(head))}
            | {f"recommended less this, {group}": rounded(column) for group, column in self.lead_over(head).items()}
            for head in (self.recommended, self.scikit_learn, *self.methods)
        ]
        accuracy, lead = self.accuracy(self.recommended), self.less(self.recommended, self.scikit_learn)
        regret = self.less(self.best, self.recommended)
        return [
            Measure(
                f"{self.name}, recommended",
                rounded(accuracy["all"] or 0.0),
                "%",
                figures={"few": rounded(accuracy)["few"], "rows": rows, "test images": len(self.labels), **self.facts},
            ),
            Measure(
                f"{self.name}, recommended less scikit-learn",
                rounded(lead["all"]["difference"]),
                "pts",
                target=LEAST,
                figures=rounded(lead),
            ),
            Measure(
                f"{self.name}, regret",
                rounded(regret["all"]["difference"]),
                "pts",
                figures={"best on test": self.best.name, **rounded(regret)},
            ),
        ]


def bench_heads(
    stores: Sequence[Path | str],
    *,
    folder: Path | None = None,
    device: str = "auto",
    say: Say = lambda text: None,
) -> Benchmark:
    """Return the accuracy of the recommended head of each store, its lead over scikit-learn and its regret, and their means.

    The regret is the accuracy on test that the best row has more than the recommended one.

    Arguments:
        stores: with validation and test images.
        folder: of the temporary files, which are removed; by default the system's.
    Raises:
        ConfigError: no store, one named twice, or one without validation images.
        DataError: a store cannot be read or fitted on.
    """
    started = time.perf_counter()
    if not stores:
        raise ConfigError("no store is given: pipeline bench heads --stores A.zarr B.zarr")
    opened = {name: open_store(store)[0] for name, store in zip(names_of(stores), stores, strict=True)}
    for store in opened.values():
        if not has_validation(store):
            raise ConfigError(
                f"{store.path}: no validation images, on which scikit-learn's C is chosen; leave the store out"
            )
    measured = []
    with tempfile.TemporaryDirectory(prefix="bench-heads.", dir=folder) as place:
        for i, (name, store) in enumerate(opened.items()):
            say(f"{name}: rebalance")
            result = rebalance(store, out=Path(place) / str(i), device=device, report=say)
            say(f"{name}: scikit-learn")
            measured.append(measured_store(name, store, result))
    measures = [measure for store in measured for measure in store.measures()]
    return Benchmark(
        "heads",
        machine(),
        {"C": list(C), "stores": list(opened)},
        (*measures, *means(measured)),
        round(time.perf_counter() - started, 1),
    )


def names_of(stores: Sequence[Path | str]) -> list[str]:
    """Return a short name of each store: its path less what all of them share, and less `features.zarr` or `.zarr`.

    Raises: ConfigError: a store is named twice.
    """
    paths = [os.path.normpath(str(store)).removesuffix("/features.zarr").removesuffix(".zarr") for store in stores]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"a store is named twice: {', '.join(map(str, stores))}")
    shared = (
        os.path.commonpath([os.path.dirname(path) for path in paths]) if len({p[:1] == "/" for p in paths}) == 1 else ""
    )
    return [os.path.relpath(path, shared) if shared else path for path in paths]


def measured_store(name: str, store: Cache, result: RebalanceResult) -> MeasuredStore:
    """Return the heads of a result and scikit-learn's on the test images of their store."""
    hits = read_hits(Path(result.out) / "test_hits.safetensors")
    tuned: dict[HeadId, Mapping[str, Any]] = {}
    for row in (result.selected, *(result.chosen or result.candidates), BASELINE.to_dict()):
        tuned.setdefault(HeadId.of_row(row), row)
    recommended, *methods = (
        MeasuredHead(
            head.name(start_name(store.fingerprint)), chosen_text({"parameters": {}, **row}), hits.rate(head.to_dict())
        )
        for head, row in tuned.items()
    )
    started = time.perf_counter()
    scikit_learn = balanced_logistic_regression(store)
    seconds = {"rebalance, s": result.timing["total_s"], "scikit-learn, s": round(time.perf_counter() - started, 1)}
    facts = {
        "method": result.selected["method"],
        "network": result.network.get("network"),
        "width": store.width,
        **seconds,
    }
    return MeasuredStore(name, recommended, scikit_learn, methods, hits.labels, hits.counts, facts)


def balanced_logistic_regression(store: Cache) -> MeasuredHead:
    """Return scikit-learn's LogisticRegression(class_weight="balanced") on standardised features, its C chosen on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.preprocessing import StandardScaler

    train, val, test = (read_split(store, split) for split in ("train", "val", "test"))
    scaler = StandardScaler().fit(train.features.astype(np.float32))
    x, x_val, x_test = (scaler.transform(split.features.astype(np.float32)) for split in (train, val, test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a C that does not converge in max_iter iterations competes as it is
        models = [LogisticRegression(C=c, class_weight="balanced", max_iter=1000).fit(x, train.labels) for c in C]
        scores = [balanced_accuracy_score(val.labels, model.predict(x_val)) for model in models]
    best = int(np.argmax(scores))
    return MeasuredHead(
        SCIKIT_LEARN, f"C = {C[best]:g}", (models[best].predict(x_test) == test.labels).astype(np.float64)
    )


def means(stores: Sequence[MeasuredStore]) -> list[Measure]:
    """Return the means over stores of accuracy, lead and regret."""
    recommended = [store.accuracy(store.recommended)["all"] or 0.0 for store in stores]
    scikit_learn = [store.accuracy(store.scikit_learn)["all"] or 0.0 for store in stores]
    best = [store.accuracy(store.best)["all"] or 0.0 for store in stores]

    def mean(name: str, values: Sequence[float], unit: str, **claim: Any) -> Measure:
        by_store = {store.name: rounded(value) for store, value in zip(stores, values, strict=True)}
        return Measure(
            f"mean over {len(stores)} store(s), {name}",
            rounded(float(np.mean(values))),
            unit,
            figures=by_store,
            **claim,
        )

    return [
        mean("recommended", recommended, "%"),
        mean("scikit-learn", scikit_learn, "%"),
        mean("recommended less scikit-learn", np.subtract(recommended, scikit_learn).tolist(), "pts", target=MEAN),
        mean("regret", np.subtract(best, recommended).tolist(), "pts", target=REGRET, at_most=True),
    ]


def rounded(values: Any) -> Any:
    """Return a tree of dicts with its numbers rounded to two digits."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, 2) + 0.0 if isinstance(values, float) else values  # + 0 makes −0 a 0
