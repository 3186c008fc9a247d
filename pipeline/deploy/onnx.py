"""A whole model as one ONNX graph, from pixels to logits, held against PyTorch before anybody uses it."""

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache import write_durably
from pipeline.errors import ConfigError, PipelineError

OPSET = 18  # what the exporter writes by itself, so that nothing is converted after it; onnxruntime runs it since 1.14
ONE_FILE = 2**31 - 2**24  # bytes of weights: protobuf ends at 2 GiB, larger ones go to a second file
ALIKE = 1e-3  # of the largest value: rounding is a hundredth of it, a wrong graph all of it
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def write_onnx(
    path: Path, model: nn.Module, *, network: str, size: tuple[int, int], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write the graph of a model, check it with onnxruntime on random images, and return its facts.

    Arguments:
        model: uint8 images (B, 3, H, W) → logits (B, C), features (B, D), in evaluation mode.
        network: its name, for errors.
        metadata: the entries that onnxruntime returns as `custom_metadata_map`.
    Raises: PipelineError: torch cannot translate the network, or onnxruntime computes something else than PyTorch.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    images = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own code
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits", "features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        assert program is not None
    except Exception as error:  # the exporter raises almost anything
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(
            f"{network}: torch cannot translate it to ONNX ({reason}); --to safetensors carries it"
        ) from error
    graph = program.model
    ClearMetadataAndDocStringPass()(graph)  # each node would name the file and line of this machine that it comes from
    graph.metadata_props.update(metadata)
    if sum(tensor.nbytes for tensor in model.state_dict().values()) < ONE_FILE:
        write_durably(path, onnx_ir.to_proto(graph).SerializeToString())
    else:
        onnx_ir.save(graph, path, external_data=f"{path.name}.data")
    with torch.inference_mode():
        logits, features = model(images)
    run = runner(path, "cpu")
    again = [torch.cat(parts) for parts in zip(run(images[:1]), run(images[1:]), strict=True)]
    return {
        "opset": OPSET,
        "input": {
            "name": "images",
            "type": "uint8",
            "shape": ["batch", 3, *size],
            "channels": "RGB",
            "range": [0, 255],
        },
        "normalisation": "inside the graph",
        "outputs": {"logits": ["batch", logits.shape[1]], "features": ["batch", features.shape[1]]},
        "checked": {
            "images": len(images),
            "largest_logit": float(logits.abs().max()),
            "largest_difference": max(
                _largest_difference(path, a, b) for a, b in zip(again, (logits, features), strict=True)
            ),
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def runner(path: Path, device: str) -> Run:
    """Return the function that runs a graph: uint8 images (B, 3, H, W) → logits (B, C), features (B, D).

    Arguments:
        device: auto takes a GPU where onnxruntime can.
    Raises: ConfigError: onnxruntime is missing, or has no CUDA for device cuda.
    """
    check_packages("onnxruntime", purpose=f"{path}: an ONNX model")
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    elif device not in ("auto", "cpu"):
        raise ConfigError(
            f"--device {device}: the onnxruntime that is installed has no CUDA; take --device cpu, or onnxruntime-gpu instead"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = session.run(["logits", "features"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(features)

    return run


def check_packages(*packages: str, purpose: str = "--to onnx") -> None:
    """Raise ConfigError where one of the packages (by default all) is missing, with the command that installs them."""
    missing = [name for name in packages or PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {', '.join(missing)}: pip install 'iwb-pipeline[onnx]'")


def _largest_difference(path: Path, actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference; PipelineError where it is more than rounding."""
    apart, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    if not apart <= ALIKE * max(largest, 1):
        raise PipelineError(
            f"{path}: onnxruntime computes something else than PyTorch, {apart:.2g} apart where the largest value is "
            f"{largest:.2g}; --to safetensors carries the model"
        )
    return apart
