"""Configuration: typed, frozen, read once from YAML; an unknown key is an error that names the nearest key that exists."""

import contextlib
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.resources import usable_cores
from pipeline.shipped import shipped_configs

DEFAULT = "digits-lt"
RESERVED_MODEL_ARGS = {  # arguments of timm.create_model that load weights, or that other settings give
    *(
        "num_classes",
        "in_chans",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_strict",
        "width",
    ),
    *("checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only"),
}


class Section(BaseModel):
    """A part of a configuration: frozen, and an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class DataConfig(Section):
    """Images, their splits and the long-tailed subset that is taken of them (docs/data.md)."""

    source: Literal["digits", "cifar10", "cifar100", "npz", "folder", "list", "huggingface"] = Field(
        description="Kind of source that the images come from."
    )
    path: Path | None = Field(
        None,
        description="File or folder of the images, relative to the configuration's file; null is ./data for CIFAR.",
    )
    hub: str | None = Field(None, description="Name of a data set on the HuggingFace Hub, instead of data.path.")
    hub_config: str | None = Field(None, description="Configuration of the Hub's data set; null where it has only one.")
    download: bool = Field(False, description="Download CIFAR where its files are missing.")
    train_list: Path | None = Field(
        None, description="List of the training images of source list, one line `relative/path label` per image."
    )
    val_list: Path | None = Field(
        None, description="List of the validation images; null holds some of the training images out."
    )
    test_list: Path | None = Field(
        None, description="List of the test images; null holds some of the training images out."
    )
    class_names: Path | None = Field(
        None, description="Text file with one class name per line; null takes the source's names, or the numbers."
    )
    train_split: str | None = Field(None, description="Name of the HuggingFace training split; null looks for `train`.")
    val_split: str | None = Field(
        None, description="Name of the HuggingFace validation split, or `none`; null looks for the usual names."
    )
    test_split: str | None = Field(
        None, description="Name of the HuggingFace test split, or `none`; null looks for `test`."
    )
    image_column: str | None = Field(
        None, description="HuggingFace column of the images; null takes the only one that fits."
    )
    label_column: str | None = Field(
        None, description="HuggingFace column of the labels; null takes the only one that fits."
    )
    subset: Literal["exponential", "step", "none"] = Field(
        "none", description="Shape of the long-tailed subset that is drawn from the training images."
    )
    imbalance_factor: float = Field(100.0, ge=1, description="Size of the largest class over that of the smallest.")
    max_per_class: int | None = Field(
        None,
        ge=1,
        description="Training images of the largest class of a subset; null takes as many as all classes have.",
    )
    val_per_class: int = Field(
        20, ge=0, description="Images per class held out for validation where the source has no such split."
    )
    test_per_class: int = Field(
        20, ge=0, description="Images per class held out for testing where the source has none."
    )
    subset_seed: int = Field(0, ge=0, description="Seed that draws the subset and the images that are held out.")
    image_size: int | None = Field(
        None,
        ge=1,
        description="Height and width in pixels to which image files are resized; null takes the pretrained network's, else 224.",
    )
    augment: Literal["crop-flip", "crop", "resized-crop-flip", "none"] | None = Field(
        None,
        description="Geometric augmentation; null is crop-flip for images in memory and resized-crop-flip for files.",
    )
    policy: Literal["none", "autoaugment-cifar10", "autoaugment-imagenet", "randaugment"] = Field(
        "none", description="Augmentation policy that follows data.augment."
    )
    rand_n: int = Field(2, ge=1, description="Operations per image of RandAugment.")
    rand_m: int = Field(9, ge=0, le=30, description="Strength of the operations of RandAugment.")
    cutout: int = Field(0, ge=0, description="Side in pixels of the square that Cutout removes; 0 is off.")
    mean: tuple[float, float, float] | None = Field(
        None,
        description="Mean of each channel in 0…1; null takes the pretrained network's, else the images', else ImageNet's.",
    )
    std: tuple[float, float, float] | None = Field(
        None, description="Standard deviation of each channel in 0…1; null as for data.mean."
    )
    workers: int = Field(
        default_factory=lambda: min(8, usable_cores()),
        ge=0,
        description="Processes that decode image files; the default is one per core, at most 8, and 0 uses none.",
    )

    @model_validator(mode="after")
    def _complete(self):
        if self.source in ("npz", "folder") and self.path is None:
            raise ValueError(f"source {self.source} needs data.path")
        if self.source == "list" and self.train_list is None:
            raise ValueError("source list needs data.train_list (lines `relative/path label`)")
        hub_keys = ("hub", "hub_config", "train_split", "val_split", "test_split", "image_column", "label_column")
        misplaced = [key for key in hub_keys if getattr(self, key) is not None]
        if self.source == "huggingface" and (self.path is None) == (self.hub is None):
            raise ValueError("source huggingface needs either data.path (files) or data.hub (a name on the Hub)")
        if self.source != "huggingface" and misplaced:
            raise ValueError(f"data.{misplaced[0]} is for source huggingface, not for {self.source}")
        return self


class WeakenConfig(Section):
    """Major feature weakening of stage 1, a reconstruction from the abstract of Procrustean training (docs/weakening.md)."""

    strength: float = Field(
        0.0, ge=0, le=1, description="Largest share a of a feature that is replaced by another one's; 0 is off."
    )
    gamma: float = Field(
        1.0, gt=0, description="Exponent γ of the class size; below 1 medium-sized classes are weakened more."
    )
    group: int = Field(
        32,
        ge=1,
        description="Images of the batch that are mixed among themselves, by mixup too; all where it has fewer.",
    )
    at: str = Field(
        "features",
        description="Place of the mixing: `features`, or the name of a module, at whose input the images are mixed.",
    )
    detach_partner: bool = Field(False, description="Stop the gradient before the feature that is mixed in.")


class BackboneConfig(Section):
    """Stage 1: the network and its training (docs/training.md)."""

    model: str = Field("cifar_resnet32", description="Name of a CIFAR ResNet of this program or of a timm model.")
    model_args: dict[str, Any] | None = Field(
        None, description="Further arguments of timm.create_model, such as {img_size: 96}; null gives none."
    )
    frozen: bool = Field(False, description="Take the network of backbone.encoder as it is and train nothing.")
    encoder: str | None = Field(
        None,
        description="Pretrained network that is taken as it is: an alias, a timm name, hf-hub:…, local-dir:… or a file; "
        "null trains backbone.model.",
    )
    width: float = Field(1.0, gt=0, description="Factor on the number of channels of a CIFAR ResNet.")
    pretrained: bool = Field(False, description="Start from the weights that timm has for the model.")
    epochs: int = Field(200, ge=1, description="Passes over the training images.")
    batch_size: int = Field(64, ge=2, description="Images per step, over all processes together.")
    lr: float = Field(0.01, gt=0, description="Learning rate of SGD at its highest; it falls on a cosine to 0.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(5e-3, ge=0, description="Weight decay of every parameter.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs in which the learning rate rises from 0.")
    seed: int = Field(0, ge=0, description="Seed of the initial weights, the order of images and their augmentation.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Arithmetic of the training; auto takes bfloat16 where the device computes it faster."
    )
    accumulate: int = Field(1, ge=1, description="Parts in which a batch is computed, to save memory.")
    sync_batch_norm: bool = Field(False, description="Share the statistics of batch normalisation between processes.")
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = Field(
        "none", description="Mode of torch.compile; none does not compile."
    )
    weaken: WeakenConfig = Field(default_factory=WeakenConfig, description="Major feature weakening.")
    loss: Literal["ce", "focal", "cb", "grw", "ldam-drw", "balanced-softmax"] = Field(
        "ce", description="Loss of stage 1."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share ε of label smoothing; 0 is off.")
    focal_gamma: float = Field(2.0, ge=0, description="Exponent γ of the focal loss.")
    cb_beta: float = Field(0.9999, ge=0, lt=1, description="β of the class weights of the losses cb and ldam-drw.")
    grw_rho: float = Field(1.2, ge=0, description="Exponent ρ of the class weights of the loss grw.")
    ldam_margin: float = Field(0.5, ge=0, description="Margin of the smallest class in the loss ldam-drw.")
    drw_start: float = Field(
        0.8, ge=0, le=1, description="Share of the epochs after which the loss ldam-drw weights classes."
    )
    sampler: Literal["instance", "class-balanced", "square-root"] = Field(
        "instance", description="Sampling of training images: each once, classes alike, or by the root of their size."
    )
    force_double_balancing: bool = Field(
        False, description="Allow a balancing loss together with a balancing sampler, which is refused otherwise."
    )
    ema: float = Field(0.0, ge=0, lt=1, description="Decay per step of the averaged weights; 0 keeps no average.")
    mixup: float = Field(0.0, ge=0, description="α of the Beta distribution of mixup; 0 is off.")
    validate_every: int = Field(1, ge=1, description="Epochs from one validation to the next.")
    diagnose_every: int = Field(
        0, ge=0, description="Epochs from one diagnosis of every class to the next; 0 makes none."
    )
    diagnose_per_class: int = Field(20, ge=1, description="Training images per class that a diagnosis looks at.")
    save_every_minutes: float = Field(
        10.0, gt=0, description="Minutes from one checkpoint to the next within an epoch."
    )
    tensorboard: bool = Field(False, description="Write event files for TensorBoard beside the checkpoints.")

    @model_validator(mode="before")
    @classmethod
    def _encoder_is_frozen(cls, tree: Any) -> Any:
        """Return the tree with frozen: true where it names an encoder."""
        return {"frozen": True} | tree if isinstance(tree, dict) and tree.get("encoder") else tree

    @model_validator(mode="after")
    def _frozen_names_an_encoder(self):
        if self.frozen and not self.encoder:
            raise ValueError("frozen: name the pretrained network with encoder, such as encoder: lite0")
        if self.encoder and not self.frozen:
            raise ValueError(
                "encoder takes a network as it is: leave frozen out, or train with model and pretrained: true"
            )
        return self

    @field_validator("model_args")
    @classmethod
    def _model_args_build_a_network(cls, value: Any) -> Any:
        """Refuse arguments by which timm would load weights, and those that other settings give."""
        if reserved := sorted(RESERVED_MODEL_ARGS & set(value or {})):
            raise ValueError(f"{', '.join(reserved)}: not an argument of the network's shape")
        return value or None

    @model_validator(mode="after")
    def _balances_once(self):
        if self.loss == "focal" and self.label_smoothing:
            raise ValueError("label_smoothing is not defined for loss focal; leave one of them out")
        remedies = {
            "balanced-softmax": "a loss with the class prior in it",
            "cb": "class weights",
            "grw": "class weights",
        }
        remedies["ldam-drw"] = "a loss with class margins and class weights"
        if self.loss in remedies and self.sampler != "instance" and not self.force_double_balancing:
            raise ValueError(
                f"loss {self.loss}: {remedies[self.loss]} and {self.sampler} sampling together make up for the class sizes "
                "twice; leave one of them out, or insist with backbone.force_double_balancing=true"
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
    """The feature store that the encoder's outputs are written to (docs/dump.md)."""

    views: int = Field(11, ge=1, description="Views of each training image: one clean, the others augmented.")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Precision of the stored features.")
    batch_size: int = Field(256, ge=1, description="Images that are read and augmented at a time.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the encoder's products; auto takes what is fastest in a timed trial on a CPU."
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field(
        "auto", description="Of images and weights; auto takes what is fastest in a timed trial on a CPU."
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Images that the encoder takes at a time [default: by a timed trial on a CPU, else all].",
    )
    seed: int = Field(0, ge=0, description="Seed of the augmented views.")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="Treatment of an unreadable image, in training too: end the work, or leave the image out."
    )


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
        ("iwb",), description="Methods to fit: names of docs/methods.md, `all`, or Python files that define one."
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
    trials: int = Field(12, ge=1, description="Settings that are tried for each trained method that is tuned.")
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
            raise ValueError("; ".join(_explanations(error, f"variant {variant.name}", RebalanceConfig))) from error


