"""Whatever bytes a file holds, it is an RGB image or an error that names it."""

import io
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.images import read_image
from pipeline.data.transform import ImageFiles, Loader, Transform
from pipeline.errors import DataError, PipelineError

PLAIN = Transform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "none")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.filterwarnings("ignore")  # Pillow's own remarks on such files
def test_damaged_files_of_every_kind(kind, tmp_path):
    random, held = np.random.default_rng(5), io.BytesIO()
    Image.fromarray(random.integers(0, 256, (17, 23, 3)).astype(np.uint8)).save(held, kind)
    good, file, refused = held.getvalue(), tmp_path / f"a.{kind.lower()}", 0
    for n in range(80):
        damaged = bytearray(good[: random.integers(1, len(good))] if n % 4 == 0 else good)
        for _ in range(random.integers(1, 9)):
            damaged[random.integers(0, min(len(damaged), 200))] = random.integers(0, 256)
        file.write_bytes(damaged)
        outcome = what_becomes_of(file)
        assert outcome == "RGB" or outcome.startswith(f"{file}: unreadable image (")
        refused += outcome != "RGB"
    assert refused > 10


def what_becomes_of(file) -> str:
    try:
        return read_image(file).mode
    except DataError as error:
        return str(error)


def files(tmp_path, count: int) -> Split:
    for n in range(count):
        Image.new("RGB", (9, 9), (n, 0, 0)).save(tmp_path / f"{n}.png")
    rows = np.arange(count)
    return Split(labels=rows, ids=rows, stored=FileNames(f"{n}.png" for n in range(count)).below(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_told_before_their_batch_and_are_black(workers, tmp_path):
    split = files(tmp_path, 6)
    for n in (1, 4):
        (tmp_path / f"{n}.png").write_bytes(b"no image")
    loader, told = Loader(split, PLAIN, device=torch.device("cpu"), workers=workers), []
    batches = [np.array([4, 0]), np.array([1, 2, 3]), np.array([5])]
    for images, expected in zip(loader.batches(batches, unreadable=told.append), [[4], [4, 1], [4, 1]], strict=True):
        assert told == expected
        if len(images) > 1:
            assert images[0].eq(-1).all()
            assert not images[1, 1:].ne(-1).any()
    with pytest.raises(DataError, match=r"4\.png: unreadable image .* or leave such images out: --on-error skip"):
        list(loader.batches(batches))


class Deadly(ImageFiles):
    """Image files of which reading any ends the process."""

    def _one(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_loading_process_is_an_error_that_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.transform.ImageFiles", Deadly)
    loader = Loader(files(tmp_path, 2), PLAIN, device=torch.device("cpu"), workers=1)
    with pytest.raises(PipelineError, match=r"was ended, mostly for lack of memory.*--set data\.workers=0"):
        list(loader.batches([np.array([0, 1])]))
