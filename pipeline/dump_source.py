"""What a dump is made from: backbone, images and settings, of a training here or of anybody's checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.backbone.checkpoint import Checkpoint, load_checkpoint
from pipeline.backbone.external_checkpoint import is_own, load_external_for_run, origin_text
from pipeline.config import Config, apply_setting, find_config, load_config, make_config
from pipeline.data import Dataset
from pipeline.distributed import Ranks
from pipeline.errors import DataError
from pipeline.paths import near


@dataclass(frozen=True, eq=False)
class Source:
    """images: the configuration's data set, if it is loaded; keep_in: a folder for the backbone itself, if it has none."""

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
    """The backbone in a checkpoint and what goes with it, as `dump_features` says; nothing is written."""
    if path is not None:
        ranks.together(lambda: _refuse_missing(path))
    if path is not None and not (key_map or probe) and is_own(path):
        backbone = ranks.together(lambda: load_checkpoint(path))
        chosen = ranks.together(lambda: _chosen(config, backbone.config, own_images=own_images, settings=settings))
        out = out or _beside(path)
        say(f"checkpoint: {path}; store: {out}")
        return Source(backbone, chosen, out)
    if config is None:
        config = ranks.together(lambda: load_config(find_config(None), settings))
        say(f"configuration: {config.name} (its images; name another as CONFIG)")
    named = ranks.together(lambda: _chosen(config, config, own_images=False, settings=settings))
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
    """A backbone that is loaded, by default with the images and into the run that it was trained with."""
    return Source(backbone, config or backbone.config, out or _beside(backbone.path), images, keep_in)


def _beside(path: Path) -> Path:
    """features.zarr in the run of a checkpoint, which may lie in its backbone/."""
    return (path.parent.parent if path.parent.name == "backbone" else path.parent) / "features.zarr"


def _refuse_missing(path: Path) -> None:
    if (path / "zarr.json").is_file():
        of_run = path.parent / "backbone" / "last.pt"
        such = f", such as {of_run}" if of_run.is_file() else ""
        raise DataError(f"{path}: a feature store, not a checkpoint; give the checkpoint it is to be made from{such}")
    if not path.exists():
        raise DataError(f"{path}: no such checkpoint{near(path) or '; check the path'}")


def _chosen(config: Config | None, saved: Config, *, own_images: bool, settings: Sequence[str]) -> Config:
    """What is dumped: config's images, or the checkpoint's own with config's settings of dump and stage 2."""
    tree = (saved if config is None or own_images else config).model_dump(mode="json")
    if config and own_images:
        tree |= {"dump": config.dump.model_dump(mode="json"), "rebalance": config.rebalance.model_dump(mode="json")}
    for setting in settings:
        apply_setting(tree, setting)
    return make_config(tree, "dump settings")
