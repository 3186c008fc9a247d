"""`pipeline bench cache`: the feature store over a plain array file and a bare encoder."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cache import open_cache, verify
from pipeline.bench.dump import dumping, empty_store, writing
from pipeline.bench.measure import Benchmark, Measure, interleaved, machine, ratio
from pipeline.distributed import choose_device
from pipeline.errors import ConfigError, PipelineError

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def bench_cache(
    *,
    rows: int = 115_846,
    width: int = 2048,
    repeat: int = 5,
    folder: Path | None = None,
    device: str = "auto",
    say: Callable[[str], object] = lambda text: None,
) -> Benchmark:
    """Return ratios of the store on generated features (rows, width), the page cache warm and checksums on.

    The default size is ImageNet-LT's training split.

    Arguments:
        folder: of the temporary files, which are removed; by default the system's.
    Raises:
        ConfigError: `folder` is no folder.
        PipelineError: its disk has too little room.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give --folder a place for temporary files")
    started, target = time.perf_counter(), choose_device(device)
    with tempfile.TemporaryDirectory(prefix="bench-cache.", dir=folder) as name:
        place = Path(name)
        _room(place, rows * width * 2 * max(BYTES.values()))
        measures = list(dumping(place, rows=rows, repeat=repeat, device=target, say=say))
        measures += [writing(place, rows=rows, width=width, dtype=dtype, repeat=repeat) for dtype in BYTES]
        for dtype in BYTES:
            measures += reading(place, rows, width, dtype, repeat=repeat, say=say)
    settings = {"rows": rows, "width": width, "repeat": repeat}
    return Benchmark(
        "cache", machine(device=str(target)), settings, tuple(measures), round(time.perf_counter() - started, 1)
    )


def reading(
    place: Path, rows: int, width: int, dtype: str, *, repeat: int, say: Callable[[str], object]
) -> Iterator[Measure]:
    """Yield the rates of loading the training features and of verifying the store over np.load of the same bytes."""
    say(f"{dtype}: {rows:,} × {width}, {rows * width * BYTES[dtype] / 1e6:,.0f} MB")
    path, plain = generated(place / f"{dtype}.zarr", rows, width, dtype), place / f"{dtype}.npy"
    np.save(plain, open_cache(path).read_bits("train"))
    functions = {
        "np.load": lambda: np.load(plain),
        "load": lambda: open_cache(path).read_bits("train"),
        "verify": lambda: verify(path),
    }
    seconds = interleaved(functions, repeat=repeat)
    gigabytes = plain.stat().st_size / 1e9
    why = "where the store is small, opening it takes longer than reading; else others use the CPUs its threads need"
    for name, target in ("load", 0.8), ("verify", 0.5):
        yield ratio(
            f"{name} over np.load, {dtype}", seconds, name, "np.load", work=gigabytes, unit="GB", target=target, why=why
        )
    plain.unlink()
    shutil.rmtree(path)


def generated(path: Path, rows: int, width: int, dtype: str, *, chunks: int = 1) -> Path:
    """Write a sealed store of normal numbers, one training view of at least `chunks` chunks."""
    with empty_store(path, rows, width, dtype, chunks=chunks) as writer:
        for chunk in writer.missing():
            rng = np.random.default_rng([chunk.index, rows])
            writer.write(chunk, rng.standard_normal((chunk.rows, width), np.float32))
        writer.seal()
    return path


def _room(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed * 1.1:
        raise PipelineError(
            f"{place.parent}: {free / 1e9:.1f} GB are free, {needed * 1.1 / 1e9:.1f} GB are needed; "
            "choose another place with --folder, or fewer --rows"
        )
