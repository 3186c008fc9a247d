"""The table of heads that exist, on one split: nothing is fitted and nothing is chosen."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import CacheError, open_cache
from pipeline.errors import DataError
from pipeline.method_names import start_name
from pipeline.paths import results_folder
from pipeline.rebalance.load import read_split
from pipeline.rebalance.sweep import score
from pipeline.results.head_id import HeadId
from pipeline.results.heads import read_heads_file
from pipeline.results.mean_std import MEASURES
from pipeline.results.rebalance_result import Row, over_seeds
from pipeline.results.table import Table
from pipeline.results.tables import evaluation_table
from pipeline.text import Shown


@dataclass(frozen=True)
class EvaluateResult(Shown):
    """The heads of a file on a split of a store.

    Arguments:
        settings: mean and NAME_std of every measure over the seeds of a head.
        left_out: samples without features, because their images could not be read.
        start: the name of the baseline (start_name).
    """

    store: str
    heads: str
    split: str
    results: tuple[Row, ...]
    settings: tuple[dict[str, Any], ...]
    left_out: int = 0
    start: str = "stage 1"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        return evaluation_table(self.to_dict())


def evaluate(store: Path | str, heads: Path | None = None, *, split: str = "test") -> EvaluateResult:
    """Score every head of a heads.safetensors on the clean view of train, val or test; nothing is fitted or chosen.

    Arguments:
        heads: by default those that `rebalance` left beside the store.
    Raises: DataError: a file is missing or damaged, or the heads are of another shape than the features.
    """
    try:
        cache = open_cache(store)
        if split not in cache.splits:
            raise DataError(f"{store}: no split {split}; it has {', '.join(cache.splits)}")
        features = read_split(cache, split)
    except CacheError as error:
        raise DataError(str(error)) from error
    beside = results_folder(store) / "heads.safetensors"
    heads = heads or beside
    file = read_heads_file(heads)
    file.refuse_other_store(cache, same_content=heads == beside)
    fitted = {(HeadId.of_row(entry), entry.get("seed")): head for entry, head in file.scorers}
    scored = score(fitted, features, np.asarray(cache.counts), torch.device("cpu"))
    rows = [
        Row(setting.method, setting.loss, setting.lam, seed, split, *(scores.summary[m] for m in MEASURES))
        for (setting, seed), scores in scored.items()
    ]
    by_setting: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        by_setting[row.method, row.loss, row.lam].append(row)
    settings = [
        {"method": method, "loss": loss, "lam": lam, "n": len(group)} | over_seeds(group)
        for (method, loss, lam), group in by_setting.items()
    ]
    left_out, start = len(cache.skipped(split)), start_name(cache.fingerprint)
    return EvaluateResult(str(store), str(heads), split, tuple(rows), tuple(settings), left_out, start)
