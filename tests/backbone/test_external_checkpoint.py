"""Anybody's checkpoint as the backbone: its features and logits in the store, or a refusal that says what to do."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from cache import open_cache, verify
from pipeline.backbone.build import encode
from pipeline.backbone.checkpoint import load_checkpoint
from pipeline.backbone.external_checkpoint import load_external
from pipeline.backbone.weights import read_key_map, rename_tensors
from pipeline.cli import invoke
from pipeline.config import find_config, load_config
from pipeline.data import load_dataset
from pipeline.data.transform import Loader
from pipeline.errors import ConfigError, DataError, PipelineError
from tests.markdown import blocks

SETTINGS = [
    "data.image_size=32",
    "data.workers=0",
    "dump.views=1",
    "dump.precision=float32",
    "rebalance.epochs=1",
    "rebalance.lam=0.1",
]
FAMILIES = {
    "test_resnet": {},
    "mobilenetv3_small_050": {},
    "test_vit": {"img_size": 32},
    "test_convnext": {},
    "test_efficientnet": {},
    "vgg11": {"mlp_ratio": 0.02},
}


@pytest.fixture
def random_heads(monkeypatch):
    """A head of random numbers stays, though it is at chance on its training features."""
    monkeypatch.setattr("pipeline.head_order.ABOVE_CHANCE", -1.0)


def network(name="test_resnet", classes=10, **args) -> nn.Module:
    """A network of random weights whose batch statistics are random too."""
    torch.manual_seed(sum(map(ord, name)) + classes)
    model = timm.create_model(name, num_classes=classes, **args)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.2, 1.0)
    nn.init.normal_(model.get_classifier().weight, std=0.1)
    nn.init.normal_(model.get_classifier().bias)
    return model.eval()


def words(path: Path, out: Path, *more: str, model: str | None = "test_resnet") -> list[str]:
    sets = [*SETTINGS, *([f"backbone.model={model}"] if model else [])]
    command = [
        "dump-features",
        "digits-lt",
        "--checkpoint",
        str(path),
        "--out",
        str(out / "features.zarr"),
        "--device",
        "cpu",
    ]
    return [*command, *(word for setting in sets for word in ("--set", setting)), *more]


def refusal(path: Path, out: Path, capsys, *more: str, code: int = 3, model: str | None = "test_resnet") -> str:
    """What the command says that ends with this exit code and neither traceback nor store."""
    assert invoke(words(path, out, *more, model=model)) == code
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    assert not (out / "features.zarr").exists()
    return said


def assert_holds(out: Path, model: nn.Module, *, head: bool = True) -> None:
    """The store has the features of the model's own forward_head, and its head gives the model's logits."""
    store, kept = open_cache(out / "features.zarr"), load_checkpoint(out / "backbone" / "last.pt")
    (images,) = Loader(
        load_dataset(kept.config.data).test, kept.transform, device=torch.device("cpu")
    ).batches([np.arange(40)])  # fmt: skip
    with torch.inference_mode():
        features, logits = (
            model.forward_head(model.forward_features(images), pre_logits=True).numpy(),
            model(images).numpy(),
        )
        np.testing.assert_array_equal(encode(kept.model, images).numpy(), features)
    stored = store.read("test")[:40].astype(np.float32)
    np.testing.assert_allclose(stored, features, rtol=2**-10, atol=2**-10 * np.abs(features).max())
    weight, bias = store.classifier
    if head:
        np.testing.assert_allclose(features @ weight.T + bias, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    assert ("probe" in store.fingerprint) is not head
    assert verify(out / "features.zarr") == []


def as_timm_trains(model: nn.Module, path: Path) -> None:
    """What timm's train.py leaves: arguments, numpy's numbers, an average beside the weights."""
    live = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    extras = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "metric": np.float64(71.2), "optimizer": {"state": {}}}
    torch.save({**extras, "arch": "x", "state_dict": live, "state_dict_ema": model.state_dict()}, path)


def as_wrapped(model: nn.Module, path: Path) -> None:
    """What Lightning leaves of a compiled network inside a module, a projection beside it."""
    state = {f"model._orig_mod.backbone.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state | {"model._orig_mod.projector.0.weight": torch.ones(3, 3)}, "loops": {}}, path)


def as_safetensors(model: nn.Module, path: Path) -> None:
    save_file({f"module.{key}": tensor.contiguous() for key, tensor in model.state_dict().items()}, path)


def as_old_pickle(model: nn.Module, path: Path) -> None:
    torch.save({"model": model.state_dict()}, path, _use_new_zipfile_serialization=False)


WAYS = (as_timm_trains, as_wrapped, as_safetensors, as_old_pickle)


@pytest.mark.parametrize("save", [WAYS[0], *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:])])
def test_a_checkpoint_of_any_shape_gives_the_features_and_logits_of_its_network(save, tmp_path, capsys, random_heads):
    model = network()
    save(model, tmp_path / "weights")
    assert invoke(words(tmp_path / "weights", tmp_path)) == 0
    assert_holds(tmp_path, model)
    said = capsys.readouterr().err
    assert "matched by their number (0 = 0, 1 = 1, 2 = 2 …)" in said
    assert ("not from its state_dict" in said) is (save is as_timm_trains)
    assert ("left out, no part of the encoder: model._orig_mod.projector.0.weight" in said) is (save is as_wrapped)


@pytest.mark.slow
@pytest.mark.parametrize("save", [as_safetensors, as_wrapped])
@pytest.mark.parametrize("name", FAMILIES)
def test_six_families(name, save, tmp_path, random_heads):
    args = FAMILIES[name]
    model = network(name, **args)
    save(model, tmp_path / "weights")
    sets = [word for key, value in args.items() for word in ("--set", f"backbone.model_args.{key}={value}")]
    assert invoke(words(tmp_path / "weights", tmp_path, *sets, model=name)) == 0
    assert_holds(tmp_path, model)


@pytest.fixture
def probed(tmp_path, capsys) -> tuple[Path, nn.Module]:
    """A run whose backbone was brought along without a head for its classes, and that backbone."""
    model = network(classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert invoke(words(tmp_path / "weights.pth", tmp_path / "run")) == 0
    assert "has 7 classes, the data 10: a linear probe is fitted" in capsys.readouterr().err
    return tmp_path / "run", model


def test_a_head_of_other_classes_gives_way_to_a_linear_probe(probed, capsys):
    run, model = probed
    assert_holds(run, model, head=False)
    store = open_cache(run / "features.zarr")
    weight, bias = store.classifier
    labels, features = store.labels("train"), store.read("train").astype(np.float32)
    assert ((features @ weight.T + bias).argmax(1) == labels).mean() > 0.5
    (run.parent / "weights.pth").unlink()  # what was kept is enough
    assert invoke(["dump-features", "--checkpoint", str(run / "backbone" / "last.pt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["written"], told["head"], told["digest"]) == (0, "linear probe", store.digest)


@pytest.mark.slow
def test_all_that_follows_knows_that_it_starts_from_a_linear_probe(probed, capsys):
    run, model = probed
    assert invoke(["rebalance", str(run)]) == 0
    assert "linear probe" in capsys.readouterr().out
    heads = str(run / "rebalance" / "heads.safetensors")
    assert invoke(["evaluate", str(run / "features.zarr"), "--heads", heads, "--split", "val"]) == 0
    assert "linear probe" in capsys.readouterr().out
    assert invoke(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "linear probe" in page
    assert "tage 1" not in page
    assert "less the linear probe" in page
    assert invoke(["export", str(run), "--out", str(run / "model")]) == 0
    assert "tage 1" not in (run / "model" / "README.md").read_text(encoding="utf-8")
    exported = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(run / "model" / "model.pth"))
    np.testing.assert_array_equal(exported.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    capsys.readouterr()
    assert invoke(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "linear probe  " in said
    assert "backbone brought along" in said
    assert invoke(["info", str(run / "backbone" / "last.pt")]) == 0
    assert "linear probe, fitted when features are dumped" in capsys.readouterr().out
    assert invoke(["train-backbone", "digits-lt", "--out", str(run / "backbone")]) == 2  # nothing is trained over it
    assert "weights was brought" in capsys.readouterr().err


@pytest.fixture(scope="module")
def digits():
    """The configuration that the commands above have, and its images."""
    config = load_config(find_config("digits-lt"), [*SETTINGS, "backbone.model=test_resnet"])
    return config, load_dataset(config.data)


def test_an_exported_folder_names_its_network_input_and_classes(tmp_path, digits):
    """Its classes are matched by name, whatever their order; others need a probe."""
    model, (config, images) = network("test_vit", img_size=32), digits
    names = [str(c) for c in reversed(range(10))]
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args={"img_size": 32})
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(tree | {"label_names": names}))
    found = load_external(tmp_path, config, dataset=images)
    assert found.network["network"].startswith("test_vit, global_pool token, img_size ")
    assert (found.transform.mean, found.transform.interpolation) == ((0.1, 0.2, 0.3), "bilinear")
    np.testing.assert_array_equal(found.model.head.weight.detach().flip(0), model.head.weight.detach())
    np.testing.assert_array_equal(found.model.head.bias.detach().flip(0), model.head.bias.detach())
    assert "matched by their names: they stand there in another order" in str(found.external["notes"])
    assert not found.probe
    (tmp_path / "config.json").write_text(json.dumps(tree | {"label_names": ["ten", *names[1:]]}))
    data = config.data.model_copy(update={"mean": (0.0, 0.0, 0.0)})
    found = load_external(tmp_path / "model.safetensors", config.model_copy(update={"data": data}), dataset=images)
    assert "of other classes ('ten' is one of the two only): a linear probe" in str(found.external["notes"])
    assert (found.probe, found.transform.mean) == (True, (0, 0, 0))
    assert not found.model.head.weight.detach().any()


@pytest.mark.slow
def test_the_network_of_two_that_a_key_map_leaves_is_taken(tmp_path, capsys):
    """A momentum encoder beside the one that was trained, as MoCo saves them, each with a projection of its own."""
    model, other = network(), network(classes=3)
    state = {f"module.encoder_k.{key}": tensor for key, tensor in other.state_dict().items()}
    state |= {f"module.encoder_q.{key}": tensor for key, tensor in model.state_dict().items()}
    state["module.encoder_q.fc.2.weight"] = state.pop("module.encoder_q.fc.weight")
    torch.save({"state_dict": state | {"module.queue": torch.ones(2, 3)}}, tmp_path / "moco.pth")
    said = refusal(tmp_path / "moco.pth", tmp_path, capsys, "--probe", code=2)
    assert "2 networks that fit test_resnet equally well, behind module.encoder_k., module.encoder_q." in said
    line = said.partition("lines such as ")[2]
    (tmp_path / "keys.yaml").write_text(line)
    more = ["--key-map", str(tmp_path / "keys.yaml"), "--probe"]
    assert invoke(words(tmp_path / "moco.pth", tmp_path, *more)) == 0
    assert_holds(tmp_path, model, head=False)


def save_to(path: Path, model: nn.Module) -> Path:
    torch.save(model.state_dict(), path)
    return path


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


class Hyper:
    """An object of somebody's own code in a checkpoint."""


