"""The tensors in anybody's checkpoint file, read without executing anything, under the names that a network uses."""

import argparse
import re
import signal
import threading
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pipeline.config.plain_yaml import plain_yaml
from pipeline.errors import ConfigError, DataError
from pipeline.paths import near

# in this order: of what a file holds twice the average is taken, and a teacher before its student
CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder", "state_dict"),
    *("model_state_dict", "model_state", "model", "module", "net", "network", "encoder", "backbone", "weights"),
    "checkpoint",
)
FOLDER_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.pth",
    "pytorch_model.pth",
)  # of a folder, the first there is
PATTERN_SECONDS = 3.0  # for all patterns of a key map on all names; thousands take some milliseconds
DEEPEST = 3
Renaming = tuple[re.Pattern[str], str | None]


@dataclass(frozen=True)
class StoredTensors:
    """Named tensors of a file.

    Arguments:
        keys: the keys that lead to them, () where they are the file itself.
        unused_keys: other state dicts of the file.
    """

    tensors: dict[str, Tensor]
    keys: tuple[str, ...] = ()
    unused_keys: tuple[str, ...] = ()


def weights_file(path: Path, name: str | None = None) -> Path:
    """Return the file that holds the weights: the path itself, or in a folder the file of this name or a usual one.

    Raises: DataError: there is none.
    """
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path}: no such checkpoint{near(path) or '; check the path'}")
        return path
    names = (name,) if name else FOLDER_FILES
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise DataError(f"{path}: a folder without {' or '.join(names)}; give the file that holds the weights")
    return file


def read_file(path: Path) -> Any:
    """Return the content of a safetensors file or of a pickle of tensors and plain values; nothing in it is executed.

    argparse.Namespace and numpy's numbers, which training scripts like to save, count as plain.

    Raises: DataError: why the file cannot be read, and where it holds other objects, how to extract its tensors.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise DataError(f"{path}: {_unreadable_reason(path, start, error)}") from error


def find_tensors(content: Any, path: Path) -> StoredTensors:
    """Return the state dict in the content of a file: the content itself, or under the usual keys.

    Raises: DataError: there is none.
    """
    state = _find_state_dict(content, (), path)
    if state is not None:
        return state
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds {type(content).__name__}, not named tensors; save the model's state_dict()")
    optimiser = "state" in content and "param_groups" in content
    optimiser = optimiser or any(str(key).startswith("optim") for key in content)
    names = ", ".join(map(str, list(content)[:8])) + (" …" if len(content) > 8 else "") if content else "nothing"
    kind = "the state of an optimiser but no weights of a network" if optimiser else "no state dict"
    raise DataError(
        f"{path}: holds {kind}: {names}; give a file that has the model's state_dict(), directly or under a key such as "
        "state_dict or model"
    )


def read_key_map(path: Path) -> list[Renaming]:
    """Return the renamings of a key map, in their order: a YAML or JSON file of `pattern: replacement`.

    Patterns are Python regular expressions, searched in every name as re.sub does; a null replacement leaves out the
    tensors whose name matches.

    Raises: ConfigError: names the line that is wrong.
    """
    try:
        tree = plain_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path}: expected lines such as `'^encoder_q\\.': ''`, got {type(tree).__name__}")
    renames = []
    for pattern, replacement in tree.items():
        if not isinstance(pattern, str) or not isinstance(replacement, str | None):
            raise ConfigError(f"{path}: {pattern!r}: {replacement!r}: both have to be text; null leaves tensors out")
        try:
            compiled = re.compile(pattern)
            compiled.sub(replacement or "", "")
        except (re.error, IndexError) as error:
            raise ConfigError(f"{path}: {pattern!r}: {replacement!r}: no regular expression: {error}") from error
        renames.append((compiled, replacement))
    return renames


def rename_tensors(tensors: Mapping[str, Tensor], renames: Sequence[Renaming], path: Path) -> dict[str, Tensor]:
    """Return the tensors under their new names; raise ConfigError where two names become equal or a pattern matches none."""
    sources: dict[str, str] = {}
    matching: set[str] = set()
    new_names: dict[str, str | None] = dict.fromkeys(tensors)
    with _time_limit(
        f"{path}: its patterns take more than {PATTERN_SECONDS:g} s; write them without nested repetitions"
    ):
        for old in tensors:
            name: str | None = old
            for pattern, replacement in renames:
                if name is not None and pattern.search(name):
                    matching.add(pattern.pattern)
                    name = None if replacement is None else pattern.sub(replacement, name)
            new_names[old] = name
    for old, name in new_names.items():
        if name in sources:
            raise ConfigError(f"{path}: {sources[name]} and {old} both become {name}")
        if name is not None:
            sources[name] = old
    unused_patterns = [pattern.pattern for pattern, _ in renames if pattern.pattern not in matching]
    if unused_patterns:
        names = list(tensors)
        raise ConfigError(
            f"{path}: {unused_patterns[0]!r} is in no name; the file's are {', '.join(names[:3])} … {names[-1]}"
        )
    return {name: tensors[old] for name, old in sources.items()}


@contextmanager
def _time_limit(message: str) -> Iterator[None]:
    """Raise ConfigError with the message after PATTERN_SECONDS; regular expressions heed signals, in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(number: int, frame: object) -> None:
        raise ConfigError(message)

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, PATTERN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def common_prefix(names: Collection[str], expected: Collection[str]) -> tuple[str, list[str]]:
    """Return the prefix behind which most of the expected names stand, such as `module.`, and the prefixes that tie with it.

    The prefix is empty where no name fits behind any.
    """
    expected = set(expected)
    hits: Counter[str] = Counter()
    for name in names:
        starts = [0, *(m.end() for m in re.finditer(r"\.", name))]
        hits.update(name[:start] for start in starts if name[start:] in expected)
    if not hits:
        return "", []
    most = max(hits.values())
    best = sorted((prefix for prefix, count in hits.items() if count == most), key=lambda p: (len(p), p))
    return best[0], best[1:]


