"""The shape of every JSON document and of the metadata of every safetensors file, checked when one is read."""

import contextlib
import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from pipeline.errors import DataError
from pipeline.method_names import RENAMED
from pipeline.paths import read_document
from pipeline.results.files import FORMAT

CONTROL = re.compile(r"[\x7f-\x9f]|\\u00(?:0[0-8bcef]|1[0-9a-f]|7f|[89][0-9a-f])", re.IGNORECASE)  # as JSON has them
Number = Annotated[float, Field(allow_inf_nan=False)]


class Shape(BaseModel):
    """Fields that readers rely on; a document may hold others."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, defer_build=True)


class RecordShape(Shape):
    """The record of an artefact's making, as far as anything is read from it."""

    argv: list[str] = []
    config: dict[str, Any] | None = None
    network: dict[str, Any] | None = None


class HeadShape(Shape):
    method: str
    loss: str | None = None
    lam: Number | None = None


class HeadEntry(HeadShape):
    """An entry of heads.safetensors or test_hits.safetensors."""

    seed: int | None = None


class HeadsShape(Shape):
    """The metadata of heads.safetensors."""

    heads: Annotated[list[HeadEntry], Field(min_length=1)]
    gated: list[HeadEntry] = []
    class_names: list[str] | None = None
    store_digest: str | None = None
    encoder: str | None = None


class MeasuredShape(Shape):
    """Percentages; None for an empty group."""

    all: Number | None = None
    many: Number | None = None
    medium: Number | None = None
    few: Number | None = None
    ece: Number | None = None
    all_std: Number | None = None
    many_std: Number | None = None
    medium_std: Number | None = None
    few_std: Number | None = None
    ece_std: Number | None = None


class RowShape(HeadShape, MeasuredShape):
    seed: int | None = None
    split: str


class SelectedShape(HeadShape, MeasuredShape):
    chosen_on: str | None = None
    n: int


class TunedShape(HeadShape):
    parameters: dict[str, Any]
    trials: int
    score: Number | None
    border: list[str]


class ResultsShape(Shape):
    """results.json"""

    store: str | list[str]
    digest: str | None = None
    heads_digest: str | None = None
    baseline: MeasuredShape
    selected: SelectedShape
    results: list[RowShape]
    candidates: list[HeadShape] = []
    within_one_se: list[HeadShape] = []
    chosen: list[TunedShape] = []
    notes: list[str] = []
    timing: dict[str, Number] = {}
    network: dict[str, Any] = {}
    settings: dict[str, Any] = {}


class ChoiceShape(Shape):
    """selection.json of a run"""

    selected: HeadShape
    score: Number | None = None
    standard_error: Number | None = None
    within_one_se: list[HeadShape]


class VariantChoice(HeadShape):
    name: str
    score: Number | None = None
    standard_error: Number | None = None
    within_one_se: list[HeadShape]


class VariantChoices(Shape):
    """selection.json of an ablation"""

    variants: list[VariantChoice]


class VariantShape(HeadShape, MeasuredShape):
    name: str
    n: int
    chosen_on: str | None
    paper: dict[str, Number]
    less_alone: dict[str, dict[str, Number] | None] | None


class VariantRow(RowShape):
    variant: str


class TimingShape(Shape):
    heads: int
    fit_s: Number


class AblationShape(Shape):
    """ablation.json"""

    name: str
    store: str
    digest: str
    fingerprint: dict[str, Any]
    network: dict[str, Any]
    timing: TimingShape
    against: str | None
    bootstrap: dict[str, Any]
    rows: Annotated[list[VariantShape], Field(min_length=1)]
    heads: list[VariantRow]


class PieceShape(Shape):
    """The metadata of a finished piece of a rebalance that was stopped"""

    key: str
    heads: list[HeadEntry]
    diverged: list[HeadShape]
    ece: dict[str, list[Number]]
    regressions: list[list[str | Number]]
    fitted: NonNegativeInt
    fit_seconds: Number
    facts: dict[str, Any]


class SweepShape(Shape):
    """tries.json"""

    seeds: list[int]
    tries: list[dict[str, Any]]
    selected: dict[str, Any]
    notes: list[str]


class StageShape(Shape):
    seconds: Number


class RunShape(Shape):
    """run.json"""

    argv: list[str]
    command: str | None = None
    config: dict[str, Any] | None = None
    stages: dict[str, StageShape] = {}


class MeasureShape(Shape):
    name: str
    value: Number
    unit: str
    target: Number | None
    at_most: bool
    met: bool | None


class BenchShape(Shape):
    """A result of `pipeline bench`"""

    name: str
    measures: list[MeasureShape]
    machine: dict[str, Any]
    seconds: Number


class ExportShape(Shape):
    """config.json of an exported model"""

    architecture: str
    weights: Annotated[str, Field(pattern=r"^[\w.-]+$")]  # a file in the folder, never elsewhere
    model_args: dict[str, Any] = {}
    num_classes: PositiveInt
    num_features: PositiveInt
    class_names: list[str]
    counts: list[NonNegativeInt]
    head: HeadShape
    transform: dict[str, Any]
    provenance: RecordShape = RecordShape()

    @model_validator(mode="after")
    def _one_of_each_class(self) -> Self:
        for name in ("class_names", "counts"):
            if len(getattr(self, name)) != self.num_classes:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.num_classes} classes")
        return self


