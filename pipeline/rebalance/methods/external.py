"""Linear heads that another program made, as methods: read, checked, and matched with the classes of a store by name."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache import Cache
from pipeline.data.names import class_names_from
from pipeline.data.sources import read_npz
from pipeline.errors import ConfigError, DataError
from pipeline.linear.moments import Samples
from pipeline.rebalance.methods.api import Free, Stage1, Values
from pipeline.rebalance.methods.registry import RIVALS, SHIPPED
from pipeline.results.heads import Linear, head_problem, read_heads_file

HEAD_FILES = (".npz", ".safetensors")


def add_external_heads(names: Sequence[str], store: Cache) -> None:
    """Add a method for each file of a head among the names of methods; its head is a member of the ensemble.

    Raises:
        ConfigError: a shipped method, or another of the files, has its name.
        DataError: as `read_external_head`.
    """
    files = [Path(name) for name in dict.fromkeys(names) if name.endswith(HEAD_FILES)]
    for number, file in enumerate(files):
        if file.stem in SHIPPED or file.stem in [other.stem for other in files[:number]]:
            raise ConfigError(f"--head {file}: another method is called {file.stem}; rename the file")
        head = read_external_head(file, class_names=store.class_names, width=store.width)
        RIVALS[file.stem] = Free(file.stem, partial(_fixed, head), member=True)


def read_external_head(path: Path, *, class_names: Sequence[str], width: int) -> Linear:
    """Return a linear head of another program in the order of these classes; classes of other names are left out.

    Arguments:
        path: .npz with weight (C, D), class_names (C,) and, unless it is zero, bias (C,); .safetensors with the same tensors
            and the metadata class_names, a JSON list; or the heads.safetensors of a rebalance, of which the selected head is
            taken.
        width: D of the features.
    Raises: DataError: names the file and the field that is missing or does not fit.
    """
    arrays, names = _read(path)
    for field in ("weight", "class_names"):
        if (field == "class_names" and names is None) or (field == "weight" and field not in arrays):
            raise DataError(
                f"{path}: {field} is missing; a head needs weight (C, D) and class_names (C,), and may have bias"
            )
    names = class_names_from(names or (), f"{path} (class_names)")
    weight = np.asarray(arrays["weight"])
    head = Linear(weight, np.asarray(arrays.get("bias", np.zeros(len(weight) if weight.ndim else 0, np.float32))))
    if problem := head_problem(head, classes=len(names), width=width):
        raise DataError(f"{path}: weight and bias: {problem}")
    if missing := [name for name in class_names if name not in names]:
        raise DataError(
            f"{path}: class_names lacks {len(missing)} of the store's {len(class_names)} classes, such as {missing[0]!r}; it has "
            f"{', '.join(names[:3])} …"
        )
    order = [names.index(name) for name in class_names]
    return Linear(head.weight[order].astype(np.float32), head.bias[order].astype(np.float32))


def _read(path: Path) -> tuple[dict[str, np.ndarray], Sequence[object] | None]:
    """Return the arrays of a file and its names of classes, None where there are none."""
    if path.suffix == ".npz":
        arrays = read_npz(path, ("weight", "bias", "class_names"))
        names = arrays.pop("class_names", None)
        return arrays, None if names is None else names.ravel().tolist()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "heads" in metadata:
                stored = read_heads_file(path)
                chosen = next(
                    (h for entry, h in stored.scorers if entry.get("selected") and isinstance(h, Linear)), None
                )
                if chosen is None:
                    raise DataError(f"{path}: its selected head is not one linear layer; take an .npz of another head")
                return {"weight": chosen.weight, "bias": chosen.bias}, stored.class_names
            arrays = {name: file.get_tensor(name) for name in {"weight", "bias"}.intersection(file.keys())}
            names = json.loads(metadata.get("class_names", "null"))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read as .safetensors ({error}); give a file of weight, bias and class_names"
        ) from error
    if names is not None and not isinstance(names, list):
        raise DataError(f"{path}: class_names is {type(names).__name__}, expected a JSON list of texts")
    return arrays, names


def _fixed(head: Linear, stage1: Stage1, samples: Samples, values: Values) -> tuple[Tensor, Tensor]:
    """Return the head as it is, whatever the samples are."""
    return torch.from_numpy(head.weight).to(stage1.weight), torch.from_numpy(head.bias).to(stage1.weight)
