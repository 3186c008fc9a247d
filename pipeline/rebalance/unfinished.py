"""The finished parts of a rebalance that is under way: each method is kept as soon as it is done, and the same command goes on.

Each piece of work on a sweep, such as the tuning of one method, has a file in OUT/unfinished/KEY: the heads that it left in the
sweep with their scores, what later methods take over from it, and its facts in JSON. KEY is a digest of everything that the
heads depend on, so that another store or other settings never use them. The folder is removed when the results are written.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import write_durably
from pipeline.config import RebalanceConfig
from pipeline.distributed import Obeyed, Ranks, Signals
from pipeline.errors import DataError, Terminated
from pipeline.killpoint import KillPoint
from pipeline.metrics import Scores
from pipeline.provenance import library_version
from pipeline.rebalance.methods.external import HEAD_FILES
from pipeline.rebalance.sweep import Sweep
from pipeline.results.documents import PieceShape, checked
from pipeline.results.files import header, tensor_file
from pipeline.results.head_id import HeadId
from pipeline.results.heads import scorer_of

FOLDER = "unfinished"
Facts = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Unfinished:
    """The finished pieces of work of one configuration on one store.

    Arguments:
        out: folder of the results.
        digest: of the store.
    """

    def __init__(self, out: Path, config: RebalanceConfig, digest: str, ranks: Ranks, report: Callable[[str], object]):
        own_methods = [
            hashlib.sha256(Path(name).read_bytes()).hexdigest()
            for name in config.method
            if name.endswith((".py", *HEAD_FILES))
        ]
        parts = [
            digest,
            config.model_dump(mode="json"),
            own_methods,
            ranks.device.type,
            library_version("iwb-pipeline"),
        ]
        self.key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.ranks, self.report = out / FOLDER / self.key, ranks, report
        self.kill = KillPoint.from_environment(rank=ranks.rank)
        self._done = 0  # pieces, in this process

    @property
    def kept(self) -> int:
        """Return the number of pieces in files."""
        return len(list(self.folder.glob("*.safetensors")))

    def notes(self) -> list[str]:
        """Return a note on what a stopped command left: pieces that are taken up, and those of other settings."""
        of_others = len(list(self.folder.parent.glob("*/*.safetensors"))) - self.kept
        notes = [f"goes on: {self.kept} finished part(s) are taken from {self.folder}"] if self.kept else []
        if of_others:
            notes.append(
                f"{self.folder.parent} also holds {of_others} finished part(s) of a stopped command with other settings, or on "
                "another store; they are removed when this one is done, and --out DIR keeps them"
            )
        return notes

    def piece(self, name: str, sweep: Sweep, work: Callable[[], Facts | None]) -> Facts:
        """Return the facts of a piece of work on a sweep, which is done now, or was done before and is taken up.

        Arguments:
            work: adds heads to the sweep and returns facts for JSON.
        Raises: OSError: the piece cannot be written; those before it stay.
        """
        number = self._done + 1
        path = self.folder / f"{number:02}-{name}.safetensors"
        content = self.ranks.gathered(path.read_bytes() if self.ranks.first and path.is_file() else None)[0]
        facts = None if content is None else self._taken_up(path, content, sweep)
        if facts is None:
            heads, fitted, seconds, diverged = set(sweep.heads), sweep.fitted, sweep.fit_seconds, set(sweep.diverged)
            regressions = {name: set(solved) for name, solved in _regressions(sweep).items()}
            # facts go through JSON here as well, so that both ways lead to the same
            facts = json.loads(json.dumps(work() or {}))
            document, arrays = _state(sweep, heads, regressions)
            document |= {"key": self.key, "facts": facts, "fitted": sweep.fitted - fitted}
            document |= {"fit_seconds": sweep.fit_seconds - seconds}
            document["diverged"] = [head_entry(head) for head in sweep.diverged - diverged]
            if self.ranks.first:
                content = _file(document, arrays)
                with self.kill.around(f"method-{number}", size=len(content)):
                    write_durably(path, content)
        self._done = number
        return facts

    def _taken_up(self, path: Path, content: bytes, sweep: Sweep) -> Facts | None:
        """Restore a piece and return its facts; None, after a note, where the file is damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(content)
            text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["piece"]
            document = checked(path, json.loads(text), PieceShape, "it is fitted anew")
            if document["key"] != self.key:
                raise DataError(f"{path}: of other settings or of another store")
            _restore(sweep, document, arrays)
        except (DataError, SafetensorError, KeyError, ValueError, TypeError) as error:
            self.report(f"note: {path}: cannot be used, so this part is fitted anew ({error})")
            return None
        return document["facts"]