class EpochShape(Shape):
    """A line of metrics.jsonl"""

    epoch: int
    loss: Number
    train_accuracy: Number | None = None
    val_accuracy: Number | None = None


class ClassLine(BaseModel):
    """A line of per_class.csv, where every value is text."""

    model_config = ConfigDict(defer_build=True)
    method: str
    loss: str | None = None
    lam: Number | None = None
    split: str
    number: NonNegativeInt = Field(alias="class")
    correct: NonNegativeInt
    total: NonNegativeInt


def read_json(path: Path) -> Any:
    """Return the JSON document in a file; DataError where it is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({getattr(error, 'strerror', None) or error})") from error
    if CONTROL.search(text):
        raise DataError(f"{path}: holds control characters, which a terminal would obey; it is not of this program")
    return document


def checked(path: Path, document: Any, shape: Any, advice: str) -> Any:
    """Return the document, with methods of format 0.1 under their names of today.

    Arguments:
        shape: a subclass of Shape, or a type made of them such as list[HeadEntry].
        advice: the command to type next.
    Raises: DataError: the file and the field that is missing or wrong.
    """
    header = document.get("header") if isinstance(document, dict) else None
    if isinstance(header, dict) and isinstance(version := header.get("format"), int) and version > FORMAT:
        raise DataError(f"{path}: header.format: {version} is of a newer version; update with pip install -U")
    try:
        TypeAdapter(shape).validate_python(document)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"])) or "the document"
        reason = problem["msg"].removeprefix("Value error, ")
        raise DataError(f"{path}: {field}: {reason[0].lower()}{reason[1:]}; {advice}") from error
    return _renamed(document)


def read_results(path: Path) -> dict[str, Any]:
    """Return the document that `pipeline rebalance` wrote; DataError where it is damaged or something else."""
    again = "run `pipeline rebalance` again"
    document = checked(path, read_json(path), ResultsShape, again)
    return read_document(document, path.parent)


def read_ablation(path: Path) -> dict[str, Any]:
    """Return the document of an ablation; DataError where it is damaged or something else."""
    document = checked(path, read_json(path), AblationShape, "run `pipeline rebalance --config` again")
    return read_document(document, path.parent)


def read_choice(path: Path) -> dict[str, Any]:
    """Return selection.json of a run, or of an ablation, whose `variants` have an entry each."""
    document = read_json(path)
    if isinstance(document, list):  # of an ablation, in format 0.1
        document = {"variants": document}
    shape = VariantChoices if isinstance(document, dict) and "variants" in document else ChoiceShape
    return checked(path, document, shape, "run `pipeline rebalance` again")


def read_sweep(path: Path) -> dict[str, Any]:
    """Return tries.json; DataError where it is damaged or something else."""
    return checked(path, read_json(path), SweepShape, "run `pipeline train-backbone --try …` again")


def read_export(path: Path) -> dict[str, Any]:
    """Return config.json of an exported model; DataError where it is damaged or something else."""
    return checked(path, read_json(path), ExportShape, "run `pipeline export` again")


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, none where there is no file; a last one that a kill cut off is left out."""
    if not path.is_file():
        return []
    try:
        *lines, last = path.read_text(encoding="utf-8").splitlines() or [""]
        with contextlib.suppress(ValueError):
            lines += [last] * bool(json.loads(last))
        epochs = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: a line is not JSON ({error}); train again with --overwrite") from error
    return checked(path, epochs, list[EpochShape], "train again with --overwrite")


def read_bench(path: Path) -> dict[str, Any]:
    """Return a result of `pipeline bench`; DataError where it is damaged or something else."""
    return checked(path, read_json(path), BenchShape, "run `pipeline bench` again")


def read_per_class(path: Path, *, classes: int) -> list[dict[str, Any]]:
    """Return the lines of per_class.csv, none where there is no file; DataError names the line and field that is wrong.

    Arguments:
        classes: the number of classes that the lines may name.
    """
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = [{key: text or None for key, text in line.items()} for line in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error, AttributeError) as error:
        raise DataError(f"{path}: not readable ({error}); run `pipeline rebalance` again") from error
    checked(path, lines, list[ClassLine], "run `pipeline rebalance` again")
    rows = [line.model_dump(by_alias=True) for line in TypeAdapter(list[ClassLine]).validate_python(lines)]
    for number, row in enumerate(rows, start=2):
        if row["class"] >= classes or row["correct"] > row["total"]:
            raise DataError(f"{path}, line {number}: not of {classes} classes; run `pipeline rebalance` again")
    return rows


def read_record(path: Path) -> dict[str, Any]:
    """Return the run.json that says what made the files beside it, without its header; empty where there is none.

    Raises: DataError: the file and the field that is damaged.
    """
    if not path.is_file():
        return {}
    document = checked(path, read_json(path), RunShape, "remove it, or make the files beside it again")
    return {key: value for key, value in document.items() if key != "header"}


def _renamed(value: Any) -> Any:
    """Give methods that were renamed since format 0.1 their names of today, wherever a row names one."""
    if isinstance(value, Mapping):
        method = value.get("method")
        row = {key: _renamed(item) if isinstance(item, dict | list) else item for key, item in value.items()}
        return row | {"method": RENAMED[method]} if isinstance(method, str) and method in RENAMED else row
    return [_renamed(item) for item in value] if isinstance(value, list) else value
