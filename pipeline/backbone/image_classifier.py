"""Encoder and classifier as the one module that DDP and torch.compile see."""

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.backbone.build import classifier, encode
from pipeline.backbone.weakening import FEATURES, mix
from pipeline.config import WeakenConfig
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError

LENGTH_MOMENTUM = 0.1


class ImageClassifier(nn.Module):
    """Images (B, 3, H, W) → logits (B, C); where a mixture is given, features are mixed on the way.

    Arguments:
        scale: s of a cosine classifier, whose logits are s·cos(W_c, x); None for a linear one, W·x + b.
    """

    length: Tensor

    def __init__(self, model: nn.Module, weaken: WeakenConfig | None = None, *, scale: float | None = None):
        super().__init__()
        self.model, self.weaken, self.scale = model, weaken or WeakenConfig(), scale
        self._mixture: tuple[Tensor, Tensor] | None = None
        if self.weaken.at != FEATURES:
            model.get_submodule(self.weaken.at).register_forward_pre_hook(self._mix_input)
        if scale is not None:
            head = classifier(model)
            # running mean of |x|, kept as batch normalisation keeps its own
            self.register_buffer("length", head.weight.new_ones(()))
            head.bias.data.zero_()
            head.bias.requires_grad_(False)  # takes no part

    def forward(self, images: Tensor, keep: Tensor | None = None, partner: Tensor | None = None) -> Tensor:
        """Return the logits; keep (B,) and partner (B,), in training, are those of `weakening.mix`."""
        if keep is None or partner is None:
            return self.score(encode(self.model, images))
        detach = self.weaken.detach_partner
        if self.weaken.at == FEATURES:
            return self.score(mix(encode(self.model, images), keep, partner, detach_partner=detach))
        self._mixture = (keep, partner)
        features = encode(self.model, images)
        if self._mixture is not None:
            raise RuntimeError(f"{self.weaken.at} was not applied, so nothing was mixed at its input")
        return self.score(features)

    def _mix_input(self, module: nn.Module, inputs: tuple) -> tuple | None:
        if self._mixture is None:
            return None
        (keep, partner), self._mixture = self._mixture, None
        return (mix(inputs[0], keep, partner, detach_partner=self.weaken.detach_partner), *inputs[1:])

    def score(self, features: Tensor) -> Tensor:
        """Return logits (B, C) of features (B, D); cosines are computed in float32 or better."""
        head = classifier(self.model)
        if self.scale is None:
            return head(features)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(head.weight.dtype)
            lengths = features.norm(dim=1, keepdim=True)
            if self.training:
                with torch.no_grad():
                    self.length.lerp_(lengths.mean(), LENGTH_MOMENTUM)
            unit = features / lengths.clamp_min(torch.finfo(features.dtype).tiny)
            return self.scale * F.linear(unit, F.normalize(head.weight))

    def model_state(self) -> dict[str, Tensor]:
        """Return the model's state with a classifier W·x + b that decides as `score` does.

        Of a cosine classifier: unit class vectors times s / mean |x|, no bias; its probabilities are those of a feature of
        mean length.
        """
        state = self.model.state_dict()
        if self.scale is not None:
            weight = classifier(self.model).weight
            name = next(name for name, value in self.model.named_parameters() if value is weight)
            state[name] = F.normalize(weight.detach()) * (self.scale / self.length)
        return state


class Parallel:
    """A network on every rank, its gradients averaged over them."""

    def __init__(self, network: ImageClassifier, ranks: Ranks, *, sync_batch_norm: bool = False, mode: str = "none"):
        """mode: none, or the mode of torch.compile. sync_batch_norm: batch statistics of all ranks together, on GPUs."""
        self._module: nn.Module = network
        if sync_batch_norm and ranks.world > 1:
            network.model = nn.SyncBatchNorm.convert_sync_batchnorm(network.model)
        if ranks.world > 1:
            # batch statistics are rank 0's at the next save or validation; training itself never reads them
            cuda = ranks.device.type == "cuda"
            with warnings.catch_warnings():  # torch 2.15 has another word for broadcast_buffers, which 2.9 lacks
                warnings.simplefilter("ignore", FutureWarning)
                self._module = DistributedDataParallel(
                    network,
                    device_ids=[ranks.device.index] if cuda else None,
                    # on a CPU views slow each step, and exchanging beside the computation takes its cores
                    gradient_as_bucket_view=cuda,
                    bucket_cap_mb=None if cuda else 1024,
                    broadcast_buffers=False,
                )
        self._call: Callable[..., Tensor] = self._module
        if mode != "none":
            if ranks.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
                raise ConfigError(f"backbone.compile={mode}: on a CPU it needs g++; install it, or take compile=none")
            # batches of an epoch differ by a row: two fixed shapes, each with its own kernels and CUDA graph
            self._call = torch.compile(self._module, mode=mode, dynamic=False)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._call(*inputs)

    def train(self) -> None:
        self._module.train()

    def summing(self, *, last: bool) -> AbstractContextManager:
        """Return the context of a forward and backward pass; gradients of all but the last part of a batch stay on their rank."""
        if last or not isinstance(self._module, DistributedDataParallel):
            return nullcontext()
        return self._module.no_sync()