@contextmanager
def kept_at_signals(parts: Sequence[Unfinished]) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into Terminated, at once; its message says what is kept.

    Threads of Python other than the main one have no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with Signals() as signals:
        try:
            with signals.obeyed():
                yield
        except Exception as error:  # also that another rank is gone, which has had the signal too
            if not signals.received:
                raise
            stop = Terminated(_kept_text(parts))
            stop.exit_code = signals.exit_code
            raise stop from (None if isinstance(error, Obeyed) else error)


def remove_unfinished(out: Path) -> None:
    """Remove what was kept in a folder of results, once they are written."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def head_entry(head: HeadId, seed: int | None = None) -> Facts:
    """Return a head with its parameters, as `HeadId.from_dict` reads it."""
    return head.to_dict() | {"parameters": head.parameters, "seed": seed}


def _kept_text(parts: Sequence[Unfinished]) -> str:
    number = sum(unfinished.kept for unfinished in parts)
    if not number:
        return "stopped before the first method was finished, so nothing is kept; the same command begins again"
    return (
        f"stopped; {number} finished part(s) of the work are kept in {parts[0].folder.parent}: the same command goes on"
    )


def _regressions(sweep: Sweep) -> dict[str, dict[tuple[float, float], tuple[torch.Tensor, torch.Tensor]]]:
    """Return the logistic regressions that one method has solved and others take over, by the name of the training set."""
    return {
        name: part.samples.shared.setdefault("logistic regressions", {}) for name, part in sweep.training_sets.items()
    }


def _state(sweep: Sweep, heads: set, regressions: dict[str, set]) -> tuple[Facts, Arrays]:
    """Return what was added to a sweep beyond these heads and regressions."""
    keys = [key for key in sweep.heads if key not in heads]
    arrays: Arrays = {}
    for i, key in enumerate(keys):
        arrays |= {f"head.{i}.{j}": array for j, array in enumerate(sweep.heads[key].arrays)}
        if key in sweep.fold_logits:
            arrays[f"fold_logits.{i}"] = sweep.fold_logits[key]
        for split, scored in sweep.scored.items():
            for name in ("correct", "total", "hit"):
                arrays[f"{split}.{i}.{name}"] = getattr(scored[key], name)
    solved = [
        (name, point) for name, of in _regressions(sweep).items() for point in of if point not in regressions[name]
    ]
    for i, (name, point) in enumerate(solved):
        weight, bias = _regressions(sweep)[name][point]  # heads are float32, and only the bias is computed with
        arrays |= {f"regression.{i}.weight": weight.float().cpu().numpy(), f"regression.{i}.bias": bias.cpu().numpy()}
    return {
        "heads": [head_entry(head, seed) for head, seed in keys],
        "ece": {split: [scored[key].ece for key in keys] for split, scored in sweep.scored.items()},
        "regressions": [[name, *point] for name, point in solved],
    }, arrays


def _restore(sweep: Sweep, document: Facts, arrays: Arrays) -> None:
    keys = [(HeadId.from_dict(entry | {"seed": None}), entry["seed"]) for entry in document["heads"]]
    scorers = [
        scorer_of([arrays[f"head.{i}.{j}"] for j in range(sum(name.startswith(f"head.{i}.") for name in arrays))])
        for i in range(len(keys))
    ]
    scored = {
        split: {
            key: Scores(
                counts=sweep.features.counts,
                ece=ece,
                **{n: arrays[f"{split}.{i}.{n}"] for n in ("correct", "total", "hit")},
            )
            for i, (key, ece) in enumerate(zip(keys, eces, strict=True))
        }
        for split, eces in document["ece"].items()
    }
    solved = [
        (name, (rho, l2), tuple(torch.from_numpy(arrays[f"regression.{i}.{part}"]) for part in ("weight", "bias")))
        for i, (name, rho, l2) in enumerate(document["regressions"])
    ]
    sweep.heads |= dict(zip(keys, scorers, strict=True))
    for split, rows in scored.items():
        sweep.scored[split] |= rows
    sweep.fold_logits |= {key: arrays[f"fold_logits.{i}"] for i, key in enumerate(keys) if f"fold_logits.{i}" in arrays}
    sweep.diverged |= {HeadId.from_dict(entry) for entry in document["diverged"]}
    sweep.fitted += document["fitted"]
    sweep.fit_seconds += document["fit_seconds"]
    for name, point, layer in solved:
        weight, bias = (part.to(sweep.ranks.device) for part in layer)
        _regressions(sweep)[name][point] = weight, bias


def _file(document: Facts, arrays: Arrays) -> bytes:
    summary = {"method": document["facts"].get("method"), "heads": len(document["heads"])}
    metadata = {"header": json.dumps(header("unfinished", summary)), "piece": json.dumps(document)}
    return tensor_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
