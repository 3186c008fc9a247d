"""A method of stage 2: a few pure functions of tensors, and the grid of hyperparameters that is tried.

Parameters have leading dimensions (S, T): S batch orders, T trials that differ in learning rate and in numbers of the
method. Such a number is a tensor (T, 1), so that it broadcasts with values per sample (…, B) and per class (…, C).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.linear.moments import Samples
from pipeline.longtail import log_prior

Params = dict[str, Tensor]
Values = Mapping[str, Any]  # hyperparameters of one trial by name
HeadTensors = tuple[Tensor, ...]  # weight (…, C, D), bias (…, C); of a gated head two of each, and its gate (…, D+1)
Sampling = Literal["instance", "class-balanced"]


@dataclass(frozen=True)
class Stage1:
    """The head and the class sizes that every method starts from.

    Arguments:
        counts: (C,) training images of each class.
        weight: (C, D).
        bias: (C,).
        length: mean |x| of the training features.
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
        """|W_c| (C,)."""
        return self.weight.norm(dim=1).clamp_min(torch.finfo(self.weight.dtype).tiny)


def from_stage_1(stage1: Stage1, random: np.random.Generator) -> Params:
    """Return weight and bias of the stage-1 head as the start."""
    return {"weight": stage1.weight, "bias": stage1.bias}


def trained_layer(params: Params, stage1: Stage1, values: Values) -> HeadTensors:
    """Return the trained weight and bias as the head."""
    return params["weight"], params["bias"]


def unweighted(stage1: Stage1, values: Values, progress: float) -> Tensor | None:
    """Return None: every class has the same weight."""
    return None


@dataclass(frozen=True)
class Trained:
    """A method with a loss.

    Arguments:
        loss: loss(params, x, y, stage1, values) of every sample (…, B), for x (…, B, D) and y (…, B).
        start: start(stage1, random), the parameters before training.
        head: head(params, stage1, values), the linear or gated layer that is deployed.
        class_weight: class_weight(stage1, values, progress), weights w (T, C) or (1, C); the loss of a batch is
            Σ w_y·l / Σ w_y. progress runs from 0 to 1 over the epochs.
        project: project(params, stage1, values) changes the parameters in place after each step.
        prior_in_loss: the loss itself compensates for the class sizes.
        grid: hyperparameters that are tried, those of the literature first.
        lr: learning rate of the literature at `batch`, the centre of the learning rates that are tried, scaled in
            proportion to the batch; None for the configuration's.
        weight_decay: None for the configuration's, or values["weight_decay"].
    """

    name: str
    loss: Callable[[Params, Tensor, Tensor, Stage1, Values], Tensor]
    start: Callable[[Stage1, np.random.Generator], Params] = from_stage_1
    head: Callable[[Params, Stage1, Values], HeadTensors] = trained_layer
    class_weight: Callable[[Stage1, Values, float], Tensor | None] = unweighted
    project: Callable[[Params, Stage1, Values], None] | None = None
    sampling: Sampling = "instance"
    prior_in_loss: bool = False
    grid: tuple[dict[str, Any], ...] = ({},)
    lr: float | None = None
    batch: int = 128
    weight_decay: float | None = None

    @property
    def weights_classes(self) -> bool:
        """True where the loss weighs samples by their class."""
        return self.class_weight is not unweighted


@dataclass(frozen=True)
class Free:
    """A method without training.

    Arguments:
        solve: solve(stage1, samples, values) returns weight (C, D) and bias (C,); samples() yields the clean training
            features once, in blocks (x (n, D), y (n,)).
        solve_grid: in its place, solve_grid(stage1, samples, grid) returns the layers of several points of the grid, which
            share work; samples() may be called for several passes.
        grid: hyperparameters that are tried, those of the literature first.
        member: its head is a member of the ensemble, where that is asked for.
    """

    name: str
    solve: Callable[[Stage1, Samples, Values], tuple[Tensor, Tensor]] | None = None
    grid: tuple[dict[str, Any], ...] = ({},)
    solve_grid: Callable[[Stage1, Samples, Sequence[Values]], list[tuple[Tensor, Tensor]]] | None = None
    member: bool = False

    def layers(self, stage1: Stage1, samples: Samples, grid: Sequence[Values]) -> list[tuple[Tensor, Tensor]]:
        """Return the weight (C, D) and bias (C,) of each point of the grid."""
        if self.solve_grid is not None:
            return self.solve_grid(stage1, samples, grid)
        assert self.solve is not None, f"{self.name}: a method without training needs solve or solve_grid"
        return [self.solve(stage1, samples, values) for values in grid]


Rule = Trained | Free
