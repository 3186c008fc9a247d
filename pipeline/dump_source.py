"""The source of a dump: backbone, images and settings, of a training here or of anybody's checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.backbone.checkpoint import Checkpoint, load_checkpoint
from pipeline.backbone.external_checkpoint import is_own_checkpoint, load_external_for_run, origin_text
from pipeline.config import Config, apply_setting, find_config, load_config, make_config
from pipeline.data import Dataset
from pipeline.distributed import Ranks
from pipeline.errors import DataError
from pipeline.paths import near


@dataclass(frozen=True, eq=False)
class Source:
    """The source of a dump.

    Arguments:
        images: the configuration's data set, if it is loaded.
        keep_in: a folder into which an external backbone is saved.
    """

    backbone: Checkpoint
    config: Config
    out: Path | str
    images: Dataset | None = None
    keep_in: Path | None = None


def find_source(
    path: Path | None,
    config: Config | None,
    *,
    out: Path | str | None,
    own_images: bool,
    settings: Sequence[str],
    model: str | None,
    key_map: Path | None,
    probe: bool,
    overwrite: bool,
    ranks: Ranks,
    say: Callable[[str], object],
) -> Source:
    """Return the backbone in a checkpoint with its images and settings, as `dump_features` describes; nothing is written."""
    if path is not None:
        ranks.together(lambda: _refuse_missing(path))
    if path is not None and not (key_map or probe) and is_own_checkpoint(path):
        backbone = ranks.together(lambda: load_checkpoint(path))
        chosen_config = ranks.together(
            lambda: _dump_config(config, backbone.config, own_images=own_images, settings=settings)
        )
        out = out or _default_store(path)
        say(f"checkpoint: {path}; store: {out}")
        return Source(backbone, chosen_config, out)
    if config is None:
        config = ranks.together(lambda: load_config(find_config(None), settings))
        say(f"configuration: {config.name} (its images; name another as CONFIG)")
    named = ranks.together(lambda: _dump_config(config, config, own_images=False, settings=settings))
    out = out or named.run_dir / "features.zarr"
    folder = (named.run_dir if isinstance(out, str) else out.parent) / "backbone"
    backbone, images = load_external_for_run(
        path, named, folder, model=model, key_map=key_map, probe=probe, overwrite=overwrite, ranks=ranks
    )
    say(f"{origin_text(backbone)}, kept in {folder / 'last.pt'}; store: {out}")
    for note in (backbone.external or {}).get("notes", ()):
        say(f"note: {note}")
    return Source(backbone, backbone.config, out, images, folder)


def source_of(
    backbone: Checkpoint, config: Config | None, *, out: Path | str | None, images: Dataset | None, keep_in: Path | None
) -> Source:
    """Return a loaded backbone as a source, by default with the images and into the run that it was trained with."""
    return Source(backbone, config or backbone.config, out or _default_store(backbone.path), images, keep_in)


def _default_store(path: Path) -> Path:
    """Return features.zarr in the run of a checkpoint, which may lie in its backbone/."""
    return (path.parent.parent if path.parent.name == "backbone" else path.parent) / "features.zarr"


def _refuse_missing(path: Path) -> None:
    if (path / "zarr.json").is_file():
        checkpoint = path.parent / "backbone" / "last.pt"
        example = f", such as {checkpoint}" if checkpoint.is_file() else ""
        raise DataError(
            f"{path}: a feature store, not a checkpoint; give the checkpoint it is to be made from{example}"
        )
    if not path.exists():
        raise DataError(f"{path}: no such checkpoint{near(path) or '; check the path'}")


def _dump_config(config: Config | None, saved: Config, *, own_images: bool, settings: Sequence[str]) -> Config:
    """Return the configuration of a dump: config, or the checkpoint's own with config's sections dump and rebalance."""
    tree = (saved if config is None or own_images else config).model_dump(mode="json")
    if config and own_images:
        tree |= {"dump": config.dump.model_dump(mode="json"), "rebalance": config.rebalance.model_dump(mode="json")}
    for setting in settings:
        apply_setting(tree, setting)
    return make_config(tree, "dump settings")
