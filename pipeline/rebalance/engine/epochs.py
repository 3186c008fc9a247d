"""The rows of every epoch in the order of every seed, from memory or from the disk."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.rebalance.engine.batches import batch_order
from pipeline.rebalance.engine.features import Features
from pipeline.rebalance.engine.head import Schedule
from pipeline.rebalance.engine.streamed import StreamedViews


class Epochs:
    """The features of a job by its schedule's views, in one order for each of its S seeds.

    `size` is B, the samples of a batch; `train_rows` (n,) are the rows that are fitted on. Streamed features have another
    order than those in memory (StreamedViews.order); for a given order nothing else depends on where they are.

    Arguments:
        rows: training rows to fit on, None for all.
    Attributes:
        tick: called with the epochs of one head that are done since the last call, those of all seeds added up.
    """

    tick: Callable[[float], object] = staticmethod(lambda epochs: None)

    def __init__(self, features: Features, schedule: Schedule, seeds: Sequence[int], rows: np.ndarray | None):
        self.features, self.schedule, self.seeds, self.rows = features, schedule, seeds, rows
        self.train_rows = np.arange(len(features.labels)) if rows is None else rows
        self.size = min(schedule.batch_size, len(self.train_rows))

    def __len__(self) -> int:
        return self.schedule.epochs

    @property
    def streamed(self) -> bool:
        return isinstance(self.features.views, StreamedViews)

    def views(
        self, epoch: int, *, place: Callable[[Tensor, int | None], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (features (N, D), labels (N,), order (S, n) of rows in them) of an epoch; streamed ones have one seed.

        Arguments:
            place: called with features and the number of the view, None for a part of one; returns them where batches
                are gathered from.
        """
        labels = torch.as_tensor(self.features.labels, dtype=torch.int64)
        if not self.streamed:
            orders = torch.as_tensor(np.stack([self._order(epoch, seed) for seed in self.seeds]))
            view = place(self._view(epoch), self._number(epoch))
            yield view, labels.to(view.device), orders
            return
        (seed,) = self.seeds
        for rows, features in self._stream(epoch, seed):
            part = place(torch.as_tensor(features), None)
            yield part, labels[rows].to(part.device), torch.arange(len(rows))[None]

    def pieces(self, epoch: int, *, at_once: int) -> Iterator[list[tuple[np.ndarray, Tensor]]]:
        """Yield for every seed (rows (n,), their features (n, D)); n is a multiple of B but at the end of an epoch.

        Streams may end at different times; a stream that has ended yields n = 0.

        Arguments:
            at_once: rows of a piece of features in memory.
        """
        if self.streamed:
            nothing = np.empty(0, np.int64), np.empty((0, self.features.weight.shape[1]), np.float32)
            streams = [self._stream(epoch, seed) for seed in self.seeds]
            for parts in itertools.zip_longest(*streams, fillvalue=nothing):
                yield [(rows, torch.as_tensor(features)) for rows, features in parts]
                self.tick(sum(len(rows) for rows, _ in parts) / len(self.train_rows))
            return
        view, orders = self._view(epoch), [self._order(epoch, seed) for seed in self.seeds]
        for first in range(0, len(self.train_rows), at_once):
            some = [order[first : first + at_once] for order in orders]
            yield [(rows, view.index_select(0, torch.as_tensor(rows))) for rows in some]
            self.tick(sum(map(len, some)) / len(self.train_rows))

    def _view(self, epoch: int) -> Tensor:
        return torch.as_tensor(self.features.views[self._number(epoch)])

    def _number(self, epoch: int) -> int:
        return self.features.view_of_epoch(epoch, augmented=self.schedule.augmented)

    def _order(self, epoch: int, seed: int) -> np.ndarray:
        return self.train_rows[batch_order(len(self.train_rows), seed=seed, epoch=epoch)]

    def _stream(self, epoch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        views = self.features.views
        assert isinstance(views, StreamedViews)
        augmented, streams = self.schedule.augmented, len(self.seeds)
        return views.blocks(epoch, seed, self.size, augmented=augmented, rows=self.rows, streams=streams)
