"""The trainer itself on two ranks with divided batches, against one process with whole ones."""

import os
import socket

import pytest
import torch
from torch import nn

from pipeline import distributed
from pipeline.backbone import checkpoint, train
from pipeline.config import make_config
from tests.conftest import digits_tree
from tests.ranks import _context

CASES = {
    "cb": {"loss": "cb", "cb_beta": 0.99},
    "focal": {"loss": "focal", "sampler": "class-balanced"},
    "ldam": {
        "loss": "ldam-drw",
        "drw_start": 0.5,
        "ema": 0.9,
        "sampler": "square-root",
        "force_double_balancing": True,
    },
}


class Plain(nn.Module):
    """One hidden layer on 8×8 images, with the interface of a timm model and nothing that looks across a batch."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(192, 16), nn.Linear(16, 10)

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        return self.body(x.flatten(1)).relu()

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def _one_rank(rank, world, port, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = Plain().state_dict()

    def build(settings, **how):
        model = Plain()
        model.load_state_dict(start)
        return model

    train.build_model = build
    with distributed.ranks("cpu"):
        for name, settings in CASES.items():
            tree = digits_tree(epochs=2, accumulate=world, lr=0.05, **settings)
            train.train_backbone(make_config(tree, name), out=out / name, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of one rank and of two."""
    place = tmp_path_factory.mktemp("ranks")
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            _context.Process(target=_one_rank, args=(r, world, port, place / str(world))) for r in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [0] * world
    return place


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_divided_batches_train_as_one(trained, name):
    one, two = (checkpoint.read(trained / str(world) / name / "last.pt") for world in (1, 2))
    for key in ("learner", "average") if name == "ldam" else ("model",):
        for tensor, value in one[key].items():
            if tensor != "length":  # rank 0 knows the features of its own images, as with batch statistics
                torch.testing.assert_close(two[key][tensor], value, rtol=1e-4, atol=1e-5, msg=f"{key} {tensor}")
    torch.manual_seed(0)
    moved = (one["model"]["body.weight"] - Plain().body.weight).abs().max()
    assert moved > 0.02  # so that the tolerance means something
