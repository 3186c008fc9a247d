"""Heads in a file: what goes in comes out, linear layers and gated ones."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline.errors import DataError
from pipeline.report.study import read_heads
from pipeline.results.heads import Gated, Linear, heads_file, is_finite, predict, read_scorers

RANDOM = np.random.default_rng(0)


def linear(classes=3, width=4):
    return Linear(RANDOM.normal(size=(classes, width)).astype("f4"), RANDOM.normal(size=classes).astype("f4"))


GATED = Gated(linear(), linear(), RANDOM.normal(size=5).astype("f4"))


def test_a_gated_head_gives_the_logits_of_its_formula():
    x = RANDOM.normal(size=(6, 4))
    gate = 1 / (1 + np.exp(-(x @ GATED.gate[:4] + GATED.gate[4])))
    expected = x @ GATED.first.weight.T + GATED.first.bias
    expected += gate[:, None] * (x @ GATED.second.weight.T + GATED.second.bias)
    np.testing.assert_allclose(GATED.logits(torch.as_tensor(x)).numpy(), expected, rtol=1e-6)
    classes, probability = predict(GATED, torch.as_tensor(x))
    np.testing.assert_array_equal(classes, expected.argmax(1))
    np.testing.assert_allclose(probability, np.exp(expected).max(1) / np.exp(expected).sum(1), rtol=1e-6)


def test_the_file_keeps_every_head_and_readers_of_layers_see_layers(tmp_path):
    heads = [
        ({"method": "baseline"}, linear()),
        ({"method": "disalign", "seed": 1}, GATED),
        ({"method": "cb"}, linear()),
    ]
    path = tmp_path / "heads.safetensors"
    path.write_bytes(heads_file(heads, {"class_names": ["a", "b", "c"]}))
    found = read_scorers(path)
    assert [what for what, _ in found] == [heads[0][0], heads[2][0], heads[1][0]]
    for (_, got), (_, kept) in zip(found, [heads[0], heads[2], heads[1]], strict=True):
        assert type(got) is type(kept)
        for a, b in zip(got.arrays, kept.arrays, strict=True):
            np.testing.assert_array_equal(a, b)
    described, weight, bias = read_heads(path)
    assert [what["method"] for what in described] == ["baseline", "cb"]
    assert (weight.shape, bias.shape) == ((2, 3, 4), (2, 3))


def test_what_is_no_head_is_said(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_scorers(tmp_path / "heads.safetensors")
    save_file({"weight": np.zeros((1, 2, 3))}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not the heads"):
        read_scorers(tmp_path / "other.safetensors")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_diverged_heads_are_told_from_others(bad):
    head = linear()
    assert is_finite(head)
    head.bias[1] = bad
    assert not is_finite(head)
