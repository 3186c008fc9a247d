"""The record of a run: what each stage was made from, which files it wrote, and the seconds it took."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.provenance import provenance
from pipeline.results.documents import read_record
from pipeline.results.files import write_artefact


class Ledger:
    """The stages in `run.json` of a run, or in `reproduce.json`.

    Arguments:
        path: the file; what it holds of earlier runs is read at once.
    Attributes:
        stages: seconds, digest of the inputs, digests of the files written, and further facts of each stage by name.
        redone: names of the stages that were recorded since, in order.
    """

    def __init__(self, path: Path):
        self.path, self.redone = path, list[str]()
        self.stages: dict[str, dict[str, Any]] = read_record(path).get("stages", {})

    def up_to_date(self, stage: str, inputs: Any) -> bool:
        """Return True where a stage was made from these inputs and no file that it wrote has changed since."""
        entry = self.stages.get(stage, {})
        outputs = entry.get("outputs", {})
        unchanged = all(file_digest(self.path.parent / name) == digest for name, digest in outputs.items())
        return entry.get("inputs") == _digest(inputs) and bool(outputs) and unchanged

    def outputs(self, stage: str) -> list[Path]:
        return [self.path.parent / name for name in self.stages[stage]["outputs"]]

    def record(
        self, stage: str, seconds: float, *, inputs: Any = None, outputs: Sequence[Path] = (), **facts: Any
    ) -> None:
        """Note a stage that was done just now; `write` makes it durable."""
        self.redone.append(stage)
        self.stages[stage] = {
            "seconds": round(seconds, 2),
            "inputs": _digest(inputs),
            "outputs": {str(p.relative_to(self.path.parent)): file_digest(p) for p in outputs},
            **facts,
        }

    def write(self, *, command: str, **facts: Any) -> None:
        write_artefact(self.path, "record", provenance(command=command, stages=self.stages, **facts))


def file_digest(path: Path) -> str | None:
    """Return the sha256 of a file's content, or None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
