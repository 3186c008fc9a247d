"""Heads that map features to logits, and the file that stores them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache import Cache
from pipeline.errors import DataError
from pipeline.results.documents import HeadsShape, checked
from pipeline.results.files import header, tensor_file
from pipeline.results.head_id import HeadId
from pipeline.results.summary import heads_summary

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_AT_ONCE = 1 << 24
LARGEST = 1e15  # features and their sums have the rest of float32's range


@dataclass(frozen=True, eq=False)
class Linear:
    """logits = W·x + b: weight (C, D), bias (C,)."""

    weight: np.ndarray
    bias: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.weight, self.bias

    def logits(self, x: "Tensor") -> "Tensor":
        """(M, C) of features (M, D)."""
        import torch

        w, b = (torch.as_tensor(a, device=x.device, dtype=x.dtype) for a in self.arrays)
        return torch.addmm(b, x, w.T)

    def array_logits(self, x: np.ndarray) -> np.ndarray:
        """(M, C) of features (M, D), without torch."""
        return x @ self.weight.T + self.bias


@dataclass(frozen=True, eq=False)
class Gated:
    """logits = first(x) + σ(v·x + e)·second(x), two linear heads and a gate: DisAlign. It is no linear layer.

    gate (D+1,): v and e.
    """

    first: Linear
    second: Linear
    gate: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return *self.first.arrays, *self.second.arrays, self.gate

    def logits(self, x: "Tensor") -> "Tensor":
        """(M, C) of features (M, D)."""
        import torch

        gate = torch.as_tensor(self.gate, device=x.device, dtype=x.dtype)
        return self.first.logits(x) + (x @ gate[:-1] + gate[-1]).sigmoid()[:, None] * self.second.logits(x)

    def array_logits(self, x: np.ndarray) -> np.ndarray:
        """(M, C) of features (M, D), without torch."""
        opened = (1 + np.tanh((x @ self.gate[:-1] + self.gate[-1]) / 2)) / 2  # σ that never overflows
        return self.first.array_logits(x) + opened[:, None] * self.second.array_logits(x)


Scorer = Linear | Gated


def scorer_of(arrays: Sequence[Any]) -> Scorer:
    """The head whose `arrays` these are: two of a linear layer, five of a gated one."""
    if len(arrays) == 2:
        return Linear(*arrays)
    first_weight, first_bias, second_weight, second_bias, gate = arrays
    return Gated(Linear(first_weight, first_bias), Linear(second_weight, second_bias), gate)


def is_finite(head: Scorer) -> bool:
    """False where fitting diverged: numbers that are none, or so large that logits are."""
    return all(float(np.abs(a).max()) < LARGEST for a in head.arrays)  # also false for nan


def predict(head: Scorer, inputs: "Tensor") -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable classes (M,) and their probabilities (M,).

    Arguments:
        inputs: features (M, D).
    """
    import torch

    classes, probabilities = [], []
    with torch.no_grad():
        for rows in inputs.split(max(1, LOGITS_AT_ONCE // len(head.arrays[1]))):
            logits = head.logits(rows)
            top = logits.max(1)
            classes.append(top.indices)
            probabilities.append((top.values - logits.logsumexp(1)).exp())
    return torch.cat(classes).cpu().numpy(), torch.cat(probabilities).cpu().numpy()


def predict_array(head: Scorer, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and probabilities as `predict` does, of an array of features (M, D) in float32 and without torch."""
    classes, probabilities = np.empty(len(features), np.int64), np.empty(len(features), np.float32)
    step = max(1, LOGITS_AT_ONCE // len(head.arrays[1]))
    for start in range(0, len(features), step):
        rows = slice(start, start + step)
        logits = head.array_logits(features[rows])
        classes[rows] = logits.argmax(1)
        logits -= logits.max(1, keepdims=True)
        probabilities[rows] = 1 / np.exp(logits, out=logits).sum(1)
    return classes, probabilities


def heads_file(heads: Sequence[tuple[dict[str, Any], Scorer]], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file. Tensors weight (H, C, D) and bias (H, C) float32 of the linear heads; what each of them is
    stands in the metadata's `heads`, a JSON list. Gated ones are in gated_weight (G, 2, C, D), gated_bias (G, 2, C) and
    gate (G, D+1), listed in `gated`.
    """
    linear = [(entry, head) for entry, head in heads if isinstance(head, Linear)]
    gated = [(entry, head) for entry, head in heads if isinstance(head, Gated)]
    tensors = {
        "weight": np.stack([head.weight for _, head in linear]),
        "bias": np.stack([head.bias for _, head in linear]),
    }
    if gated:
        tensors["gated_weight"] = np.stack([[head.first.weight, head.second.weight] for _, head in gated])
        tensors["gated_bias"] = np.stack([[head.first.bias, head.second.bias] for _, head in gated])
        tensors["gate"] = np.stack([head.gate for _, head in gated])
    classes, width = tensors["weight"].shape[1:]
    entries = {"heads": [entry for entry, _ in linear], "gated": [entry for entry, _ in gated]}
    summary = heads_summary([*entries["heads"], *entries["gated"]], classes, width)
    metadata = {
        key: json.dumps(value) for key, value in {"header": header("heads", summary), **entries, **facts}.items()
    }
    return tensor_file({name: a.astype(np.float32) for name, a in tensors.items()}, metadata)


@dataclass(frozen=True, eq=False)
class HeadsFile:
    """The heads of a heads.safetensors, finite and all of one shape, and what they were fitted on.

    Arguments:
        scorers: (what it is, head) of every head.
        class_names, store_digest: of the store; None in files that do not say.
        encoder: digest of the weights that made the features; None for features from elsewhere.
    """

    path: Path
    scorers: list[tuple[dict[str, Any], Scorer]]
    class_names: list[str] | None
    store_digest: str | None
    encoder: str | None

    def refuse_other_store(self, store: Cache, *, same_content: bool) -> None:
        """Raise DataError where the heads were fitted on other classes or features than those of a store.

        Arguments:
            same_content: the store must be the very one; else another one of the same encoder will do.
        """
        classes, width = self.scorers[0][1].arrays[0].shape
        again = f"run `pipeline rebalance {store.path}` again, or give the heads.safetensors made from this store"
        if (classes, width) != (len(store.counts), store.width):
            problem = f"heads for {classes} classes and {width} features"
            raise DataError(f"{self.path}: {problem}, {store.path} has {len(store.counts)} and {store.width}; {again}")
        if self.class_names is not None and tuple(self.class_names) != store.class_names:
            differing = next(pair for pair in zip(self.class_names, store.class_names, strict=True) if len({*pair}) > 1)
            raise DataError(
                f"{self.path}: heads for other classes than {store.path} has, such as {differing[0]!r} instead of "
                f"{differing[1]!r}; {again}"
            )
        encoder = store.fingerprint.get("checkpoint")
        other_encoder = self.encoder != encoder if self.encoder and encoder else encoder is not None
        if self.store_digest not in (None, store.digest) and (same_content or other_encoder):
            raise DataError(
                f"{self.path}: heads fitted on a store with digest {self.store_digest[:12]}, {store.path} has "
                f"{store.digest[:12]}: its features were made anew since; {again}"
            )


def read_scorers(path: Path) -> list[tuple[dict[str, Any], Scorer]]:
    """Return (what it is, head) of every head in a heads.safetensors; raise DataError as `read_heads_file` does."""
    return read_heads_file(path).scorers


def read_heads_file(path: Path) -> HeadsFile:
    """Return the content of a heads.safetensors; DataError where it is missing, damaged, or no head can score."""
    from safetensors import SafetensorError, safe_open

    again = "run `pipeline rebalance` again"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
            if "heads" not in metadata:
                raise KeyError("no list of heads")
            metadata = checked(path, metadata, HeadsShape, again)
            linear, gated = metadata["heads"], metadata.get("gated", [])
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            scorers: list[tuple[dict[str, Any], Scorer]] = [
                (entry, Linear(w, b)) for entry, w, b in zip(linear, weight, bias, strict=True)
            ]
            if gated:
                names = ("gated_weight", "gated_bias", "gate")
                for entry, w, b, gate in zip(gated, *map(file.get_tensor, names), strict=True):
                    scorers.append((entry, Gated(Linear(w[0], b[0]), Linear(w[1], b[1]), gate)))
    except FileNotFoundError as error:
        problem = "cannot be read: no permission" if path.exists() else "no such file"  # safetensors calls both missing
        raise DataError(f"{path}: {problem}; {again}") from error
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not the heads of `pipeline rebalance` ({error}); give its heads.safetensors, or run it again"
        ) from error
    names_of_classes = metadata.get("class_names")
    for entry, head in scorers:
        if problem := head_problem(head, classes=None if names_of_classes is None else len(names_of_classes)):
            raise DataError(f"{path}: head {HeadId.of_row(entry)}: {problem}; {again}")
    return HeadsFile(
        path, scorers, names_of_classes, metadata.get("store_digest"), metadata.get("encoder")
    )  # fmt: skip


def head_problem(head: Scorer, *, classes: int | None = None, width: int | None = None) -> str:
    """Return the reason why a head cannot score features, or an empty text.

    Arguments:
        classes, width: that its arrays must have; None for whatever its first array has.
    """
    first = head.arrays[0]
    if first.ndim != 2 or 0 in first.shape:
        return f"a weight of shape {first.shape}, not (classes, features)"
    c, d = classes or first.shape[0], width or first.shape[1]
    expected = [(c, d), (c,), (c, d), (c,), (d + 1,)][: len(head.arrays)]
    if (shapes := [array.shape for array in head.arrays]) != expected:
        return f"arrays of shapes {shapes} where {c} classes and {d} features need {expected}"
    if any(array.dtype.kind != "f" for array in head.arrays):
        return f"numbers of type {first.dtype}, not floating-point ones"
    return "" if is_finite(head) else "holds numbers that are none or infinite"
