"""The order of the classes in a head that names none, by its answers on training features."""

import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from cache import open_cache
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.cli import invoke
from pipeline.head_order import class_orders, find_order, natural_key


def head_and_samples(names, order, *, noise=0.3, seed=0):
    """Return a head whose rows are the classes in `order`, and samples around the class means."""
    random = np.random.default_rng(seed)
    means = random.normal(size=(len(names), 16)).astype(np.float32)
    labels = np.repeat(np.arange(len(names)), 8)
    features = torch.from_numpy(means[labels] + noise * random.normal(size=(len(labels), 16)).astype(np.float32))
    weight = torch.from_numpy(means[[names.index(name) for name in order]])
    return weight, -weight.square().sum(1) / 2, [(features, torch.from_numpy(labels))]


def test_timms_order_is_that_of_timm():
    from timm.data.readers.reader_image_folder import natural_key as timms

    names = ["10", "2", "Zebra", "apple", "class 11", "class 9", "a1b20", "a1b3", "x"]
    assert sorted(names, key=natural_key) == sorted(names, key=timms)


@given(st.sets(st.text("aB1 20", min_size=1, max_size=4), min_size=2, max_size=12))
def test_every_order_is_a_permutation_and_the_first_is_the_datas(names):
    orders = class_orders(sorted(names))
    assert next(iter(orders.values())).tolist() == list(range(len(names)))
    for rows in orders.values():
        assert sorted(rows) == list(range(len(names)))


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (sorted(map(str, range(12))), int),
        (["Zebra", "apple", "bee", "cat", "dog", "eel"], str.lower),
        (["Item 10", "apple 2", "apple 10", "item 9"], natural_key),
    ],
)
def test_a_head_in_another_order_is_put_right(names, key):
    names = sorted(names)
    foreign = sorted(names, key=key)
    weight, bias, samples = head_and_samples(names, foreign)
    order = find_order(samples, weight, bias, names)
    assert [foreign[row] for row in order.rows] == names
    assert "as in the data" not in order.name
    assert order.accuracies[order.name] > 90 > order.accuracies["as in the data"]
    right = find_order(samples, weight[order.rows], bias[order.rows], names)
    assert right.rows.tolist() == list(range(len(names)))


def test_a_head_that_fits_in_no_order_is_left_out():
    names = sorted(map(str, range(12)))
    shuffled = np.random.default_rng(3).permutation(names).tolist()
    weight, bias, samples = head_and_samples(names, shuffled)
    order = find_order(samples, weight, bias, names)
    assert order.rows is None
    assert "is at chance on the training features in every order" in str(order)


def test_a_weak_head_in_the_right_order_stays():
    names = sorted(map(str, range(12)))
    weight, bias, samples = head_and_samples(names, names, noise=3.0)
    order = find_order(samples, weight, bias, names)
    assert 20 < order.accuracies["as in the data"] < 70
    assert order.rows.tolist() == list(range(12))


NAMES = sorted(str(n) for n in range(1, 11))  # 1, 10, 2, …: this program's order


@pytest.fixture(scope="module")
def digits_and_network(tmp_path_factory):
    """Digits called 1 … 10 in an .npz, a configuration of them, and a network whose head fits them, by class name."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    labels = np.array([NAMES.index(str(d or 10)) for d in digits.target])
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    parts = {"train": slice(0, 500), "val": slice(500, 700), "test": slice(700, 1000)}
    arrays = {f"{n}_images": images[rows] for n, rows in parts.items()}
    arrays |= {f"{n}_labels": labels[rows] for n, rows in parts.items()}
    np.savez(folder / "digits.npz", class_names=np.array(NAMES), **arrays)
    (folder / "digits.yaml").write_text(
        "data: {source: npz, path: digits.npz, image_size: 32}\nbackbone: {model: test_resnet}\n"
        "dump: {views: 1, precision: float32}\nrebalance: {lam: 0.1, epochs: 1, seeds: 0}\n"
    )
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10)
    save_file(network.state_dict(), folder / "encoder.safetensors")
    command = [
        "dump-features",
        str(folder / "digits.yaml"),
        "--checkpoint",
        str(folder / "encoder.safetensors"),
        "--probe",
    ]
    assert invoke([*command, "--out", str(folder / "probed" / "features.zarr")]) == 0
    weight, bias = open_cache(folder / "probed" / "features.zarr").classifier
    return folder, network, dict(zip(NAMES, zip(weight, bias, strict=True), strict=True))


def run_with_head(digits_and_network, order, out, capsys):
    """Return the document and the text of a run of the network whose head's rows are the classes in `order`."""
    folder, network, rows = digits_and_network
    tensors = dict(network.state_dict())
    tensors["fc.weight"], tensors["fc.bias"] = (
        torch.tensor(np.array([rows[name][i] for name in order])) for i in (0, 1)
    )
    save_file(tensors, out.parent / f"{out.name}.safetensors")
    words = [
        "run",
        str(folder / "digits.yaml"),
        "--checkpoint",
        str(out.parent / f"{out.name}.safetensors"),
        "--out",
        str(out),
    ]
    assert invoke([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert invoke(words) == 0  # complete: nothing is chosen again
    text = capsys.readouterr()
    assert f"{out / 'features.zarr'}: complete" in " ".join(text.err.split())
    return document, text.out


def test_a_run_with_a_head_in_timms_order_has_the_accuracy_of_the_same_head_in_ours(
    digits_and_network, tmp_path, capsys
):
    right, _ = run_with_head(digits_and_network, NAMES, tmp_path / "right", capsys)
    natural, text = run_with_head(digits_and_network, sorted(NAMES, key=int), tmp_path / "natural", capsys)
    assert natural["baseline"]["all"] == right["baseline"]["all"] > 50
    assert "stage 1" in text
    assert invoke(["info", str(tmp_path / "natural" / "features.zarr")]) == 0
    assert "its classes in natural order" in " ".join(capsys.readouterr().out.split())


def test_a_head_at_chance_is_no_baseline_and_the_probe_takes_its_place_in_the_table(
    digits_and_network, tmp_path, capsys
):
    shuffled = [NAMES[i] for i in (3, 7, 0, 9, 1, 8, 2, 5, 6, 4)]
    document, text = run_with_head(digits_and_network, shuffled, tmp_path / "shuffled", capsys)
    assert document["baseline"]["all"] > 50
    assert "linear probe" in text
    assert "stage 1" not in text
    store = open_cache(tmp_path / "shuffled" / "features.zarr")
    assert store.provenance["probe"]["chosen_on"] == "validation"
    assert not load_checkpoint(tmp_path / "shuffled" / "backbone" / "last.pt").head_is_final
