"""Configuration: typed, frozen, read once from YAML; an unknown key is an error that names the nearest known one."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.shipped import shipped_configs

DEFAULT = "digits-lt"
RESERVED_MODEL_ARGS = {
    *(
        "num_classes",
        "in_chans",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
    ),
    *("pretrained_strict", "scriptable", "exportable", "no_jit", "features_only", "width"),
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Which images, how they are split and made long-tailed (METHODS: data and protocol)."""

    source: Literal["digits", "cifar10", "cifar100", "npz", "folder", "list", "huggingface"]
    path: Path | None = None
    hub: str | None = None
    hub_config: str | None = None
    download: bool = False
    train_list: Path | None = None
    val_list: Path | None = None
    test_list: Path | None = None
    class_names: Path | None = None
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    subset: Literal["exponential", "step", "none"] = "none"
    imbalance_factor: float = Field(100.0, ge=1)
    max_per_class: int | None = Field(None, ge=1)
    val_per_class: int = Field(20, ge=0)
    test_per_class: int = Field(20, ge=0)
    subset_seed: int = Field(0, ge=0)
    image_size: int | None = Field(None, ge=1)
    augment: Literal["crop-flip", "crop", "resized-crop-flip", "none"] | None = None
    policy: Literal["none", "autoaugment-cifar10", "autoaugment-imagenet", "randaugment"] = "none"
    rand_n: int = Field(2, ge=1)
    rand_m: int = Field(9, ge=0, le=30)
    cutout: int = Field(0, ge=0)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    workers: int = Field(default_factory=lambda: min(8, os.cpu_count() or 1), ge=0)

    @model_validator(mode="after")
    def _complete(self):
        if self.source in ("npz", "folder") and self.path is None:
            raise ValueError(f"source {self.source} needs data.path")
        if self.source == "list" and self.train_list is None:
            raise ValueError("source list needs data.train_list (lines `relative/path label`)")
        only_there = ("hub", "hub_config", "train_split", "val_split", "test_split", "image_column", "label_column")
        strange = [key for key in only_there if getattr(self, key) is not None]
        if self.source == "huggingface" and (self.path is None) == (self.hub is None):
            raise ValueError("source huggingface needs either data.path (files) or data.hub (a name on the Hub)")
        if self.source != "huggingface" and strange:
            raise ValueError(f"data.{strange[0]} is for source huggingface, not for {self.source}")
        return self


class WeakenConfig(Section):
    """Major feature weakening of stage 1, a reconstruction from the abstract of Procrustean training (docs/weakening.md).

    strength 0 is off; group: rows of the batch that are mixed among themselves, by mixup too; at: `features`, or the
    module at whose input they are mixed.
    """

    strength: float = Field(0.0, ge=0, le=1)
    gamma: float = Field(1.0, gt=0)
    group: int = Field(32, ge=1)
    at: str = "features"
    detach_partner: bool = False


