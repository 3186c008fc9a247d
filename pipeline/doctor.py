"""Self-test of the installation: versions, devices, precision, room, and computations that really run."""

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.provenance import LIBRARIES, library_version
from pipeline.resources import measured_free_memory, usable_cores
from pipeline.text import Shown, callable_as, columns, wrapped

SHOWN = (
    *LIBRARIES,
    "click",
    "rich",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "matplotlib",
    "pillow",
    "google-crc32c",
)
LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHARED = 2.0, 2.0, 1.0  # GiB
APART = 2e-2  # a GPU multiplies in TF32; a wrong kernel is off by far more
SHARED = Path("/dev/shm")
FOR_DEVELOPERS = ("dev", "docs")


@dataclass(frozen=True)
class Check:
    """One part of the self-test: how long it took, or why it failed."""

    name: str
    ok: bool
    seconds: float
    said: str


@dataclass(frozen=True)
class Diagnosis(Shown):
    """The result of `doctor`.

    Arguments:
        ok: every check passed.
        why: the reason for the device and the precision.
        kernel: instruction sets of the C kernel of stage 2, the one used first in front; empty without a kernel.
        extras: optional extra → packages that are missing of it.
        memory_free_gib, shared_memory_free_gib: None where the system does not say.
        disk_free_gib: of `folder`.
        warnings: sentences for a person.
    """

    ok: bool
    python: str
    platform: str
    versions: dict[str, str | None]
    devices: tuple[str, ...]
    device: str
    precision: str
    why: str
    threads: int
    cores: int
    kernel: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]
    memory_free_gib: float | None
    shared_memory_free_gib: float | None
    disk_free_gib: float
    folder: str
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        memory = "unknown" if self.memory_free_gib is None else f"{self.memory_free_gib:.1f} GiB"
        shared = "" if self.shared_memory_free_gib is None else f", shared memory {self.shared_memory_free_gib:.2f} GiB"
        facts = {
            "python": f"{self.python}, {self.platform}",
            "versions": ", ".join(f"{name} {version or 'missing'}" for name, version in self.versions.items()),
            "devices": ", ".join(self.devices),
            "takes": f"{self.device}, {self.precision}: {self.why}",
            "threads": f"{self.threads} of {self.cores} cores",
            "kernel": f"{self.kernel[0]} (of {', '.join(self.kernel)})" if self.kernel else "none: tensor operations",
            "extras": ", ".join(self._extras()),
            "free": f"memory {memory}{shared}, disk {self.disk_free_gib:.1f} GiB in {self.folder}",
        }
        entries = list(facts.items())
        entries += [("ok" if c.ok else "FAILED", f"{c.name}: {c.said} ({c.seconds:.2f} s)") for c in self.checks]
        entries += [("warning", text) for text in self.warnings]
        lines = [line for name, text in entries for line in wrapped(f"{name:<9} ", text, columns(), indent=10)]
        took = sum(check.seconds for check in self.checks if check.name != "libraries")
        end = f"all is well; the self-test took {took:.1f} s" if self.ok else "something is wrong: see FAILED above"
        return "\n".join([*lines, end])

    def _extras(self) -> list[str]:
        """Each extra that is there, and how to get those that are not."""
        image = "PIPELINE_IMAGE" in os.environ
        install = "docker build --build-arg EXTRAS='s3 {}'" if image else "pip install 'iwb-pipeline[{}]'"
        return [
            f"{name} missing ({install.format(name)})" if missing else name for name, missing in self.extras.items()
        ]


def doctor(folder: Path | None = None) -> Diagnosis:
    """Looks at this machine and runs a network, a store, a stage-2 fit and a process group on it, each for a moment.

    folder: whose disk is measured, default the current one.
    """
    folder = folder or Path.cwd()
    checks = [_check("libraries", _import_libraries)]
    devices, device, precision, why, threads = ["cpu"], "cpu", "float32", "the libraries could not be loaded", 0
    if checks[0].ok:
        checks += filter(None, [_unusable_gpu()])
        devices, device, precision, why, threads = _devices()
        checks.append(_check("network", lambda: _run_network(device)))
        checks.append(_check("store", _run_store))
        checks.append(_check("stage 2", lambda: _run_stage2(device)))
        checks.append(_check("processes", lambda: _run_processes(device)))
    free, disk = measured_free_memory(), shutil.disk_usage(folder).free / 2**30
    memory = None if free is None else free / 2**30
    shared = shutil.disk_usage(SHARED).free / 2**30 if SHARED.exists() else None
    return Diagnosis(
        ok=all(check.ok for check in checks),
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: library_version(name) for name in SHOWN},
        devices=tuple(devices),
        device=device,
        precision=precision,
        why=why,
        threads=threads,
        cores=usable_cores(),
        kernel=_kernels(),
        extras=extras(),
        memory_free_gib=memory,
        shared_memory_free_gib=shared,
        disk_free_gib=disk,
        folder=str(folder),
        checks=tuple(checks),
        warnings=(*_warnings(memory, shared, disk, folder), *_without_kernel(device)),
    )


