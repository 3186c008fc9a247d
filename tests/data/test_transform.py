import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.dataset import Split
from pipeline.data.files import FileNames
from pipeline.data.transform import Loader, Transform, augment, channel_statistics
from pipeline.errors import DataError
from pipeline.seeds import uniform

CPU = torch.device("cpu")


def transform(kind="crop-flip", size=(8, 8)):
    return Transform(size=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), augment=kind)


def arrays(n=12):
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return Split(labels=np.arange(n) % 3, ids=np.arange(n) + 50, images=images)


@pytest.fixture
def files(tmp_path):
    names = []
    for i in range(12):
        names.append(f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
            tmp_path / names[-1]
        )
    return Split(labels=np.arange(12) % 3, ids=np.arange(12), stored=FileNames(names).below(tmp_path))


def test_normalise_by_hand():
    pixel = torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0.2 - 0.5) / 0.2, (0.4 - 0.4) / 0.3, (0.6 - 0.3) / 0.4]
    torch.testing.assert_close(transform().normalise(pixel).view(-1), torch.tensor(expected))


def test_channel_statistics_match_numpy():
    images = arrays().images
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), atol=1e-4)


def test_augment_is_a_crop_and_a_flip_of_the_padded_image():
    split = arrays()
    done = (
        augment(torch.from_numpy(split.images), padding=2, flip=True, ids=split.ids, key=9).permute(0, 2, 3, 1).numpy()
    )
    draws = uniform(9, split.ids, 3)
    for image, result, (dy, dx, flip) in zip(split.images, done, draws, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        top, left = int(dy * 5), int(dx * 5)
        crop = padded[top : top + 8, left : left + 8]
        assert (result == (crop[:, ::-1] if flip < 0.5 else crop)).all()
    assert len({(int(d[0] * 5), int(d[1] * 5)) for d in draws}) > 5


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_a_sample_looks_the_same_in_any_batch_and_worker(kind, files):
    split = arrays() if kind == "arrays" else files
    setting = transform("crop-flip" if kind == "arrays" else "resized-crop-flip")
    together = torch.cat(list(Loader(split, setting, device=CPU).batches([np.arange(12)], key=5)))
    pieces = [np.array([i]) for i in reversed(range(12))]
    workers = 0 if kind == "arrays" else 2
    alone = torch.cat(list(Loader(split, setting, device=CPU, workers=workers).batches(pieces, key=5)))
    assert torch.equal(together, alone.flip(0))
    other = torch.cat(list(Loader(split, setting, device=CPU).batches([np.arange(12)], key=6)))
    assert not torch.equal(together, other)


def test_evaluation_is_the_plain_image(files):
    split = arrays()
    (plain,) = Loader(split, transform(), device=CPU).batches([np.array([3])])
    torch.testing.assert_close(plain, transform().normalise(torch.from_numpy(split.images[3:4]).permute(0, 3, 1, 2)))
    (cropped,) = Loader(files, transform(), device=CPU).batches([np.array([3])])
    assert cropped.shape == (1, 3, 8, 8)


def test_a_loader_can_be_used_again(files):
    loader = Loader(files, transform("none"), device=CPU, workers=1)
    first, second = (torch.cat(list(loader.batches([np.arange(5), np.arange(5, 8)]))) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_named(files, workers):
    (files.stored.root / "7.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"7\.png: unreadable image"):
        list(Loader(files, transform("none"), device=CPU, workers=workers).batches([np.arange(12)]))


def test_files_are_resized_and_cut_as_timm_does_it(files):
    from timm.data import create_transform

    wanted = create_transform((3, 30, 30), crop_pct=0.95, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    ours = Transform((30, 30), (0, 0, 0), (1, 1, 1), "none", crop_pct=0.95, interpolation="bicubic")
    (pixels,) = Loader(files, ours, device=CPU, workers=0).batches([np.arange(3)], key=None)
    for i in range(3):
        torch.testing.assert_close(pixels[i], wanted(Image.open(files.stored[i])))