class BackboneConfig(Section):
    """Stage 1: the network and its training (docs/training.md).

    model_args: what timm.create_model is given beside the name, such as img_size of a vision transformer.
    encoder: a pretrained network that is taken as it is; frozen: nothing is trained (docs/pretrained.md).
    """

    model: str = "cifar_resnet32"
    model_args: dict[str, Any] | None = None
    frozen: bool = False
    encoder: str | None = None
    width: float = Field(1.0, gt=0)
    pretrained: bool = False
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(64, ge=2)
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-3, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accumulate: int = Field(1, ge=1)
    sync_batch_norm: bool = False
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    weaken: WeakenConfig = WeakenConfig()
    loss: Literal["ce", "focal", "cb", "grw", "ldam-drw", "balanced-softmax"] = "ce"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    focal_gamma: float = Field(2.0, ge=0)
    cb_beta: float = Field(0.9999, ge=0, lt=1)
    grw_rho: float = Field(1.2, ge=0)
    ldam_margin: float = Field(0.5, ge=0)
    drw_start: float = Field(0.8, ge=0, le=1)
    sampler: Literal["instance", "class-balanced", "square-root"] = "instance"
    force_double_balancing: bool = False
    ema: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    validate_every: int = Field(1, ge=1)
    diagnose_every: int = Field(0, ge=0)
    diagnose_per_class: int = Field(20, ge=1)
    save_every_minutes: float = Field(10.0, gt=0)
    tensorboard: bool = False

    @model_validator(mode="before")
    @classmethod
    def _encoder_is_frozen(cls, tree: Any) -> Any:
        """A tree that names an encoder says frozen: true by that."""
        return {"frozen": True} | tree if isinstance(tree, dict) and tree.get("encoder") else tree

    @model_validator(mode="after")
    def _frozen_names_an_encoder(self):
        if self.frozen and not self.encoder:
            raise ValueError("frozen: name the pretrained network with encoder, such as encoder: lite0")
        if self.encoder and not self.frozen:
            raise ValueError(
                "encoder takes a network as it is: leave frozen away, or train with model and pretrained: true"
            )
        return self

    @field_validator("model_args")
    @classmethod
    def _model_args_build_a_network(cls, value: Any) -> Any:
        """None of those by which timm would fetch or load weights, or that are said elsewhere."""
        if other := sorted(RESERVED_MODEL_ARGS & set(value or {})):
            raise ValueError(f"{', '.join(other)}: not an argument of the network's shape")
        return value or None

    @model_validator(mode="after")
    def _balances_once(self):
        if self.loss == "focal" and self.label_smoothing:
            raise ValueError("label_smoothing is not defined for loss focal; leave one away")
        how = {"balanced-softmax": "a loss with the class prior in it", "cb": "class weights", "grw": "class weights"}
        how["ldam-drw"] = "a loss with class margins and class weights"
        if self.loss in how and self.sampler != "instance" and not self.force_double_balancing:
            raise ValueError(
                f"loss {self.loss}: {how[self.loss]} and {self.sampler} sampling together make up for the class sizes twice; "
                "leave one away, or insist with backbone.force_double_balancing=true"
            )
        return self

    @model_validator(mode="after")
    def _no_gradient_is_overwritten(self):
        if self.accumulate > 1 and self.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"accumulate {self.accumulate}: compile {self.compile} replays CUDA graphs, which write over the gradients "
                "that are added up; take compile default or none, or accumulate 1"
            )
        return self

    @model_validator(mode="after")
    def _mixed_once(self):
        if self.mixup and self.weaken.strength:
            raise ValueError("mixup and weaken.strength both mix images of a batch; set one of them to 0")
        return self


class DumpConfig(Section):
    """The feature store: how many views, in which precision.

    on_error: whether an image that cannot be read ends the work or is left out, in training too.
    """

    views: int = Field(11, ge=1)
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    batch_size: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    on_error: Literal["fail", "skip"] = "fail"


class Variant(Section):
    """One row of an ablation: its name, the settings that differ, and what the paper reports for it, in %."""

    name: str = Field(min_length=1)
    set: dict[str, Any] = {}
    paper: dict[Literal["many", "medium", "few", "all"], float] = {}