def device_name(device: str = "auto") -> str:
    """`NVIDIA H100 80GB HBM3`, or `cpu, 2 threads`: what a number was measured on, of a --device."""
    import torch

    from pipeline.distributed import choose_device

    selected = choose_device(device)
    return (
        torch.cuda.get_device_name(selected) if selected.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    )


def _import_libraries() -> str:
    import timm  # noqa: F401
    import torch
    import torchvision

    torchvision.ops.nms(
        torch.zeros(1, 4), torch.zeros(1), 0.5
    )  # fails where torch and torchvision do not belong together
    return "torch, torchvision and timm load and fit together"


def _unusable_gpu() -> Check | None:
    """The failed check of a GPU that is there and cannot be used."""
    from pipeline.distributed import unusable_gpu

    reason = unusable_gpu()
    return Check("gpu", False, 0.0, reason) if reason else None


def _devices() -> tuple[list[str], str, str, str, int]:
    """(every device, the one `auto` takes, precision, why that precision, threads)."""
    import torch

    from pipeline.backbone.arithmetic import SMALL_NETWORK, choose_precision
    from pipeline.distributed import choose_device, driver_version, unusable_gpu

    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        size = facts.total_memory / 2**30
        capability = f"compute capability {facts.major}.{facts.minor}"
        driver = f"CUDA {torch.version.cuda}, driver {driver_version() or 'unknown'}"
        devices.append(f"cuda:{index} {facts.name}, {size:.0f} GiB, {capability}, {driver}")
    device = choose_device("cpu" if unusable_gpu() else "auto")
    precision = choose_precision("auto", device, operations=SMALL_NETWORK)
    why = {
        torch.float32: "this CPU has no bfloat16 units, so half precision would be far slower",
        torch.bfloat16: f"this {device.type.upper().replace('CUDA', 'GPU')} computes bfloat16 natively"
        + (" (small networks stay in float32)" if device.type == "cpu" else ", which needs no loss scaling"),
        torch.float16: "this GPU has no bfloat16 units; float16 with loss scaling",
    }[precision]
    return devices, str(device), str(precision).removeprefix("torch."), why, torch.get_num_threads()


def _run_network(device: str) -> str:
    """A training step of a small network."""
    import torch
    from torch.nn import functional as F

    from pipeline.backbone.build import build_model
    from pipeline.config import BackboneConfig

    config = BackboneConfig.model_validate({"model": "cifar_resnet8", "width": 0.5})
    model = build_model(config, num_classes=10).to(device).train()
    images = torch.linspace(-1, 1, 8 * 3 * 16 * 16, device=device).view(8, 3, 16, 16)
    loss = F.cross_entropy(model(images), torch.arange(8, device=device))
    loss.backward()
    finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    if not (finite and bool(loss.isfinite())):
        raise RuntimeError(f"loss {float(loss)} or its gradients are not finite")
    return f"a training step of cifar_resnet8 on {device}"