class Config(Section):
    """One runnable experiment: all settings of `pipeline run`, from images to report."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the experiment, whose files go to runs/NAME; the default is the file's own.",
    )
    data: DataConfig = Field(description="Images and their splits.")
    backbone: BackboneConfig = Field(default_factory=BackboneConfig, description="Stage 1: network and training.")
    dump: DumpConfig = Field(default_factory=DumpConfig, description="The feature store.")
    rebalance: RebalanceConfig = Field(
        default_factory=RebalanceConfig, description="Stage 2: heads on the cached features."
    )

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
    """A configuration of stage 2 alone, which knows no images."""

    name: str = Field("rebalance", description="Name of the settings.")
    rebalance: RebalanceConfig = Field(
        default_factory=RebalanceConfig, description="Stage 2: heads on the cached features."
    )


def find_config(name: str | None) -> Path:
    """Return the file of a CONFIG argument: a path, a shipped name, else ./pipeline.yaml, else the embedded default.

    Raises: ConfigError: neither a file nor a shipped configuration has this name.
    """
    shipped = shipped_configs()
    if name is None:
        local = Path("pipeline.yaml")
        return local if local.is_file() else shipped[DEFAULT]
    path = Path(name)
    if path.is_file():
        return path
    stem = str(path.with_suffix("")).removeprefix("configs/") if path.suffix in (".yaml", ".yml") else name
    if stem in shipped and not path.is_absolute():
        return shipped[stem]
    if path.is_dir():
        raise ConfigError(
            f"no configuration {name}: it is a folder; to train on its images write a configuration with "
            f"data: {{source: folder, path: {name}}}"
        )
    files = [str(file) for file in path.parent.glob("*") if file.suffix in (".yaml", ".yml")]
    raise ConfigError(
        f"no configuration {name}: neither a file nor a shipped name{nearest(name, [*files, *shipped])}; "
        f"shipped: {', '.join(sorted(shipped))}"
    )


def is_rebalance_only(tree: dict) -> bool:
    """Return True where a tree has settings of stage 2 alone, which take the place of a store's own settings."""
    return "rebalance" in tree and tree.keys() <= RebalanceOnly.model_fields.keys()


