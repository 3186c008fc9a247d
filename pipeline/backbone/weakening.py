"""Major feature weakening: the features of large classes are mixed with others of the batch while training.

A reconstruction from the abstract of Procrustean training (ICCV 2021), which states the idea and not the rule. The rule
here, every constant a parameter, with N_c training images of class c:

    z̃_i = l_i·z_i + (1 − l_i)·z_j(i),   label y_i kept,   l_i ~ U(1 − a·r_{y_i}, 1)
    r_c  = ((N_c − N_min) / (N_max − N_min))^γ,   0 where all classes are equally large

j permutes groups of m consecutive rows of the global batch at random, and a group lies on one rank, so that the number of
ranks does not decide the result.
"""

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import WeakenConfig, nearest
from pipeline.data.copies import on_device
from pipeline.errors import ConfigError
from pipeline.seeds import derive, uniform

FEATURES = "features"  # the place between encoder and classifier; any other name is a module's


def weakening_strength(counts: np.ndarray, *, gamma: float = 1.0) -> np.ndarray:
    """Return (C,) r_c in 0…1: how much a class of counts (C,) images is weakened, 0 for the smallest, 1 for the largest."""
    counts = np.asarray(counts, dtype=np.float64)
    span = counts.max() - counts.min()
    return ((counts - counts.min()) / span) ** gamma if span else np.zeros_like(counts)


def keep_share(draws: np.ndarray, r: np.ndarray, *, strength: float) -> np.ndarray:
    """Return (B,) l_i ~ U(1 − a·r_i, 1) from uniform draws in [0, 1); 1 exactly where r is 0. Its mean is 1 − a·r_i/2."""
    return 1 - strength * r * draws


def partners(draws: np.ndarray, *, group: int) -> np.ndarray:
    """Return (B,) j(i): a permutation of each run of `group` rows, the last one shorter, in the order of the draws (B,)."""
    row = np.arange(len(draws))
    permuted = np.lexsort((draws, row // group))  # rows of a group stay together, in the order of their draws
    return permuted.astype(np.int64)


def mix(features: Tensor, keep: Tensor, partner: Tensor, *, detach_partner: bool = False) -> Tensor:
    """Return keep_i·z_i + (1 − keep_i)·z_partner(i) of features (B, …); in the precision of keep, returned in the features'."""
    partner_features = features[partner]
    if detach_partner:
        partner_features = partner_features.detach()
    keep = keep.view(-1, *[1] * (features.dim() - 1))
    return (keep * features + (1 - keep) * partner_features).to(features.dtype)


class Weakening:
    """The weakening of every step of a training: a function of (seed, epoch, step, sample) alone."""

    def __init__(
        self, settings: WeakenConfig, labels: np.ndarray, counts: np.ndarray, *, seed: int, device: torch.device
    ):
        self.settings, self.seed, self.device = settings, seed, device
        self._strength = weakening_strength(counts, gamma=settings.gamma)[labels]
        self.active = bool(settings.strength and self._strength.any())

    @property
    def group(self) -> int:
        """Return how many rows of the global batch stay on one rank and in one part of a batch."""
        return self.settings.group if self.active else 1

    def inputs(self, rows: np.ndarray, labels: Tensor, *, epoch: int, step: int) -> tuple[Tensor, ...]:
        """Return (keep (B,), partner (B,)) for the training positions of a part of a batch; () where nothing is weakened.

        Arguments:
            labels: (B,), negative for an image that could not be read, which is mixed with none.
        """
        if not self.active:
            return ()
        draws = uniform(derive(self.seed, "weaken", epoch, step), rows, 2)
        share = keep_share(draws[:, 0], self._strength[rows], strength=self.settings.strength)
        partner = on_device(partners(draws[:, 1], group=self.settings.group), self.device)
        keep = on_device(share.astype(np.float32), self.device)
        return torch.where(labels[partner] < 0, 1.0, keep), partner


@torch.no_grad()
def check_place(model: nn.Module, at: str, *, size: tuple[int, int], device: torch.device) -> None:
    """Raise ConfigError unless features can be mixed `at`: a module that gets the batch once, as its first input."""
    if at == FEATURES:
        return
    modules = dict(model.named_modules())
    places = [FEATURES, *(name for name, _ in model.named_modules() if name and name.count(".") < 2)]
    if not at or at not in modules:
        names = ", ".join(places[:40]) + (" …" if len(places) > 40 else "")
        raise ConfigError(f"backbone.weaken.at={at}: no such module{nearest(at, modules)}; known here: {names}")
    batch_first: list[bool] = []

    def look(module: nn.Module, inputs: tuple) -> None:
        batch_first.append(bool(inputs) and isinstance(inputs[0], Tensor) and len(inputs[0]) == 2)

    was_training, hook = model.training, modules[at].register_forward_pre_hook(look)
    try:
        model.eval()(torch.zeros(2, 3, *size, device=device))
    finally:
        hook.remove()
        model.train(was_training)
    if batch_first != [True]:
        fault = (
            f"is applied {len(batch_first)} times to a batch"
            if len(batch_first) != 1
            else "does not get the batch as it is"
        )
        raise ConfigError(
            f"backbone.weaken.at={at}: this module {fault}; take {FEATURES} or a stage, such as {places[-1]}"
        )
