"""The configurations that travel with the installation; imports nothing heavy, so that completing their names is quick."""

from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """Return the file of every configuration that travels with the installation, by name."""
    package = Path(__file__).resolve().parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package / "configs")
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}
