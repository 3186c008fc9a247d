"""Encoder and classifier as the one module that DDP and torch.compile see."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.backbone.model import classifier, encode
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError


class Learner(nn.Module):
    """What is trained: images (B, 3, H, W) → logits (B, C)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.score(encode(self.model, images))

    def score(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D)."""
        return classifier(self.model)(features)


class Parallel:
    """A learner on every rank, its gradients averaged over them."""

    def __init__(self, learner: Learner, ranks: Ranks, *, sync_batch_norm: bool = False, mode: str = "none"):
        """mode: none, or the mode of torch.compile. sync_batch_norm: batch statistics of all ranks together, on GPUs."""
        self._module: nn.Module = learner
        if sync_batch_norm and ranks.world > 1:
            if ranks.device.type != "cuda":
                raise ConfigError("backbone.sync_batch_norm=true: only between GPUs; on CPUs set it to false")
            learner.model = nn.SyncBatchNorm.convert_sync_batchnorm(learner.model)
        if ranks.world > 1:
            # batch statistics are rank 0's at the next save or validation; training itself never reads them
            self._module = DistributedDataParallel(
                learner,
                device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )
        self._call: Callable[..., Tensor] = self._module
        if mode != "none":
            self._call = torch.compile(self._module, mode=mode)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._call(*inputs)

    def train(self) -> None:
        self._module.train()

    def summing(self, *, last: bool) -> AbstractContextManager:
        """Gradients of all but the last part of a batch stay on their rank; entered around forward and backward."""
        if last or not isinstance(self._module, DistributedDataParallel):
            return nullcontext()
        return self._module.no_sync()
