"""The configurations that travel with the installation; imports nothing heavy, so that completing their names is quick."""

from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """Name → file of every configuration that travels with the installation."""
    here = Path(__file__).resolve().parent
    folder = next((f for f in (here / "configs", here.parent / "configs") if f.is_dir()), here / "configs")
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}
