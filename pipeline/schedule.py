"""The learning rate of both stages."""

import math


def learning_rate(
    step: int, *, peak: float, epochs: float, steps_per_epoch: int = 1, warmup_epochs: float = 0
) -> float:
    """Return the learning rate of a step: linear warm-up to `peak`, then half a cosine towards 0.

    Arguments:
        step: counted from 0 over the whole training.
        epochs: length of the training, warm-up included.
    Source: Loshchilov and Hutter, ICLR 2017, without restarts.
    """
    warm, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
