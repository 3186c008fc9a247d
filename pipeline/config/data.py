"""Settings of the images."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.resources import usable_cores


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
    val_per_class: int | None = Field(
        None,
        ge=0,
        description="Images per class held out for validation where the source has no such split, at most a fifth of the "
        "class; null holds out 15 %, at least 2 and at most 50, of classes of 5 or more, and 20 beside a subset.",
    )
    test_per_class: int | None = Field(
        None,
        ge=0,
        description="Images per class held out for testing where the source has no test split; null as for "
        "data.val_per_class.",
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
