"""Images that could not be read when a store was made: which, whether they can be read by now, and how it is told."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cache import CacheError, open_writer
from pipeline.data import Dataset
from pipeline.errors import DataError

Rows = Mapping[str, Sequence[int]]  # split → rows


def skipped_before(store: Path | str, dataset: Dataset) -> Rows:
    """Rows without features in the store that is there, none where there is no store of such a data set."""
    try:
        skipped = open_writer(store).skipped
    except CacheError:  # who makes or continues the store says why
        return {}
    rows = {name: len(split) for name, split in dataset.splits.items()}
    return {} if any(max(of) >= rows.get(name, 0) for name, of in skipped.items()) else skipped


def readable_now(skipped: Rows, dataset: Dataset, *, store: Path | str, may_skip: bool) -> Rows:
    """The skipped rows whose images can be read by now; DataError where the others may not be skipped again."""
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


def told(skipped: Mapping[str, Sequence[str]], most: int = 5) -> str:
    """What a person is told of images (split → their names) that were left out; nothing where there are none."""
    names = [name for of in skipped.values() for name in of]
    if not names:
        return ""
    where = ", ".join(f"{len(of)} {split}" for split, of in skipped.items())
    listed = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return (
        f"{len(names)} image(s) could not be read ({where}) and are left out of all that follows: {listed}; "
        "the same command tries them again"
    )