def bad_files(folder: Path):
    """(name, words of the refusal, exit code) of every file that will not do, written into the folder."""
    state = network().state_dict()
    torch.save({"state_dict": state, "x": Evil(folder / "mark")}, folder / "evil.pt")
    yield "evil.pt", "wants to run posix.system when it is loaded"
    torch.save({"state_dict": state, "hyper_parameters": {"config": Hyper()}}, folder / "lightning.ckpt")
    yield "lightning.ckpt", "test_external_checkpoint.Hyper), which could run anything"
    yield "lightning.ckpt", "have it saved anew where it was made: torch.save(model.state_dict(), 'weights.pt')"
    torch.save(Hyper(), folder / "old.pt", _use_new_zipfile_serialization=False)
    yield "old.pt", "have it saved anew where it was made"
    torch.save({"model": state, "config": Hyper()}, folder / "model.pt")
    yield "model.pt", "have it saved anew where it was made"
    torch.save({"optimizer": {"state": {}, "param_groups": []}, "epoch": 1}, folder / "optimiser.pt")
    yield "optimiser.pt", "the state of an optimiser but no weights of a network: optimizer, epoch"
    torch.save([1, 2], folder / "list.pt")
    yield "list.pt", "holds list, not named tensors"
    save_file(state, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-1000])
    yield "cut.safetensors", "not a readable safetensors file: it ends too early or is damaged; copy"
    torch.save(state, folder / "whole.pt")
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:-1000])
    yield "cut.pt", "not a readable checkpoint: it ends too early or is damaged; copy"
    (folder / "page.pt").write_text("<!doctype html><html>not found</html>")
    yield "page.pt", "a web page, not a checkpoint"
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    yield "pointer.safetensors", "a pointer of Git LFS"
    (folder / "empty.pt").write_bytes(b"")
    yield "empty.pt", "an empty file"
    (folder / "text.pt").write_text("hello")
    yield "text.pt", "not a PyTorch or safetensors file"
    yield "none.pt", "no such checkpoint"
    (folder / "folder").mkdir()
    yield "folder", "a folder without model.safetensors or pytorch_model.bin"

    def saved(name, **changes):
        torch.save({key: t for key, t in (state | changes).items() if t is not None}, folder / name)
        return name

    conv1, fc, odd = "conv1.0.weight", state["fc.weight"], {"layer4.7.conv1.weight": torch.ones(1)}
    yield saved("part.pt", **{key: None for key in state if key.startswith("layer4")}), "encoder are missing: layer4"
    yield saved("gray.pt", **{conv1: state[conv1][:, :1]}), f"1 have another shape: {conv1}"
    yield saved("more.pt", **odd), "1 are none of its: layer4.7.conv1.weight"
    yield saved("more.pt", **odd), r"'^layer4\.7\.conv1\.weight$': null"
    yield (
        saved("nan.pt", **{"bn1.weight": state["bn1.weight"] * torch.nan}),
        "bn1.weight holds numbers that are not finite: its training probably",
    )
    yield saved("cosine.pt", **{"fc.bias": None}), "its head is not one nn.Linear with bias (fc.weight 10×"
    yield saved("conv.pt", **{"fc.weight": fc[:, :, None, None]}), "×1×1, fc.bias 10: cosine, convolutional"
    yield saved("wild.pt", **{"fc.bias": torch.full((10,), torch.inf)}), "its head fc holds numbers that are not finite"