def _run_store() -> str:
    """A store written, sealed, verified and read back."""
    import numpy as np

    from cache import StoreSplit, create_store, open_cache, verify

    features = np.arange(60, dtype=np.float32).reshape(20, 3)
    labels = np.arange(20) % 2
    head = {"weight": np.eye(2, 3), "bias": np.zeros(2), "class_names": ["a", "b"], "counts": [10, 10]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.zarr"
        splits = {"train": StoreSplit(1, labels, np.arange(20))}
        origin = {"fingerprint": {"doctor": 1}, "provenance": {}}
        with create_store(path, splits=splits, width=3, dtype="float16", rows_per_chunk=8, **head, **origin) as writer:  # type: ignore[arg-type]
            for chunk in writer.missing():
                writer.write(chunk, features[chunk.start : chunk.stop])
            writer.seal()
        if verify(path) or not np.array_equal(open_cache(path).read("train"), features):
            raise RuntimeError("what was read back is not what was written")
    return f"a feature store written, sealed, verified and read in {tempfile.gettempdir()}"


def _run_stage2(device: str) -> str:
    """Heads fitted to features of two classes, one ten times the other, by what is used here and by tensor operations.

    The rebalanced head must find the small class, and be the same either way.
    """
    import numpy as np

    from pipeline.rebalance.engine.features import Features
    from pipeline.rebalance.engine.fit import Head, Schedule, fit_heads
    from pipeline.rebalance.engine.objective import penalty

    labels = np.repeat([0, 1], [100, 10])
    noise = np.random.default_rng(0).normal(size=(110, 4)).astype(np.float32)
    features = noise + np.where(labels == 0, 3.0, -3.0)[:, None].astype(np.float32)
    zero = Features(
        [features], labels, np.bincount(labels), 0.01 * np.eye(2, 4, dtype=np.float32), np.zeros(2, np.float32)
    )
    schedule = Schedule(epochs=3, lr=0.05, batch_size=16)
    head = Head("cb-softmax", 0.1, penalty())
    weight, bias = fit_heads(zero, [head], seeds=[0], schedule=schedule, device=device)
    right = (features @ weight[0, 0].T + bias[0, 0]).argmax(1) == labels
    recall = float(right[labels == 1].mean())
    if not recall > 0.9:
        raise RuntimeError(f"a fit that separates two distant classes found {100 * recall:.0f} % of the small one")
    again, _ = fit_heads(zero, [head], seeds=[0], schedule=schedule, device="cpu", kernel=None)
    apart = float(np.abs(weight - again).max() / np.abs(again).max())
    if not apart < APART:
        raise RuntimeError(
            f"heads of the same fit differ by {apart:.1e} of their largest number from tensor operations on a CPU"
        )
    kernels = _kernels()
    by = f"the {kernels[0]} kernel" if kernels and device == "cpu" else f"tensor operations on {device}"
    return f"{100 * recall:.0f} % of a class ten times smaller found by {by}, {apart:.0e} from tensor operations on the CPU"


def _run_processes(device: str) -> str:
    """A sum over a process group of one, by the libraries that several processes would use."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return f"{dist.get_backend()} is in use by {dist.get_world_size()} processes"
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/meet", 1), rank=0, world_size=1)
        try:
            for place in dict.fromkeys(("cpu", device)):
                ones = torch.ones(4, device=place)
                dist.all_reduce(ones)
                if not bool((ones == 1).all()):
                    raise RuntimeError(f"a sum over one process on {place} is {ones.tolist()}")
        finally:
            dist.destroy_process_group()
    nccl = "nccl" if dist.is_nccl_available() else "no nccl"
    return f"a sum by {backend}; this torch has {nccl}"


def extras() -> dict[str, tuple[str, ...]]:
    """Optional extra → the packages of it that are missing; those for developers left out."""
    try:
        lines = importlib.metadata.requires("iwb-pipeline") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    missing_packages: dict[str, tuple[str, ...]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        if (extra := re.search(r"""extra == ["'](\w+)["']""", marker)) and extra[1] not in FOR_DEVELOPERS:
            name = re.match(r"[\w.-]+", requirement.strip())
            missing = (name[0],) if name and library_version(name[0]) is None else ()
            missing_packages[extra[1]] = missing_packages.get(extra[1], ()) + missing
    return missing_packages


def _kernels() -> tuple[str, ...]:
    """Instruction sets of the C kernel, the fastest first."""
    try:
        from pipeline.rebalance.engine.c_backend import instruction_sets
    except ImportError:  # of numpy or torch, which the first check tells
        return ()
    return tuple(name for name in instruction_sets() if name != "double")


def _check(name: str, work: Callable[[], str]) -> Check:
    """The outcome of a part of the self-test; whatever it raises is the finding."""
    started = time.perf_counter()
    try:
        text, ok = work(), True
    except Exception as error:
        text, ok = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    return Check(name, ok, round(time.perf_counter() - started, 3), text)


def _warnings(memory: float | None, shared: float | None, disk: float, folder: Path) -> list[str]:
    warnings = []
    if disk < LITTLE_DISK:
        warnings.append(f"only {disk:.1f} GiB of disk are free in {folder}")
    if memory is not None and memory < LITTLE_MEMORY:
        warnings.append(f"only {memory:.1f} GiB of memory are free")
    if shared is not None and shared < LITTLE_SHARED:
        warnings.append(
            f"only {shared:.2f} GiB of shared memory are free in {SHARED}, where image loaders hand over batches and GPUs "
            "gradients; of a container it is set by --shm-size 8g"
        )
    if not os.access(folder, os.W_OK):
        warnings.append(f"{folder} cannot be written to; give --out")
    return warnings


def _without_kernel(device: str) -> list[str]:
    from pipeline.rebalance.engine.c_backend import instruction_sets

    if device.startswith("cuda"):
        import torch

        from pipeline.rebalance.engine.tensor_backend import why_no_kernel

        reason = why_no_kernel(torch.device(device))
        return (
            [f"stage 2 fits heads without its GPU kernel, which needs gcc and Python's headers: {reason}"]
            if reason
            else []
        )
    if instruction_sets() or device != "cpu":
        return []
    return [
        "stage 2 has no compiled kernel and fits heads several times slower: install a C compiler, then the package again"
    ]


callable_as(__name__, doctor)
