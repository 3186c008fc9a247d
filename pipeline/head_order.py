"""The order of the classes in a head that does not name them: that of the data, or another one that programs sort folders by."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ABOVE_CHANCE = 0.1  # share of the way from chance to 1 that a head has to reach on its own training features
MOVED_GAIN = 0.1  # of the accuracy of the classes that another order moves, from which it is the head's


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """The order in which a head fits the training features.

    Arguments:
        rows: (C,) row of the head of each class; None where the head is at chance in every order.
        name: of the order, for people.
        accuracies: name of each order → mean over classes of the training accuracy in %.
    """

    rows: np.ndarray | None
    name: str
    accuracies: dict[str, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {accuracy:.1f} %" for name, accuracy in self.accuracies.items())
        if self.rows is None:
            return (
                f"the checkpoint's head is at chance on the training features in every order ({tried}) and is left out"
            )
        return f"the checkpoint's head, its classes {self.name} (accuracy on the training features: {tried})"


def class_orders(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the name of each order → the head's row (C,) of every class, orders that differ from each other.

    timm's training script sorts folders lower-cased and by the numbers in them: 1, 2, 10; apple, Zebra. This program and
    torchvision sort by code point: 1, 10, 2; Zebra, apple.
    """
    sorted_by = {
        "as in the data": list(range(len(names))),
        "in natural order, lower-cased (1, 2, 10; apple, Zebra)": sorted(
            range(len(names)), key=lambda c: natural_key(names[c])
        ),
        "lower-cased (apple, Zebra)": sorted(range(len(names)), key=lambda c: names[c].lower()),
    }
    orders: dict[str, np.ndarray] = {}
    for name, classes in sorted_by.items():
        rows = np.empty(len(names), np.int64)
        rows[classes] = np.arange(len(names))
        if not any(np.array_equal(rows, other) for other in orders.values()):
            orders[name] = rows
    return orders


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return the key by which timm sorts a folder's name: its digits as numbers, the rest in lower case."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def find_order(
    blocks: Iterable[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor, names: Sequence[str]
) -> HeadOrder:
    """Return the order of the classes in a head (C, D), (C,) by its answers on training samples (features, labels).

    Another order than the data's is taken where it is better for the classes that it moves.
    """
    classes = len(names)
    answers = torch.zeros(classes * classes, dtype=torch.float64)
    for features, labels in blocks:
        predicted = torch.addmm(bias.to(features), features, weight.to(features).T).argmax(1)
        answers += torch.bincount(labels * classes + predicted, minlength=classes * classes).cpu()
    table = answers.view(classes, classes).numpy()
    share = table / table.sum(1, keepdims=True).clip(1)  # of each class, by the row of the head that answers
    orders = class_orders(names)
    by_class = {name: share[np.arange(classes), rows] for name, rows in orders.items()}
    accuracies = {name: 100 * float(hits.mean()) for name, hits in by_class.items()}
    first = next(iter(orders))
    best = max(accuracies, key=lambda name: accuracies[name])
    moved = orders[best] != orders[first]
    if best != first and by_class[best][moved].mean() < by_class[first][moved].mean() + MOVED_GAIN:
        best = first
    chance = 1 / classes
    if accuracies[best] / 100 < chance + ABOVE_CHANCE * (1 - chance):
        return HeadOrder(None, "", accuracies)
    return HeadOrder(orders[best], best, accuracies)