def test_what_will_not_do_is_refused_and_nothing_is_run(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(
        "pipeline.backbone.match_weights.MOST_CANDIDATES", 1
    )  # what else would fit is looked for elsewhere
    for name, message in bad_files(tmp_path):
        with pytest.raises(DataError) as refused:
            load_external(tmp_path / name, digits[0], dataset=digits[1])
        assert message in str(refused.value), name
    assert not (tmp_path / "mark").exists()


def test_the_command_refuses_without_a_traceback_or_a_trace(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Evil(tmp_path / "mark")}, tmp_path / "evil.pt")
    assert "wants to run posix.system" in refusal(tmp_path / "evil.pt", tmp_path / "out", capsys)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("deit_tiny_distilled_patch16_224", "a pair of Linear and Linear (a distilled network), not one nn.Linear"),
        ("resnetv2_50d_gn", "its classifier is Conv2d, not one nn.Linear"),
        ("resnet18q", "unknown to timm; did you mean resnet18"),
    ],
)
def test_a_network_that_cannot_carry_a_head_is_refused(model, message, tmp_path, digits):
    with pytest.raises(ConfigError) as refused:
        load_external(save_to(tmp_path / "w.pt", network()), digits[0], dataset=digits[1], model=model)
    assert message in str(refused.value)


