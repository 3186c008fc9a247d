"""Settings of stage 2."""

import math
import re
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.section import Section, explanations


class Variant(Section):
    """One row of an ablation."""

    name: str = Field(min_length=1, description="Name of the row.")
    set: dict[str, Any] = Field({}, description="Settings of stage 2 in which the variant differs.")
    paper: dict[Literal["many", "medium", "few", "all"], float] = Field(
        {}, description="Accuracy by group that the paper reports for it, in %."
    )


class RebalanceConfig(Section):
    """Stage 2: the heads that are fitted on the cached features (docs/method.md, docs/methods.md)."""

    method: tuple[str, ...] = Field(
        ("recommended",),
        description="Methods to fit: names of docs/methods.md, `recommended`, `all`, Python files that define one, or files of "
        "a head. Where λ alone is given, iwb.",
    )
    lam: str = Field(
        "auto",
        description="Values of λ, the scale of the target P: 0.05, or 0.01,0.05,0.1, or 0.01:0.5:log:32, or auto.",
    )
    loss: Literal["cb", "ce", "la"] = Field(
        "cb", description="Loss beside the norm term: class-balanced, cross-entropy, or logit-adjusted."
    )
    formulation: Literal["mixed", "paper", "code"] = Field(
        "mixed", description="The paper's formulas, its released code's, or the paper's norm term with the code's loss."
    )
    cb: Literal["softmax", "bce"] | None = Field(
        None, description="Form of the class-balanced loss; null takes the formulation's."
    )
    beta: float = Field(0.9999, ge=0, lt=1, description="β of the class-balanced loss.")
    log_base: Literal["2", "e"] | None = Field(
        None, description="Base of the logarithm in NC, the class-wise part of P; null takes the formulation's."
    )
    divergence: Literal["kl", "mse"] = Field("kl", description="Measure of the distance of the norms from P.")
    direction: Literal["norms-to-target", "target-to-norms"] | None = Field(
        None, description="Direction of the divergence, KL(norms ‖ P) or KL(P ‖ norms); null takes the formulation's."
    )
    kl_weight: float | Literal["batch"] | None = Field(
        None, description="Weight of the norm term: a number, or `batch`, the batch size; null takes the formulation's."
    )
    detach_target: bool | None = Field(
        None, description="Hold P fixed when gradients are computed; null takes the formulation's."
    )
    hardness: Literal["vector", "scalar", "none"] = Field(
        "vector", description="Form of HC, the sample-wise part of P."
    )
    number: bool = Field(True, description="Let P have NC, its class-wise part, which counts the training images.")
    views: Literal["augmented", "clean"] = Field(
        "augmented", description="Views of the training images to fit on: all augmented ones in turn, or the clean one."
    )
    seeds: tuple[int, ...] = Field(
        (0, 1, 2), description="Seeds of the batch orders; every head is fitted once for each."
    )
    epochs: int = Field(10, ge=1, description="Passes over the features.")
    lr: float = Field(0.005, gt=0, description="Learning rate of SGD at its highest; it falls on a cosine to 0.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the class vectors.")
    batch_size: int = Field(64, ge=1, description="Features per step.")
    select_on: Literal["val", "kfold"] = Field(
        "val",
        description="Data that λ and methods are chosen on: the validation split, or folds of the training split.",
    )
    tune: bool = Field(False, description="Tune ce, cb and iwb too, as all other methods always are.")
    trials: int = Field(20, ge=1, description="Most settings that are tried for each trained method that is tuned.")
    budget: str = Field(
        "2h",
        description="Time that tuning may take, such as 10m or 2h, or none; where the estimate is longer, settings are first "
        "compared on parts of the training images.",
    )
    sampling: Literal["instance", "class-balanced"] | None = Field(
        None, description="Sampling of training features; null takes the method's."
    )
    weighting: Literal["none", "class-balanced"] | None = Field(
        None, description="Class weights in the loss; null takes the method's."
    )
    force_double_balancing: bool = Field(
        False, description="Allow two remedies for class sizes in one method, which is refused otherwise."
    )
    memory: str = Field(
        "8GiB", description="Memory that training features may take; a larger view is streamed from the store."
    )
    spread: Literal["rows", "heads"] = Field(
        "rows", description="Work that several processes share: the rows of each batch, or the heads."
    )
    variants: tuple[Variant, ...] = Field((), description="Rows of an ablation; without any, nothing is compared.")

    @property
    def memory_bytes(self) -> int:
        """Bytes that training features may take; a view that is larger is streamed from the store."""
        return parse_bytes(self.memory)

    @model_validator(mode="before")
    @classmethod
    def _lam_alone_means_iwb(cls, values: Any) -> Any:
        """Take `iwb` as the method where λ is given and no method."""
        if isinstance(values, dict) and values.get("lam") is not None and "method" not in values:
            return values | {"method": ("iwb",)}
        return values

    @property
    def budget_seconds(self) -> float:
        """Seconds that tuning may take, infinite without a budget."""
        return parse_duration(self.budget)

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_text(cls, value: Any) -> Any:
        parse_duration(str(value))
        return str(value)

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_text(cls, value: Any) -> Any:
        parse_bytes(str(value))
        return str(value)

    @field_validator("lam", mode="before")
    @classmethod
    def _lam_text(cls, value: Any) -> Any:
        """Return the text that one would type after --lam, of a number or list of YAML too."""
        if isinstance(value, list | tuple):
            return ",".join(str(v) for v in value)
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("method", "seeds", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Return a list, also of one value and of the text that one would type after --seeds."""
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("log_base", mode="before")
    @classmethod
    def _log_base_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("kl_weight")
    @classmethod
    def _kl_weight_not_negative(cls, value: Any) -> Any:
        if isinstance(value, float) and value < 0:
            raise ValueError("must be 0 or more")
        return value

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value) or min(value) < 0:
            raise ValueError("needs one or more different seeds, each 0 or more")
        return value

    @model_validator(mode="after")
    def _variants_are_valid(self):
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants need different names")
        for variant in self.variants:
            self.with_variant(variant)
        return self

    def with_variant(self, variant: Variant) -> "RebalanceConfig":
        """Return these settings with those of a variant in their place; raise ValueError where one of them is wrong."""
        common = self.model_dump(exclude_unset=True, exclude={"variants"})
        try:
            return RebalanceConfig.model_validate(common | variant.set)
        except ValidationError as error:
            raise ValueError("; ".join(explanations(error, f"variant {variant.name}", RebalanceConfig))) from error


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as 90s, 10m or 2h, infinity of `none`; raise ValueError where it is no duration."""
    if text.strip().lower() == "none":
        return math.inf
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh])\s*", text)
    if not match or float(match[1]) == 0:
        raise ValueError("expected a duration such as 90s, 10m or 2h, or none")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def parse_bytes(text: str) -> int:
    """Return the bytes of a text such as 8GiB, 500 MB or 1073741824; raise ValueError where it is no size."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kKMGT])(i?))?B?\s*", text)
    if not match or float(match[1]) == 0:
        raise ValueError("expected a size such as 8GiB or 500MB")
    power = " kMGT".index((match[2] or " ").replace("K", "k"))
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
