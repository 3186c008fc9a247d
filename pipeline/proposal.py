"""Settings for a folder of images, each with the reason for it: what `pipeline init` writes and `pipeline run FOLDER` takes."""

import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.backbone.aliases import ALIASES, EXTRA, installed_aliases
from pipeline.config import Config, DataConfig, apply_setting, make_config
from pipeline.data.images import is_image_name
from pipeline.data.sources import folder as folder_source
from pipeline.data.sources import split_folders
from pipeline.data.subset import HELD_OUT, SHARE, SMALLEST_SPLIT, held_out_sizes
from pipeline.data.survey import ImageSurvey, survey_images
from pipeline.errors import ConfigError, DataError
from pipeline.paths import holds_runs, is_run, near
from pipeline.text import Shown, wrapped

FILE = "pipeline.yaml"
COMMENT_WIDTH = 100
PREFERRED = "lite0"  # of the installed encoders: the larger ones gain some points and take two to three times as long
SMALL_SIDES = {
    32: "cifar_resnet32",
    64: "resnet18",
}  # pixels of the input → network, up to 1.5 times as many in the images
LARGE_SIDE, LARGE_NETWORK = 128, "resnet18"
SCRATCH = {"epochs": 100, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4}
SCRATCH_VIEWS = 4


@dataclass(frozen=True)
class ProposedSettings:
    """A section's settings and the reason for them; settings may be empty where a default is explained."""

    section: str
    settings: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Proposal(Shown):
    """The settings for a folder of images.

    Arguments:
        name: of the experiment, whose files go to runs/NAME.
        folder: as it was typed.
        choices: in the order of the file.
    """

    name: str
    folder: Path
    survey: ImageSurvey
    choices: tuple[ProposedSettings, ...]

    def tree(self, *, folder: Path | None = None) -> dict[str, Any]:
        """Return the configuration as a plain tree; `folder` replaces the path of the images."""
        tree: dict[str, Any] = {"name": self.name}
        for choice in self.choices:
            tree.setdefault(choice.section, {}).update(choice.settings)
        tree["data"]["path"] = str(folder or self.folder)
        return tree

    def config(self, sets: Iterable[str] = ()) -> Config:
        """Return the typed configuration, `a.b=c` settings laid over it; raise ConfigError where one of them is wrong."""
        tree = self.tree()
        for text in sets:
            apply_setting(tree, text)
        return make_config(tree, " ".join([str(self.folder), *(f"--set {text}" for text in sets)]))

    def yaml_text(self, file: Path) -> str:
        """Return the commented configuration; the path of the images is relative to the folder of `file`, where it can be."""
        path = self.folder
        if not path.is_absolute():
            path = Path(os.path.relpath(path, file.parent))
        tree = self.tree(folder=path)
        lines = [
            *_comment(f"Written by `pipeline init {shlex.quote(str(self.folder))}`. {self.facts}"),
            f"name: {_scalar(self.name)}",
        ]
        for section in dict.fromkeys(choice.section for choice in self.choices):
            lines += ["", f"{section}:"]
            for choice in self.choices:
                if choice.section == section:
                    lines += _comment(choice.reason, indent=2)
                    lines += [f"  {key}: {_scalar(tree[section][key])}" for key in choice.settings]
        return "\n".join([*lines, ""])

    @property
    def facts(self) -> str:
        """Return a paragraph on the images."""
        survey = self.survey
        counts = np.array(survey.counts["train"])
        order = np.argsort(-counts, kind="stable")
        largest, smallest = order[0], order[-1]
        splits = ", ".join(f"{sum(sizes):,} {name}" for name, sizes in survey.counts.items())
        text = (
            f"{survey.images:,} images ({splits}) in {len(counts):,} classes, from {counts[largest]:,} in "
            f"{survey.class_names[largest]} to {counts[smallest]:,} in {survey.class_names[smallest]}. "
        )
        if len(survey.sides):
            height, width = np.median(survey.sides, axis=0).astype(int)
            low, high = survey.sides.min(1).min(), survey.sides.max(1).max()
            formats = ", ".join(f"{name} {number:,}" for name, number in survey.formats.items())
            text += f"Median size {width}×{height} pixels, sides from {low:,} to {high:,}; {formats}. "
        return text.strip()

    def to_dict(self) -> dict[str, Any]:
        survey = self.survey
        return {
            "folder": str(self.folder),
            "images": survey.images,
            "class_names": list(survey.class_names),
            "counts": survey.counts,
            "shorter_side": survey.shorter_side,
            "formats": survey.formats,
            "oddities": list(survey.oddities),
            "config": self.tree(),
            "reasons": [{"section": c.section, "settings": c.settings, "reason": c.reason} for c in self.choices],
        }

    def __str__(self) -> str:
        lines = wrapped(f"{self.folder}: ", self.facts, COMMENT_WIDTH, indent=2)
        for note in (*self.survey.oddities, *self.survey.notes):
            lines += wrapped("note: ", note, COMMENT_WIDTH, indent=6)
        for choice in self.choices:
            values = ", ".join(f"{key} {_scalar(value)}" for key, value in choice.settings.items() if key != "path")
            lines += wrapped(f"{choice.section}: {values}. ", choice.reason, COMMENT_WIDTH, indent=2)
        return "\n".join(lines)