def test_the_weights_of_a_distilled_network_are_not_taken_for_the_plain_one_s(tmp_path, digits):
    file = save_to(tmp_path / "w.pt", timm.create_model("deit_tiny_distilled_patch16_224", depth=1))
    with pytest.raises(DataError, match=r"of a distilled network \(dist_token\)"):
        load_external(file, digits[0], dataset=digits[1], model="deit_tiny_patch16_224")


@pytest.mark.slow
def test_the_network_that_a_file_fits_is_named(tmp_path, digits):
    file = save_to(tmp_path / "w.pt", timm.create_model("resnet34", num_classes=3))
    for asked in ("resnet18", "test_vit"):
        with pytest.raises(DataError, match=r"It fits resnet34: --set backbone.model=resnet34"):
            load_external(file, digits[0], dataset=digits[1], model=asked)


@pytest.mark.slow
def test_one_folder_keeps_one_backbone_and_never_loses_a_trained_one(tmp_path, tiny_backbone, capsys):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    torch.save(network("test_resnet", 11).state_dict(), tmp_path / "b.pt")
    assert invoke(words(tmp_path / "a.pt", tmp_path)) == 0
    assert invoke(words(tmp_path / "a.pt", tmp_path)) == 0
    before = (tmp_path / "backbone" / "last.pt").read_bytes()
    assert invoke(words(tmp_path / "b.pt", tmp_path)) == 2
    assert (
        f"external backbone of {tmp_path / 'a.pt'}; the requested one, of {tmp_path / 'b.pt'}, has other weights"
        in " ".join(capsys.readouterr().err.split())
    )
    assert (tmp_path / "backbone" / "last.pt").read_bytes() == before
    assert invoke(words(tmp_path / "b.pt", tmp_path, "--overwrite")) == 0
    assert "probe" in open_cache(tmp_path / "features.zarr").fingerprint
    trained = tiny_backbone.read_bytes()
    for more in ([], ["--overwrite"]):
        assert invoke(words(tmp_path / "a.pt", tiny_backbone.parent.parent, *more)) == 2
        assert "a backbone that was trained here" in capsys.readouterr().err
    assert tiny_backbone.read_bytes() == trained


