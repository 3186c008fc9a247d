"""Settings of stage 1."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section

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