def propose(folder: Path) -> Proposal:
    """Return settings for the images in a folder, FOLDER/CLASS/*.jpg or FOLDER/train/CLASS/*.jpg.

    Raises:
        ConfigError: the folder holds runs or a store.
        DataError: its images cannot be used.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder{near(folder)}; give a folder of images, such as {folder}/CLASS/*.jpg"
        )
    store = (folder / "zarr.json").is_file()
    if store or is_run(folder) or holds_runs(folder):
        kind = "a feature store" if store else "a run" if is_run(folder) else "a folder of runs"
        raise ConfigError(
            f"no configuration {folder}: {kind}; give a folder of images, CLASS/*.jpg, or a configuration"
        )
    survey = survey_images(folder_source(DataConfig(source="folder", path=folder)))
    aliases = installed_aliases()
    encoder = PREFERRED if PREFERRED in aliases else next(iter(aliases), None)
    network = _encoder_choices(encoder, survey) if encoder else _scratch_choices(survey)
    data = ProposedSettings("data", {"source": "folder", "path": str(folder)}, "A folder for each class.")
    reading = ProposedSettings(
        "dump", {"on_error": "skip"}, "Images that cannot be read are left out and listed; `fail` ends the run instead."
    )
    return Proposal(experiment_name(folder), folder, survey, (data, *_split_choices(survey), *network, reading))


def experiment_name(folder: Path) -> str:
    """Return the name of the run on a folder's images."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "images"


def holds_images(folder: Path) -> bool:
    """Return True where every subfolder, or every subfolder of train, directly holds images, and there are two or more.

    The demand is strict, so that a folder with pictures somewhere in it does not pass for a data set.
    """
    try:
        train = split_folders(folder).get("train", folder)
    except DataError:  # two folders of one split
        return False
    classes = [place for place in train.glob("*") if place.is_dir() and place.name[0] != "." and place.name != "runs"]
    return len(classes) > 1 and all(any(is_image_name(file.name) for file in place.glob("*.*")) for place in classes)


def refuse_ignored_images() -> None:
    """Raise ConfigError where a command without CONFIG would leave the images of the working folder aside."""
    if not holds_images(Path()):
        return
    name, place = (".", "") if split_folders(Path()) else (shlex.quote(Path().resolve().name), "cd .. && ")
    raise ConfigError(
        f"this folder holds images and no {FILE}: `{place}pipeline run {name}` proposes settings for them and runs, "
        f"`{place}pipeline init {name}` writes these settings; `pipeline run digits-lt` runs the digits that come along"
    )


def _encoder_choices(encoder: str, survey: ImageSurvey) -> tuple[ProposedSettings, ...]:
    size = ALIASES[encoder].size
    enlarged = (
        f" Most images are smaller ({survey.shorter_side} pixels) and are enlarged, which costs time and helps accuracy."
        if 0 < survey.shorter_side < size
        else " A smaller size, such as 160, takes about half the time and costs about two points."
    )
    reason = (
        f"A network that has seen ImageNet is taken as it is and only the classifier is fitted: minutes instead of hours, and "
        f"mostly better features than a network trained on {sum(survey.counts['train']):,} images. Its weights came by pip; "
        "lite2 is some points better and takes three times as long."
    )
    return (
        ProposedSettings(
            "data", {"image_size": size}, f"Pixels of a side, the size that {encoder} was trained at.{enlarged}"
        ),
        ProposedSettings("backbone", {"encoder": encoder}, reason),
    )


def _scratch_choices(survey: ImageSurvey) -> tuple[ProposedSettings, ...]:
    side = survey.shorter_side
    size, network = next(
        ((size, name) for size, name in SMALL_SIDES.items() if side <= 1.5 * size), (LARGE_SIDE, LARGE_NETWORK)
    )
    images = sum(survey.counts["train"])
    reason = (
        f"No pretrained network is installed, so one is trained from nothing: {SCRATCH['epochs']} passes over {images:,} images, "
        f"minutes on a GPU and mostly hours on a CPU, and with so few images far less accurate than a pretrained network. "
        f"Better: {EXTRA}, then `pipeline init` again."
    )
    return (
        ProposedSettings("data", {"image_size": size}, f"Pixels of a side; half of the images have {side} or fewer."),
        ProposedSettings("backbone", {"model": network, **SCRATCH}, reason),
        ProposedSettings(
            "dump", {"views": SCRATCH_VIEWS}, "One clean view of each training image and three augmented ones."
        ),
    )


def _split_choices(survey: ImageSurvey) -> tuple[ProposedSettings, ...]:
    """Return the choice on splits that the folder lacks, or nothing."""
    absent = [(key, split) for key, split in (("val", "validation"), ("test", "test")) if key not in survey.counts]
    if not absent:
        return ()
    counts = np.array(survey.counts["train"])
    sizes = held_out_sizes(counts, None)
    names = " and ".join(f"no {split} images" for _, split in absent)
    reason = (
        f"The folder has {names}: {SHARE:.0%} of each class are held out, at least {HELD_OUT[0]} and at most {HELD_OUT[1]}, "
        f"{int(sizes.sum()):,} in all{' for each' if len(absent) > 1 else ''}; a number here holds out that many of each class."
    )
    if small := int((counts < SMALLEST_SPLIT).sum()):
        reason += (
            f" {small} class(es) with fewer than {SMALLEST_SPLIT} images stay in training whole, so that their accuracy is not "
            "measured."
        )
    return (ProposedSettings("data", {f"{key}_per_class": None for key, _ in absent}, reason),)


def _comment(text: str, *, indent: int = 0) -> list[str]:
    mark = " " * indent + "# "
    return [mark + line for line in wrapped("", text, COMMENT_WIDTH - len(mark), indent=0)]


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("\n").removesuffix("\n...")