@pytest.mark.slow
def test_a_checkpoint_of_ours_lends_its_encoder_to_other_images(tmp_path, tiny_backbone, capsys):
    """--probe takes the encoder of one run to the images of another configuration, with its own input transform."""
    own = load_checkpoint(tiny_backbone)
    assert invoke([*words(tiny_backbone, tmp_path, "--probe", "--set", "data.image_size=null", model=None)]) == 0
    kept = load_checkpoint(tmp_path / "backbone" / "last.pt")
    assert (kept.config.backbone.model, kept.config.backbone.width) == ("cifar_resnet8", 0.25)
    assert kept.transform.mean == own.transform.mean
    assert "a linear probe is fitted on the features, as asked for" in capsys.readouterr().err
    assert_holds(tmp_path, own.model, head=False)


def in_processes(command: list[str], *, ranks: int, **environment: str) -> int:
    """The exit code of a command in worker processes of one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    told = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "pipeline", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(told, env=environment, capture_output=True, timeout=300).returncode


@pytest.mark.slow
def test_kills_and_ranks_change_no_byte_of_a_probed_store(tmp_path):
    """Killed between the probe and the seal, then finished by one rank; against two ranks undisturbed."""
    file = save_to(tmp_path / "w.pt", network(classes=3))
    assert in_processes(words(file, tmp_path / "whole"), ranks=2) == 0
    assert in_processes(words(file, tmp_path / "killed"), ranks=1, PIPELINE_KILL_AT="before:seal") < 0
    assert (tmp_path / "killed" / "features.zarr" / "classifier" / "weight" / "c" / "0" / "0").exists()
    assert in_processes(words(file, tmp_path / "killed"), ranks=1) == 0
    whole, killed = (open_cache(tmp_path / name / "features.zarr") for name in ("whole", "killed"))
    assert (whole.digest, verify(killed.path)) == (killed.digest, [])
    (tmp_path / "killed" / "features.zarr" / "classifier" / "bias" / "c" / "0").unlink()
    assert invoke(words(file, tmp_path / "killed")) == 0
    assert open_cache(tmp_path / "killed" / "features.zarr").digest == whole.digest


@pytest.mark.slow
def test_a_run_takes_a_checkpoint_instead_of_training(tmp_path, capsys):
    torch.save(network(classes=3).state_dict(), tmp_path / "w.pt")
    sets = [word for setting in [*SETTINGS, "backbone.model=test_resnet"] for word in ("--set", setting)]
    command = [
        "run",
        "digits-lt",
        "--checkpoint",
        str(tmp_path / "w.pt"),
        "--out",
        str(tmp_path / "run"),
        *sets,
        "--json",
    ]
    assert invoke(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["redone"] == ["dump-features", "rebalance", "report"]
    assert invoke(command) == 0
    assert json.loads(capsys.readouterr().out)["redone"] == []
    assert invoke([*command, "--seeds", "0,1"]) == 2


def test_a_transformer_of_torchvision_fits_through_a_key_map(tmp_path, digits, monkeypatch):
    """The key map of docs/backbones.md; the logits are those of torchvision's own network."""
    monkeypatch.setattr("pipeline.backbone.match_weights.MOST_CANDIDATES", 1)
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    theirs = torchvision.models.VisionTransformer(**shape, num_classes=10).eval()
    nn.init.normal_(theirs.heads.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    (tmp_path / "keys.yaml").write_text(
        next(b.text for b in blocks("docs/backbones.md") if b.text.startswith("# torchvision-vit.yaml"))
    )
    shaped = {"model": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "depth": 2}}
    config = digits[0].model_copy(update={"backbone": digits[0].backbone.model_copy(update=shaped)})
    found = load_external(tmp_path / "vit.pth", config, dataset=digits[1], key_map=tmp_path / "keys.yaml")
    images = torch.rand(5, 3, 32, 32)
    unshaped = config.model_copy(update={"backbone": config.backbone.model_copy(update={"model_args": {"depth": 2}})})
    with pytest.raises(DataError, match=r"pos_embed 1×5×192 instead of 1×197×192.*backbone.model_args.img_size=SIZE"):
        load_external(tmp_path / "vit.pth", unshaped, dataset=digits[1], key_map=tmp_path / "keys.yaml")
    with torch.inference_mode():
        torch.testing.assert_close(found.model(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected lines such as"),
        ("'(': x", "no regular expression"),
        (r"'^fc\.': 'x\2'", "no regular expression"),
        ("fc: 3", "both have to be text"),
        ("'nothing like it': x", "is in no name"),
        ("'weight|bias': x", "both become"),
    ],
)
def test_a_key_map_that_means_nothing_is_refused(text, message, tmp_path):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        rename_tensors(network().state_dict(), read_key_map(tmp_path / "keys.yaml"), tmp_path / "keys.yaml")


def test_a_config_that_makes_no_sense_or_reaches_for_other_weights_is_refused(tmp_path, digits):
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    for tree, message in (
        ("{", "not readable JSON"),
        (
            {"architecture": "test_resnet", "pretrained_cfg": {"mean": "x"}},
            "pretrained_cfg.mean is 'x', expected 3 numbers",
        ),
        ({"architecture": "test_resnet", "model_args": []}, None),
        ({"architecture": "hf-hub:somebody/network"}, "unknown to timm"),
        ({"architecture": "test_resnet", "model_args": {"checkpoint_path": "/etc/passwd"}}, None),
        ({"architecture": "test_resnet", "model_args": {"nonsense": 1}}, "timm cannot build it"),
    ):
        (tmp_path / "config.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
        if message is None:
            load_external(tmp_path, digits[0], dataset=digits[1])
        else:
            with pytest.raises(PipelineError, match=message):
                load_external(tmp_path, digits[0], dataset=digits[1])