def read_tree(path: Path) -> dict:
    """Return the plain tree of a YAML file; raise ConfigError where it holds none."""
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
    """Return the configuration of a YAML file; `a.b=c` settings replace its values.

    Arguments:
        path: a file, or text or None as `find_config` takes them. Data paths in it are relative to the file.
        settings: texts such as `backbone.epochs=10`, as after --set.
    Raises: ConfigError: names the file, the key that is wrong and the nearest key that exists.
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
    """Return the typed configuration of a plain tree; raise ConfigError that names origin and every wrong key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explanations(error, origin, Config))) from error


def make_rebalance_config(tree: dict, origin: str) -> RebalanceConfig:
    """Return the settings of stage 2 in a tree; other sections may be missing. Raises ConfigError as make_config does."""
    if "data" in tree:
        return make_config(tree, origin).rebalance
    try:
        return RebalanceOnly.model_validate(tree).rebalance
    except ValidationError as error:
        raise ConfigError("\n".join(_explanations(error, origin, RebalanceOnly))) from error


def apply_setting(tree: dict, setting: str) -> None:
    """Set `a.b=c` in a tree of dictionaries; the value is read as YAML, so 1e-3, true, null and [1, 2] are no text."""
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
    """Return the bytes of a text such as 8GiB, 500 MB or 1073741824; raise ValueError where it is no size."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kKMGT])(i?))?B?\s*", text)
    if not match or float(match[1]) == 0:
        raise ValueError("expected a size such as 8GiB or 500MB")
    power = " kMGT".index((match[2] or " ").replace("K", "k"))
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean …?` with the candidate most like a word, or an empty text; case does not matter."""
    words = {name.lower(): name for name in candidates}
    close = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.55)
    return f"; did you mean {words[close[0]]}?" if close else ""


