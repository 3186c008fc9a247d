"""A pretrained network by name: its weights under timm's names, and the input they were trained with."""

import importlib.util
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbone import cifar
from pipeline.backbone.aliases import ALIASES, EXTRA, installed_aliases
from pipeline.config import nearest
from pipeline.errors import ConfigError, DataError

PROBE_SECONDS = 4.0  # the time in which a hub has to answer before it counts as out of reach
HUB, LOCAL = "hf-hub:", "local-dir:"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class PretrainedEncoder:
    """The weights of a timm network.

    Attributes:
        name: the name that was asked for, such as `lite0` or `resnet50.a1_in1k`.
        model, model_args: the arguments of timm.create_model that build the network.
        tensors: its state dict.
        input: timm's pretrained_cfg: input_size, mean, std, interpolation, crop_pct.
        file: the file that the weights were read from, or None where timm read it.
        origin: one phrase on where the weights come from.
    """

    name: str
    model: str
    model_args: Mapping[str, Any]
    tensors: dict[str, Tensor]
    input: Mapping[str, Any]
    file: Path | None
    origin: str


def encoder_path(name: str) -> Path | None:
    """Return the file or folder that an encoder's name means (`local-dir:…` or a path), None for a name of a network."""
    if name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL)).expanduser()
    looks_like_path = name not in ALIASES and not name.startswith(HUB) and Path(name).expanduser().exists()
    return Path(name).expanduser() if looks_like_path else None


def load_encoder(
    name: str, *, model_args: Mapping[str, Any] | None = None, size: int | None = None
) -> PretrainedEncoder:
    """Return the pretrained weights of a network by name.

    Arguments:
        name: an alias of `ALIASES`, `hf-hub:OWNER/NAME`, or a name of timm such as `resnet50` or `resnet50.a1_in1k`.
        model_args: further arguments of timm.create_model.
        size: the height and width of the images in pixels, for networks whose positions are learnt for one size; they are
            interpolated. None leaves the network's own.

    Raises:
        ConfigError: the name is unknown, the network has no weights, or they are in no cache and no hub answers.
    """
    if name in ALIASES:
        return _from_package(name)
    if name.startswith(HUB):
        return _from_hub(name, dict(model_args or {}), size)
    return _from_timm(name, dict(model_args or {}), size)


def tensors_by_order(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor] | None:
    """Return the tensors under the network's names where both stand in the same order with the same shapes, else None."""
    target = network.state_dict()
    if [t.shape for t in tensors.values()] != [t.shape for t in target.values()]:
        return None
    return dict(zip(target, tensors.values(), strict=True))


