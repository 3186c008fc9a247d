"""The identity of a head: what was fitted, under which name it is printed, and its keys in JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.method_names import RENAMED

Value = float | str
LOSS_METHODS = ("ce", "cb")  # methods that are nothing but their loss


@dataclass(frozen=True)
class HeadId:
    """One head, or all heads that differ only in their seed.

    Arguments:
        method: a name of METHODS, or of a user's own method.
        loss: ce, cb or la where the method takes one of them; None where it has its own.
        lam: scale λ of the norm term; None where the method has none.
        lr: learning rate; None for the configuration's.
        values: names and values of hyperparameters that this method alone has.
        seed: of the batch order; None for all seeds together, or for a head that is not trained.
    """

    method: str
    loss: str | None = None
    lam: float | None = None
    lr: float | None = None
    values: tuple[tuple[str, Value], ...] = ()
    seed: int | None = None

    @property
    def row(self) -> "HeadId":
        """The row of a table that the head belongs to; a table has one head of each method, loss and λ."""
        return HeadId(self.method, self.loss, self.lam)

    @property
    def parameters(self) -> dict[str, Value]:
        """Learning rate and hyperparameters, JSON-ready."""
        return ({} if self.lr is None else {"lr": self.lr}) | dict(self.values)

    @property
    def loss_only(self) -> "HeadId":
        """The head of the same loss without the norm term."""
        without: dict[str | None, HeadId] = {"ce": HeadId("ce", "ce"), "la": HeadId("balanced-softmax")}
        return without.get(self.loss, HeadId("cb", "cb"))

    @property
    def without_lam(self) -> "HeadId":
        """All heads of the method, whatever their λ."""
        return replace(self, lam=None)

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return true where a row of results, or the entry of a file of heads, is of this head."""
        return HeadId.of_row(row) == self.row

    def name(self, start: str = "stage 1") -> str:
        """Return the printed name: `stage 1`, `CB loss only`, `equal norms (λ = 0)`, `iwb, λ = 0.15`.

        Arguments:
            start: name of the head that stage 2 starts from, see `start_name`.
        """
        if self.method == "baseline":
            return start
        if self.method in LOSS_METHODS:
            return f"{self.method.upper()} loss only"
        loss = f" with {self.loss.upper()} loss" if self.method == "iwb" and self.loss not in (None, "cb") else ""
        if self.method == "iwb" and self.lam == 0:
            return f"equal norms (λ = 0){loss}"
        return f"{self.method}{loss}" + ("" if self.lam is None else f", λ = {self.lam:g}")

    def __str__(self) -> str:
        seed = {} if self.seed is None else {"seed": self.seed}
        return ", ".join([self.name(), *parameter_texts(self.parameters | seed)])

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that name a row in every JSON, CSV and safetensors file."""
        return {"method": self.method, "loss": self.loss, "lam": self.lam}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "HeadId":
        """Read the head of a row, with `parameters` and `seed` where it has them; names of format 0.1 become today's."""
        parameters = dict(row.get("parameters") or {})
        lr, method = parameters.pop("lr", None), row["method"]
        values = tuple(parameters.items())
        return cls(RENAMED.get(method, method), row.get("loss"), row.get("lam"), lr, values, row.get("seed"))

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "HeadId":
        """Read method, loss and λ of a row, whatever else it holds."""
        return cls.from_dict(row).row


BASELINE = HeadId("baseline")
CB_ONLY = HeadId("cb", "cb")


def parameter_texts(parameters: Mapping[str, Any]) -> list[str]:
    """Return `lr = 0.005` for each parameter."""
    return [
        f"{key} = {value:g}" if isinstance(value, float) else f"{key} = {value}" for key, value in parameters.items()
    ]


def chosen_text(row: Mapping[str, Any]) -> str:
    """Return `λ = 0.15, lr = 0.005` of a tuned method's row, or a dash where there was nothing to choose."""
    lam = {} if row["lam"] is None else {"λ": row["lam"]}
    return ", ".join(parameter_texts(lam | row["parameters"])) or "–"
