"""What a method is: a few pure functions of tensors, and the settings that are tried.

Parameters carry leading dimensions (S, T): S batch orders, T trials that differ in learning rate and in numbers of their
own. Such a number is a tensor (T, 1), so that it broadcasts with what is per sample (…, B) and per class (…, C).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.longtail import log_prior

Params = dict[str, Tensor]
Own = Mapping[str, Any]
Head = tuple[Tensor, ...]  # weight (…, C, D), bias (…, C); of a gated head two of each, and its gate (…, D+1)
Samples = Callable[[], Iterator[tuple[Tensor, Tensor]]]
Sampling = Literal["instance", "class-balanced"]


@dataclass(frozen=True)
class Given:
    """What there is before training: counts (C,) of training images, the stage-1 head weight (C, D) and bias (C,),
    and length, the mean |x| of the training features.
    """

    counts: Tensor
    weight: Tensor
    bias: Tensor
    length: float = 1.0

    @property
    def log_prior(self) -> Tensor:
        """ln π (C,)."""
        return log_prior(self.counts)

    @property
    def norms(self) -> Tensor:
        """|W_c| (C,) of the stage-1 head."""
        return self.weight.norm(dim=1).clamp_min(torch.finfo(self.weight.dtype).tiny)


def from_stage_1(given: Given, random: np.random.Generator) -> Params:
    """Weight and bias of the stage-1 head."""
    return {"weight": given.weight, "bias": given.bias}


def as_it_is(params: Params, given: Given, own: Own) -> Head:
    """The trained weight and bias."""
    return params["weight"], params["bias"]


def unweighted(given: Given, own: Own, progress: float) -> Tensor | None:
    """Every class counts the same."""
    return None


@dataclass(frozen=True)
class Trained:
    """A method with a loss.

    loss(params, x, y, given, own): of every sample (…, B), for x (…, B, D) and y (…, B). head: what is deployed.
    class_weight(given, own, progress): weights (T, C) or (1, C) that make the batch's loss Σ w_y·l / Σ w_y; progress
    runs from 0 to 1 over the epochs. project: changes the parameters in place after each step. prior_in_loss: the loss
    itself makes up for the class sizes.

    own: the values tried. lr at batch: the literature's, on which the grid is centred, scaled in proportion to the batch;
    None: the configuration's. weight_decay None: the configuration's, or own["weight_decay"].
    """

    name: str
    loss: Callable[[Params, Tensor, Tensor, Given, Own], Tensor]
    start: Callable[[Given, np.random.Generator], Params] = from_stage_1
    head: Callable[[Params, Given, Own], Head] = as_it_is
    class_weight: Callable[[Given, Own, float], Tensor | None] = unweighted
    project: Callable[[Params, Given, Own], None] | None = None
    sampling: Sampling = "instance"
    prior_in_loss: bool = False
    own: tuple[dict[str, Any], ...] = ({},)
    lr: float | None = None
    batch: int = 128
    weight_decay: float | None = None

    @property
    def weights_classes(self) -> bool:
        """Whether its loss weighs samples by their class."""
        return self.class_weight is not unweighted


@dataclass(frozen=True)
class Free:
    """A method without training. solve(given, samples, own) gives weight (C, D) and bias (C,); samples() goes once over the
    clean training features, in blocks (x (n, D), y (n,)).
    """

    name: str
    solve: Callable[[Given, Samples, Own], tuple[Tensor, Tensor]]
    own: tuple[dict[str, Any], ...] = ({},)


Rule = Trained | Free