def _find_state_dict(content: Any, keys: tuple[str, ...], path: Path) -> StoredTensors | None:
    if not isinstance(content, Mapping):
        return None
    named = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if named and 2 * len(named) >= len(content):
        return StoredTensors(named, keys)
    if len(keys) < DEEPEST:
        for key in (key for key in CONTAINERS if key in content):
            if state := _find_state_dict(content[key], (*keys, key), path):
                unused_keys = tuple(k for k in CONTAINERS if k != key and isinstance(content.get(k), Mapping))
                return StoredTensors(state.tensors, state.keys, (*unused_keys, *state.unused_keys))
    return None


def _plain_types() -> list[Any]:
    """Return the types that a pickle may build beside tensors: a bag of attributes, and single numbers."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}
    return [argparse.Namespace, np.dtype, *dtypes, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _unreadable_reason(path: Path, start: bytes, error: Exception) -> str:
    text = " ".join(str(error).split())
    if start.startswith(b"version "):
        return "a pointer of Git LFS, not the file it stands for; fetch that with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "a web page, not a checkpoint; download it again"
    class_name = re.search(r"(?:GLOBAL|global:?|class:?) ([A-Za-z_]\w*(?:\.\w+)+)", text)
    if class_name and "is blocked" in text:
        return f"wants to run {class_name[1]} when it is loaded: no checkpoint needs that. It was not loaded; do not trust it"
    if class_name and "eights only" in text:
        return (
            f"holds Python objects beside its tensors ({class_name[1]}), which could run anything and are not loaded here; "
            "have it saved anew where it was made: torch.save(model.state_dict(), 'weights.pt')"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not start:
        return "an empty file; copy or download it again"
    if not start.startswith((b"PK", b"\x80")) and start[8:9] != b"{":
        return "not a PyTorch or safetensors file"
    kind = "safetensors file" if start[8:9] == b"{" else "checkpoint"
    return f"not a readable {kind}: it ends too early or is damaged; copy or download it again"