def _explanations(error: ValidationError, origin: str, model: type[BaseModel]) -> list[str]:
    return [_explanation(details, origin, model) for details in error.errors()]


def _explanation(details: Any, origin: str, model: type[BaseModel]) -> str:
    """Return a sentence on one error of pydantic: the origin, the key, and the keys that exist where it does not."""
    key = ".".join(
        str(part) for part in details["loc"] if not str(part).startswith(("function-", "literal[", "float", "tuple"))
    )
    if details["type"] == "extra_forbidden":
        fields = _fields_at(details["loc"][:-1], model)
        return f"{origin}: unknown key {key}{nearest(str(details['loc'][-1]), fields)}; known here: {', '.join(fields)}"
    if details["type"] == "model_type":
        fields = _fields_at(details["loc"], model)
        return f"{origin}: {key} is a section, got {details['input']!r}; set its keys, such as {key}.{fields[0]}"
    if details["type"] == "missing":
        return f"{origin}: {key} is missing"
    message = details["msg"].removeprefix("Value error, ")
    value = "" if isinstance(details["input"], dict) else f" (got {details['input']!r})"
    return f"{origin}: {key or 'configuration'}: {message}{value}"


def _fields_at(location: tuple, model: type[BaseModel]) -> list[str]:
    for part in location:
        annotation = Variant if isinstance(part, int) else model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