class RebalanceConfig(Section):
    """Stage 2: which heads are fitted on the cached features (METHODS §1); None = what the formulation says."""

    method: tuple[str, ...] = ("iwb",)
    lam: str = "auto"
    loss: Literal["cb", "ce", "la"] = "cb"
    formulation: Literal["mixed", "paper", "code"] = "mixed"
    cb: Literal["softmax", "bce"] | None = None
    beta: float = Field(0.9999, ge=0, lt=1)
    log_base: Literal["2", "e"] | None = None
    divergence: Literal["kl", "mse"] = "kl"
    direction: Literal["norms-to-target", "target-to-norms"] | None = None
    kl_weight: float | Literal["batch"] | None = None
    detach_target: bool | None = None
    hardness: Literal["vector", "scalar", "none"] = "vector"
    number: bool = True
    views: Literal["augmented", "clean"] = "augmented"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = Field(10, ge=1)
    lr: float = Field(0.005, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(64, ge=1)
    select_on: Literal["val", "kfold"] = "val"
    tune: bool = False
    trials: int = Field(12, ge=1)
    sampling: Literal["instance", "class-balanced"] | None = None
    weighting: Literal["none", "class-balanced"] | None = None
    force_double_balancing: bool = False
    memory: str = "8GiB"
    spread: Literal["rows", "heads"] = "rows"
    variants: tuple[Variant, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """What training features may take; a view that is larger is streamed from the store."""
        return parse_bytes(self.memory)

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_text(cls, value: Any) -> Any:
        parse_bytes(str(value))
        return str(value)

    @field_validator("lam", mode="before")
    @classmethod
    def _lam_text(cls, value: Any) -> Any:
        """YAML numbers and lists are taken as the text one would type after --lam."""
        if isinstance(value, list | tuple):
            return ",".join(str(v) for v in value)
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("method", "seeds", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One value, or the text one would type after --seeds, is a list too."""
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
    def _variants_mean_something(self):
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants need different names")
        for variant in self.variants:
            self.with_variant(variant)
        return self

    def with_variant(self, variant: Variant) -> "RebalanceConfig":
        """These settings with a variant's laid over them; ValueError names what is wrong with it."""
        common = self.model_dump(exclude_unset=True, exclude={"variants"})
        try:
            return RebalanceConfig.model_validate(common | variant.set)
        except ValidationError as error:
            told = [_explain(f"variant {variant.name}", e, RebalanceConfig) for e in error.errors()]
            raise ValueError("; ".join(told)) from error


class Config(Section):
    """One runnable experiment: what `pipeline run` does from images to report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    dump: DumpConfig = DumpConfig()
    rebalance: RebalanceConfig = RebalanceConfig()

    @model_validator(mode="before")
    @classmethod
    def _encodes_once(cls, tree: Any) -> Any:
        """Return the tree with one view, the clean one, where an encoder is taken as it is and dump.views is not set."""
        backbone, dump = (tree.get(key) for key in ("backbone", "dump")) if isinstance(tree, dict) else (None, None)
        frozen = isinstance(backbone, dict) and backbone.get("encoder")
        return tree | {"dump": {"views": 1} | (dump or {})} if frozen and isinstance(dump or {}, dict) else tree

    @property
    def run_dir(self) -> Path:
        return Path("runs") / self.name


class RebalanceOnly(Section):
    """What may be said of a store that nobody knows the images of."""

    name: str = "rebalance"
    rebalance: RebalanceConfig = RebalanceConfig()


def find_config(name: str | None) -> Path:
    """The file a CONFIG argument means: a path, a shipped name, else ./pipeline.yaml, else the embedded default.

    Raises ConfigError where there is no such file or name.
    """
    shipped = shipped_configs()
    if name is None:
        here = Path("pipeline.yaml")
        return here if here.is_file() else shipped[DEFAULT]
    path = Path(name)
    if path.is_file():
        return path
    stem = str(path.with_suffix("")).removeprefix("configs/") if path.suffix in (".yaml", ".yml") else name
    if stem in shipped and not path.is_absolute():
        return shipped[stem]
    if path.is_dir():
        how = f"data: {{source: folder, path: {name}}}"
        raise ConfigError(f"no configuration {name}: it is a folder; one of images is named in a configuration: {how}")
    files = [str(file) for file in path.parent.glob("*") if file.suffix in (".yaml", ".yml")]
    raise ConfigError(
        f"no configuration {name}: neither a file nor a shipped name{nearest(name, [*files, *shipped])}; "
        f"shipped: {', '.join(sorted(shipped))}"
    )


def is_rebalance_only(tree: dict) -> bool:
    """Whether a configuration says nothing of images, so that it can only be laid over a store's own settings."""
    return "rebalance" in tree and tree.keys() <= RebalanceOnly.model_fields.keys()


def read_tree(path: Path) -> dict:
    """The plain tree of a YAML file; ConfigError where it is none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a configuration, which is a text in YAML; give such a file, or a shipped name such as {DEFAULT}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys such as `name:` and `data:`, got {type(tree).__name__}")
    return tree


def load_config(path: Path | str | None = None, settings: Iterable[str] = ()) -> Config:
    """The configuration in a YAML file with `a.b=c` settings laid over it; relative data paths are relative to the file.

    path: a file, or text or None as `find_config` takes them. Raises ConfigError naming the file, the key and the nearest
    known key.
    """
    path = path if isinstance(path, Path) else find_config(path)
    tree = read_tree(path)
    tree.setdefault("name", path.stem)
    if is_rebalance_only(tree):
        raise ConfigError(
            f"{path}: data is missing: these are settings of stage 2 alone, for `pipeline rebalance STORE --config …`"
        )
    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("path", "train_list", "val_list", "test_list", "class_names"):
            value = data.get(key)
            if isinstance(value, str) and not Path(value).expanduser().is_absolute():
                data[key] = str(path.parent / value) if path not in shipped_configs().values() else value
    settings = tuple(settings)
    for setting in settings:
        apply_setting(tree, setting)
    return make_config(tree, " ".join([str(path), *(f"--set {s}" for s in settings)]))


def make_config(tree: dict, origin: str) -> Config:
    """The typed configuration of a plain tree; ConfigError names origin and what is wrong, nearest key included."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(origin, e) for e in error.errors())) from error


def make_rebalance_config(tree: dict, origin: str) -> RebalanceConfig:
    """The settings of stage 2 in a tree whose other sections may be missing, but not wrong; ConfigError as make_config."""
    if "data" in tree:
        return make_config(tree, origin).rebalance
    try:
        return RebalanceOnly.model_validate(tree).rebalance
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(origin, e, RebalanceOnly) for e in error.errors())) from error


def apply_setting(tree: dict, setting: str) -> None:
    """Sets `a.b=c` in a tree of dictionaries; the value is read as YAML, so 1e-3, true, null and [1, 2] mean what they say."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting}: expected KEY=VALUE, for example --set backbone.epochs=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not YAML") from error
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 takes 1e-3 for text
    *parents, last = key.strip().split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {setting}: {parent} is not a section")
    tree[last] = value


def parse_bytes(text: str) -> int:
    """The bytes that a text such as 8GiB, 500 MB or 1073741824 means; ValueError otherwise."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kKMGT])(i?))?B?\s*", text)
    if not found or float(found[1]) == 0:
        raise ValueError("expected a size such as 8GiB or 500MB")
    power = " kMGT".index((found[2] or " ").replace("K", "k"))
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing where no known word is near; capitals count for nothing."""
    words = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.55)
    return f"; did you mean {words[close[0]]}?" if close else ""


def _explain(origin: str, error: Any, model: type[BaseModel] = Config) -> str:
    where = ".".join(
        str(part) for part in error["loc"] if not str(part).startswith(("function-", "literal[", "float", "tuple"))
    )
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1], model)
        return f"{origin}: unknown key {where}{nearest(str(error['loc'][-1]), known)}; known here: {', '.join(known)}"
    if error["type"] == "model_type":
        keys = _fields_at(error["loc"], model)
        return f"{origin}: {where} is a section, got {error['input']!r}; set its keys, such as {where}.{keys[0]}"
    if error["type"] == "missing":
        return f"{origin}: {where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{origin}: {where or 'configuration'}: {message}{shown}"


def _fields_at(location: tuple, model: type[BaseModel]) -> list[str]:
    for part in location:
        annotation = Variant if isinstance(part, int) else model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
