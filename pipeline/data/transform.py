"""From stored pixels to network input, the same in training, dumping and prediction; augmentation keyed per sample."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from pipeline.data.copies import on_device
from pipeline.data.dataset import Split
from pipeline.data.operations import cutout
from pipeline.data.policies import apply, drawn
from pipeline.data.processes import decoding_processes, end_with_parent
from pipeline.errors import DataError, PipelineError
from pipeline.seeds import derive, uniform

Wanted = tuple[Any, int, int | None]
Side = Annotated[int, Field(ge=1, le=1 << 16)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCK = 4 << 20  # bytes of images that are augmented at once: many batches of small ones
WITHOUT_WORKERS = (
    "the same command goes on: --set data.workers=0 reads without such processes, in a container more --shm-size helps"
)
UNUSED = {"policy": "none", "rand_n": 2, "rand_m": 9, "cutout": 0}


@dataclass(frozen=True)
class Transform:
    """The way from an image to the input of a network.

    In training, `augment` moves and mirrors, then `policy` changes colours and shapes, then Cutout removes a square.

    Arguments:
        size: (height, width) of the input.
        mean, std: of each channel, in 0…1.
        crop_pct, interpolation: of files in evaluation, as timm defines them.
        rand_n, rand_m: number and strength of the operations of policy randaugment.
        cutout: side of the square in pixels, 0 for none.
    """

    size: tuple[Side, Side]
    mean: tuple[Number, Number, Number]
    std: tuple[Deviation, Deviation, Deviation]
    augment: Literal["crop-flip", "crop", "resized-crop-flip", "none"]
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    interpolation: Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bilinear"
    policy: Literal["none", "autoaugment-cifar10", "autoaugment-imagenet", "randaugment"] = "none"
    rand_n: Annotated[int, Field(ge=1)] = 2
    rand_m: Annotated[int, Field(ge=0, le=30)] = 9
    cutout: Annotated[int, Field(ge=0)] = 0

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def from_dict(cls, facts: dict[str, Any], origin: str = "a transform") -> "Transform":
        """Return the transform that `to_dict` gave; DataError names origin and the field that is wrong."""
        try:
            return _checked_transform().validate_python(facts)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(map(str, ("transform", *problem["loc"])))
            raise DataError(f"{origin}: {field}: {problem['msg']} (got {problem['input']!r})") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what is not used of what came later: the identity of what was made before stays."""
        facts = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in facts.items() if UNUSED.get(k) != v}

    @property
    def padding(self) -> int:
        """Pixels added to each side before a random crop: 4 at size 32."""
        return max(1, max(self.size) // 8)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → float32, channels at mean 0 and standard deviation 1."""
        mean, std = _moments(self.mean, self.std, images.device)
        return images.float().sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _moments(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 3, 1, 1) each, in 0…255; kept on the device, where a copy a batch would make a GPU wait."""
    first, second = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (mean, std))
    return first, second


@lru_cache(maxsize=1)
def _checked_transform() -> TypeAdapter[Transform]:
    return TypeAdapter(Transform)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel of (N, H, W, 3) uint8, in 0…1, rounded to 4 digits."""
    pixels = images.reshape(-1, 3)
    counts = np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(3)]).astype(np.float64)
    values = np.arange(256) / 255
    mean = counts @ values / len(pixels)
    std = np.sqrt(np.maximum(counts @ values**2 / len(pixels) - mean**2, 1e-8))
    return tuple(float(m) for m in mean.round(4)), tuple(float(s) for s in std.round(4).clip(1e-4))