def _from_package(alias: str) -> PretrainedEncoder:
    """Return the weights that an installed package holds, under timm's names."""
    import timm

    weights = ALIASES[alias]
    spec = importlib.util.find_spec(weights.package)
    if spec is None or not spec.submodule_search_locations:
        installed = ", ".join(installed_aliases())
        raise ConfigError(
            f"{alias}: its weights are not installed; {EXTRA} brings them"
            + (f"; installed are {installed}" if installed else "")
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(iter(sorted(folder.rglob("*.pth"))), None)
    if file is None:
        raise DataError(f"{folder}: the package holds no *.pth file; install it again: {EXTRA}")
    network = timm.create_model(weights.model, pretrained=False)
    tensors = tensors_by_order(torch.load(file, map_location="cpu", weights_only=True), network)
    if tensors is None:
        raise DataError(f"{file}: its tensors are not those of {weights.model}; install it again: {EXTRA}")
    origin = f"ImageNet-1k weights of the package {weights.package.replace('_', '-')} (Apache-2.0)"
    return PretrainedEncoder(alias, weights.model, {}, tensors, dict(network.pretrained_cfg), file, origin)


def _from_timm(name: str, model_args: dict[str, Any], size: int | None) -> PretrainedEncoder:
    """Return the weights that timm knows by this name, from its caches or a hub."""
    import timm

    if not timm.is_model(name.split(".")[0]):
        names = [*ALIASES, *timm.list_models()]
        raise ConfigError(f"{name}: unknown to timm{nearest(name, names)}; {_ways_without_hub()}")
    facts = None if cifar.is_cifar(name) else timm.get_pretrained_cfg(name)
    if facts is None or not (facts.hf_hub_id or facts.url):
        tags = timm.list_pretrained(f"{name.split('.')[0]}*")
        raise ConfigError(f"{name}: timm has no pretrained weights of it{nearest(name, tags)}; {_ways_without_hub()}")
    file = _cached_or_fetched(name, facts)
    return _built(name, name, model_args, facts.to_dict(), file, size, f"timm's weights {name}")


def weights_file_of(name: str) -> dict[str, str]:
    """Return what timm.create_model takes as pretrained_cfg_overlay to read the cached or fetched weights of a network.

    Raises: ConfigError: the weights are in no cache and no hub answers.
    """
    import timm

    facts = None if cifar.is_cifar(name) else timm.get_pretrained_cfg(name)
    file = _cached_or_fetched(name, facts) if facts and (facts.hf_hub_id or facts.url) else None
    return {"file": str(file)} if file else {}


def _cached_or_fetched(name: str, facts: Any) -> Path | None:
    """Return the file of a network's weights, or None where timm itself has to fetch it from a URL that answers."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(facts.url).name) if facts.url else None
    if cached and cached.is_file():
        return cached
    if facts.hf_hub_id:
        return _hub_file(name, facts.hf_hub_id, (facts.hf_hub_filename,) if facts.hf_hub_filename else HUB_FILES)
    if facts.url:
        _refuse_unreachable(name, facts.url)
    return None


def _from_hub(name: str, model_args: dict[str, Any], size: int | None) -> PretrainedEncoder:
    """Return the weights in a repository of the Hugging Face Hub that has timm's config.json."""
    import json

    repository = name.removeprefix(HUB)
    folder = _hub_file(name, repository, ("config.json",))
    try:
        tree = json.loads(folder.read_text(encoding="utf-8"))
        model, facts = tree["architecture"], dict(tree.get("pretrained_cfg") or tree)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: its config.json is not timm's; it has to name an architecture") from error
    file = _hub_file(name, repository, HUB_FILES)
    saved_args = {k: v for k, v in (tree.get("model_args") or {}).items() if k not in ("num_classes", "pretrained")}
    facts["num_classes"] = tree.get("num_classes", facts.get("num_classes", 1000))
    return _built(name, model, saved_args | model_args, facts, file, size, f"the weights of {repository} on the Hub")


def _built(
    name: str,
    model: str,
    model_args: dict[str, Any],
    facts: dict[str, Any],
    file: Path | None,
    size: int | None,
    origin: str,
) -> PretrainedEncoder:
    """Return the weights as timm loads them into the network, which converts older names and interpolates positions."""
    import timm

    if size and facts.get("fixed_input_size") and size != facts["input_size"][1]:
        model_args = {"img_size": size} | model_args
    overlay = facts if file is None else facts | {"file": str(file), "hf_hub_id": None, "url": "", "source": ""}
    try:
        network = timm.create_model(model, pretrained=True, pretrained_cfg=overlay, **model_args)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{name}: timm cannot load its weights ({reason})") from error
    tensors = {key: tensor.detach() for key, tensor in network.state_dict().items()}
    return PretrainedEncoder(name, model, model_args, tensors, facts, file, origin)


def _hub_file(name: str, repository: str, files: tuple[str, ...]) -> Path:
    """Return the first of the files that the cache or the hub has; ConfigError where neither has one."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    repository, _, revision = repository.partition("@")
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{name}: HF_HUB_OFFLINE is set and the cache has no such weights; {_ways_without_hub()}")
    _refuse_unreachable(name, constants.ENDPOINT)
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision or None))
        except errors.EntryNotFoundError:
            continue
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"{name}: the hub does not give {file} ({reason}); {_ways_without_hub()}") from error
    raise ConfigError(f"{name}: {repository} on the Hub holds none of {', '.join(files)}")


def _refuse_unreachable(name: str, url: str) -> None:
    """Raise ConfigError where nothing answers at the URL within PROBE_SECONDS, proxies of the environment included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError:  # it answers, if with a refusal
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # a resolver of names knows no time limit
    thread.start()
    thread.join(PROBE_SECONDS)
    if not any(answers):
        raise ConfigError(
            f"{name}: no pretrained weights: they are in no cache here and {url} does not answer; {_ways_without_hub()}"
        )


def _ways_without_hub() -> str:
    """Return the sentence on how weights are had without a hub, with the aliases that are installed."""
    aliases = installed_aliases()
    packaged = f"--encoder {aliases[0]} works without a hub (installed: {', '.join(aliases)})" if aliases else ""
    return (
        (packaged or f"{EXTRA} brings weights that need no hub (--encoder {', '.join(ALIASES)})")
        + "; or give a file or folder of weights, --encoder FILE or local-dir:FOLDER, or bring the folder HF_HOME of a host "
        "that has fetched them"
    )
