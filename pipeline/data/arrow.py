"""Images in the rows of Arrow files: mapped into memory by whoever needs one, decoded there."""

import contextlib
import io
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.files import FileNames
from pipeline.data.images import decode_image
from pipeline.errors import DataError

AT_ONCE = 1 << 16  # rows whose names are text at a time


def read_table(files: tuple[str, ...]) -> Any:
    """One pyarrow.Table over the rows of Arrow files in order, nothing copied; DataError names a damaged file."""
    import pyarrow as pa

    tables = []
    for file in files:
        try:
            mapped = pa.memory_map(file)
            if mapped.read(6) == b"ARROW1":  # the format with a footer; `datasets` itself writes the one without
                mapped.seek(0)
                tables.append(pa.ipc.open_file(mapped).read_all())
            else:
                mapped.seek(0)
                tables.append(pa.ipc.open_stream(mapped).read_all())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file}: damaged or no Arrow file ({error}); make it again") from error
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(f"{files[0]} and {len(files) - 1} more: their columns differ ({error})") from error


@dataclass(frozen=True)
class ArrowColumn:
    """Row → image, of a column of Arrow files that holds encoded images: binary, or struct<bytes, path>.

    Where a row has a path instead of bytes it is that file, below `root` if it is relative. A copy in another process maps
    the files itself. `origin` is what a person calls these rows.
    """

    files: tuple[str, ...]
    column: str
    origin: str
    root: Path

    def __reduce__(self):
        return type(self), (self.files, self.column, self.origin, self.root)

    def __call__(self, row: int) -> Image.Image:
        """The image as 8-bit RGB; DataError names the row of one that cannot be decoded."""
        content, path = self._cell(row)
        if content is None and path is None:
            raise DataError(f"{self.name_of(row)}: unreadable image (the row has none); take the row away")
        content_or_file = io.BytesIO(content) if content is not None else Path(self.root, path or "")
        return decode_image(content_or_file, self.name_of(row))

    def name_of(self, row: int) -> str:
        """Return the name of a row for people: its place, and the file name of its image if that is recorded."""
        _, path = self._cell(row)
        return f"{self.origin}, row {row}" + (f" ({path})" if path else "")

    def contents(self, row: int) -> bytes:
        """The bytes of the image as stored; none where its file cannot be opened."""
        content, path = self._cell(row)
        if content is None and path is not None:
            with contextlib.suppress(OSError):  # who reads the image says what is wrong
                return Path(self.root, path).read_bytes()
        return content or b""

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n,) int64 bytes of every row's image, found without touching the images; 0 where there is none."""
        import pyarrow.compute as pc

        lengths = pc.fill_null(pc.binary_length(self._part("bytes")), -1)
        sizes = np.concatenate(
            [np.zeros(0, np.int64), *(chunk.to_numpy(zero_copy_only=False) for chunk in lengths.chunks)]
        )
        elsewhere = np.flatnonzero(sizes < 0)
        if len(elsewhere) and self._struct:
            names = FileNames(path or "" for path in self.paths(elsewhere))
            sizes[elsewhere] = names.below(self.root).sizes
        return np.maximum(sizes, 0).astype(np.int64)

    def paths(self, rows: np.ndarray) -> list[str | None]:
        """The name of each row's image file, relative to `root` where it lies below it; None where none is known."""
        if not self._struct:
            return [None] * len(rows)
        root = os.path.join(self.root, "")
        names = self._part("path").take(rows).to_pylist()
        return [path and path.removeprefix(root) for path in names]

    @cached_property
    def _cells(self) -> Any:
        return read_table(self.files)[self.column]

    @property
    def _struct(self) -> bool:
        import pyarrow as pa

        return pa.types.is_struct(self._cells.type)

    def _part(self, name: str) -> Any:
        import pyarrow.compute as pc

        return pc.struct_field(self._cells, name) if self._struct else self._cells

    def _cell(self, row: int) -> tuple[bytes | None, str | None]:
        cell = self._cells[row].as_py()
        return (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)


@dataclass(frozen=True, eq=False)
class ArrowRows:
    """The images in some rows of a column, in order."""

    reader: ArrowColumn
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> int:
        """The row of image i; what `reader` takes."""
        return int(self.rows[i])

    def name_of(self, i: int) -> str:
        """Return the name of image i for people."""
        return self.reader.name_of(self[i])

    def take(self, rows: np.ndarray) -> "ArrowRows":
        """The images at the given positions, in that order."""
        return replace(self, rows=self.rows[rows])

    def feed(self, sha: Any, without: Collection[int], limit: int) -> str:
        """Adds names, sizes and, where they are at most `limit` bytes in all, the encoded images to a hash; says which.

        without: positions whose images may be anything: they count as empty. How rows are spread over files is no part.
        """
        sizes = self.reader.sizes[self.rows]
        sizes[list(without)] = 0
        contents = int(sizes.sum()) <= limit
        for a in range(0, len(self), AT_ONCE):
            rows = self.rows[a : a + AT_ONCE]
            for row, path, size in zip(rows, self.reader.paths(rows), sizes[a : a + AT_ONCE].tolist(), strict=True):
                sha.update(b"%b\0%d\0" % (os.fsencode(path or ""), size))
                if contents and size:
                    sha.update(self.reader.contents(int(row)))
        return "image contents" if contents else "image names and sizes"
