"""All settings of an experiment: images, stage 1, feature store, stage 2."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, model_validator

from pipeline.config.backbone import BackboneConfig
from pipeline.config.data import DataConfig
from pipeline.config.rebalance import RebalanceConfig
from pipeline.config.section import Section


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

    @field_serializer("rebalance")
    def _settings_that_were_set(self, rebalance: RebalanceConfig) -> dict[str, Any]:
        """Return the settings of stage 2 without defaults, so that artefacts keep open what the user left open."""
        return rebalance.model_dump(mode="json", exclude_unset=True)

    @property
    def run_dir(self) -> Path:
        return Path("runs") / self.name


class RebalanceOnly(Section):
    """A configuration of stage 2 alone, which knows no images."""

    name: str = Field("rebalance", description="Name of the settings.")
    rebalance: RebalanceConfig = Field(
        default_factory=RebalanceConfig, description="Stage 2: heads on the cached features."
    )