def drawn_ids(ids: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return augmentation ids of images: their ids (below 2⁴⁰) when first drawn in an epoch, others when drawn again."""
    return ids + (draws << 40)


def augment(images: Tensor, *, padding: int, flip: bool, ids: np.ndarray, key: int) -> Tensor:
    """(B, 3, H, W): random crops after zero padding, some mirrored, of images (B, H, W, 3) uint8, by one gather.

    Sample i is moved by a function of (key, ids[i]) alone, so neither batch nor rank nor worker changes it.
    """
    batch, height, width, _ = images.shape
    draws = uniform(key, ids, 3)
    top, left = on_device((draws[:, :2] * (2 * padding + 1)).astype(np.int64).T, images.device)
    windows = F.pad(images, (0, 0, padding, padding, padding, padding)).unfold(1, height, 1).unfold(2, width, 1)
    crops = windows[torch.arange(batch, device=images.device), top, left]
    if not flip:
        return crops
    mirrored = on_device(draws[:, 2] < 0.5, images.device)
    return torch.where(mirrored[:, None, None, None], crops.flip(3), crops)


def cut_out(images: Tensor, transform: Transform, *, ids: np.ndarray, key: int) -> Tensor:
    """Images (B, 3, H, W) uint8 with transform.cutout pixels square of the mean colour, each around any of its pixels."""
    if not transform.cutout:
        return images
    places = uniform(derive(key, "cutout"), ids, 2) * images.shape[-2:]
    fill = np.array([round(255 * m) for m in transform.mean], np.uint8)
    centres, colour = (on_device(array, images.device) for array in (places.astype(np.int64), fill))
    return cutout(images, centres, size=transform.cutout, fill=colour)


class Loader:
    """Batches of one split, normalised, on a device. In-memory images stay there as uint8; files are decoded in workers."""

    def __init__(self, split: Split, transform: Transform, *, device: torch.device, workers: int = 0):
        self.split, self.transform, self.device = split, transform, device
        self._plan = _Plan()
        if split.images is not None:
            self._images = torch.from_numpy(split.images).to(device)
        else:
            self._files: DataLoader[Any] = DataLoader(
                ImageFiles(split, transform),
                batch_sampler=self._plan,
                collate_fn=collate,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
                multiprocessing_context=decoding_processes() if workers else None,
                worker_init_fn=end_with_parent if workers else None,
            )

    def batches(
        self,
        rows: Sequence[np.ndarray],
        key: int | None = None,
        *,
        draws: Sequence[np.ndarray] | None = None,
        unreadable: Callable[[int], object] | None = None,
    ) -> Iterator[Tensor]:
        """Yield normalised images (len(rows[k]), 3, H, W) for each array of positions; key None = evaluation transform.

        With a key, sample i is augmented as a function of (key, id of i, draw), draw 0 where draws, shaped like rows, are
        not given. unreadable: called with the position of each image that cannot be read before its batch comes, where it
        is black; without it DataError names the file.
        """
        ids = [self.split.ids[positions] for positions in rows]
        if draws is not None:
            ids = [drawn_ids(split_ids, nth) for split_ids, nth in zip(ids, draws, strict=True)]
        if self.split.images is not None:
            batch_ids = iter(ids)
            pixels = max(math.prod(self.split.images.shape[1:3]), math.prod(self.transform.size))
            for block in _blocks(rows, limit=BLOCK // (3 * pixels)):
                images = self._take(np.concatenate(block), np.concatenate([next(batch_ids) for _ in block]), key)
                for batch in images.split([len(positions) for positions in block]):
                    yield self.transform.normalise(batch)
            return
        self._plan.batches = (wanted(self.split, *batch, key=key) for batch in zip(rows, ids, strict=True))
        for positions, (images, reasons) in zip(rows, from_workers(self._files), strict=True):
            bad = [(int(i), reason) for i, reason in zip(positions, reasons, strict=True) if reason]
            for position, reason in bad:
                if unreadable is None:
                    more = f" (and {len(bad) - 1} more in the same batch)" if len(bad) > 1 else ""
                    raise DataError(f"{reason}{more}; or leave such images out: --on-error skip")
                unreadable(position)
            yield self.transform.normalise(images.to(self.device, non_blocking=True))

    def _take(self, positions: np.ndarray, ids: np.ndarray, key: int | None) -> Tensor:
        """uint8 (B, 3, H, W)."""
        transform, stored = self.transform, self._images[on_device(positions, self.device)]
        if stored.shape[1:3] != transform.size:
            mode = InterpolationMode(transform.interpolation)
            resized = v2.functional.resize(stored.permute(0, 3, 1, 2), list(transform.size), mode, antialias=True)
            stored = resized.permute(0, 2, 3, 1)
        if key is None or transform.augment == "none":
            images = stored.permute(0, 3, 1, 2).contiguous()
        else:
            images = augment(stored, padding=transform.padding, flip="flip" in transform.augment, ids=ids, key=key)
        if key is None:
            return images
        if transform.policy != "none":
            height, width = transform.size
            plan = drawn(
                transform.policy,
                ids,
                derive(key, "policy"),
                height=height,
                width=width,
                rand_n=transform.rand_n,
                rand_m=transform.rand_m,
            )
            images = apply(plan, images)
        return cut_out(images, transform, ids=ids, key=key)


def from_workers(files: "DataLoader[Any]", advice: str = WITHOUT_WORKERS) -> Iterator[tuple[Tensor, list[str | None]]]:
    """Yield the result of `collate` for each batch; raise PipelineError with advice where a reading process is gone."""
    try:
        for images, reasons in files:
            yield torch.from_numpy(images) if isinstance(images, np.ndarray) else images, reasons
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise PipelineError(
            f"{first}: a process that reads images was ended, mostly for lack of memory; {advice}"
        ) from error


def _blocks(rows: Sequence[np.ndarray], *, limit: int) -> Iterator[list[np.ndarray]]:
    """The arrays in order, in lists of at most `limit` rows together, or of one array that is longer."""
    block: list[np.ndarray] = []
    for positions in rows:
        if block and sum(map(len, block)) + len(positions) > limit:
            yield block
            block = []
        block.append(positions)
    if block:
        yield block


class _Plan:
    """The batches of the next pass; an object of its own so that worker processes outlive an epoch."""

    batches: Iterable[list[Wanted]]

    def __init__(self):
        self.batches = []

    def __iter__(self):
        return iter(self.batches)


def wanted(split: Split, positions: np.ndarray, ids: np.ndarray, *, key: int | None) -> list[Wanted]:
    """(where the image lies, the id that its augmentation is drawn from, key): all that a worker needs to know of a split."""
    assert split.stored is not None
    return [(split.stored[i], int(name), key) for i, name in zip(positions, ids, strict=True)]


class ImageFiles(torch.utils.data.Dataset):
    """Map-style data set over stored images; (where, id, key) → uint8 (3, H, W) or an error text, collated per batch.

    It holds none of the split: of half a million names, workers get those of their batches.
    """

    def __init__(self, split: Split, transform: Transform):
        assert split.stored is not None
        self.read, self.size, self.transform = split.stored.reader, transform.size, transform
        height, width = transform.size
        interpolation = InterpolationMode(transform.interpolation)
        shorter = math.floor(min(height, width) / transform.crop_pct)  # as timm rounds
        self.evaluate = v2.Compose(
            [v2.Resize(shorter, interpolation=interpolation), v2.CenterCrop(transform.size), v2.PILToTensor()]
        )
        moves: dict[str, list] = {
            "none": [v2.Resize(shorter, interpolation=interpolation), v2.CenterCrop(transform.size)],
            "resized-crop-flip": [
                v2.RandomResizedCrop(transform.size, interpolation=interpolation),
                v2.RandomHorizontalFlip(),
            ],
        }
        crop = [
            v2.Resize(transform.size, interpolation=interpolation),
            v2.RandomCrop(transform.size, padding=transform.padding),
        ]
        moves |= {"crop": crop, "crop-flip": [*crop, v2.RandomHorizontalFlip()]}
        policies: dict[str, list] = {
            "none": [],
            "autoaugment-cifar10": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
            "autoaugment-imagenet": [v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)],
            "randaugment": [v2.RandAugment(transform.rand_n, transform.rand_m)],
        }
        self.train = v2.Compose([*moves[transform.augment], *policies[transform.policy], v2.PILToTensor()])

    def __getitems__(self, requests: list[Wanted]):
        return [self._one(*request) for request in requests]

    def _one(self, location: Any, ident: int, key: int | None):
        try:
            image = self.read(location)
        except DataError as error:
            return torch.zeros(3, *self.size, dtype=torch.uint8), str(error)
        if key is None:
            return self.evaluate(image), None
        with torch.random.fork_rng(devices=[]):  # v2 draws from torch's generator: seed it for this sample only
            torch.manual_seed(derive(key, "augment", ident))
            pixels = self.train(image)
        return cut_out(pixels[None], self.transform, ids=np.array([ident]), key=key)[0], None


def collate(samples: list[tuple[Tensor, str | None]]) -> tuple[Tensor | np.ndarray, list[str | None]]:
    """(images (B, 3, H, W) uint8, why each could not be read, None where it could).

    In a worker the images are put into shared memory here, where an error reaches the reader; where that is too small, as
    /dev/shm of a container is, they are an array, which goes through a pipe.
    """
    images, reasons = torch.stack([image for image, _ in samples]), [reason for _, reason in samples]
    if torch.utils.data.get_worker_info() is None:
        return images, reasons
    try:
        return images.share_memory_(), reasons
    except (RuntimeError, OSError):
        return images.numpy(), reasons
