"""Images that could not be read when a store was made: their rows, those that can be read by now, and a text on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cache import CacheError, open_writer
from pipeline.data import Dataset
from pipeline.errors import DataError

Rows = Mapping[str, Sequence[int]]  # split → rows


def skipped_before(store: Path | str, dataset: Dataset) -> Rows:
    """Return the rows without features in a store; none where there is no store of such a data set."""
    try:
        skipped = open_writer(store).skipped
    except CacheError:  # who makes or continues the store says why
        return {}
    rows = {name: len(split) for name, split in dataset.splits.items()}
    return {} if any(max(missing) >= rows.get(name, 0) for name, missing in skipped.items()) else skipped


def readable_now(skipped: Rows, dataset: Dataset, *, store: Path | str, may_skip: bool) -> Rows:
    """Return the skipped rows whose images can be read by now; raise DataError where the rest may not be skipped again."""
    readable: dict[str, list[int]] = {}
    refused = []
    for name, rows in skipped.items():
        for row in rows:
            try:
                dataset.splits[name].read(row)
                readable.setdefault(name, []).append(row)
            except DataError as error:
                refused.append(str(error))
    if refused and not may_skip:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise DataError(
            f"{store}: was made without {refused[0]}{more}; or keep leaving such images out: --on-error skip"
        )
    return readable


def skipped_text(skipped: Mapping[str, Sequence[str]], most: int = 5) -> str:
    """Return a sentence on the images (split → their names) that were left out; empty where there are none."""
    names = [name for split_names in skipped.values() for name in split_names]
    if not names:
        return ""
    sizes = ", ".join(f"{len(split_names)} {split}" for split, split_names in skipped.items())
    examples = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return (
        f"{len(names)} image(s) could not be read ({sizes}) and are left out of all that follows: {examples}; "
        "the same command tries them again"
    )
