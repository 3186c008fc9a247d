"""What configs/cluster gives to Slurm and Kubernetes: against the models of their APIs, and of our own command line."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import cli
from pipeline.cli.job import job_of
from pipeline.config import shipped_configs

FOLDER = Path(__file__).parent.parent / "configs" / "cluster"
KINDS = {
    "PersistentVolumeClaim": "kubernetes.client.models.V1PersistentVolumeClaim",
    "Job": "kubernetes.client.models.V1Job",
    "PyTorchJob": "kubeflow.training.models.KubeflowOrgV1PyTorchJob",
}
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def checked(document: dict[str, Any]) -> None:
    """Raises ValueError, naming the field, unless the document is what the API's generated model of its kind takes."""
    module, _, name = KINDS[document["kind"]].rpartition(".")
    known = vars(importlib.import_module("kubernetes.client.models")) | vars(importlib.import_module(module))
    _as(name, document, known, document["kind"])


def _as(kind: str, value: Any, known: dict[str, Any], where: str) -> None:
    if found := re.fullmatch(r"list\[(.+)\]|dict\(str, (.+)\)", kind):
        if not isinstance(value, list if found[1] else dict):
            raise ValueError(f"{where}: expected a {'list' if found[1] else 'mapping'}, got {value!r}")
        for name, one in enumerate(value) if found[1] else value.items():
            _as(found[1] or found[2], one, known, f"{where}.{name}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind == "int" and isinstance(value, bool)):
            raise ValueError(f"{where}: expected {kind}, got {value!r}")
    else:
        model = known[kind]
        names = {there: here for here, there in model.attribute_map.items()}
        if unknown := [field for field in value if field not in names]:
            raise ValueError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(names)}")
        for field, inner in value.items():
            _as(model.openapi_types[names[field]], inner, known, f"{where}.{field}")
        try:
            model(**{names[field]: inner for field, inner in value.items()})  # fields that are required
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


@pytest.mark.parametrize("name", ["kubernetes-job.yml", "kubernetes-pytorchjob.yml"])
def test_the_api_takes_it(name):
    for document in documents(name):
        checked(document)


def break_job(path: str, value: Any) -> dict[str, Any]:
    *names, last = path.split(".")
    document = inner = documents("kubernetes-job.yml")[1]
    for name in names:
        inner = inner[int(name) if isinstance(inner, list) else name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.backOffLimit", 3, "Job.spec: unknown backOffLimit"),
        ("spec.backoffLimit", "3", "Job.spec.backoffLimit: expected int"),
        ("spec.template", None, "Job.spec: .*template"),
        ("spec.template.spec.containers.0.name", None, "containers.0: .*name"),
        ("spec.template.spec.containers.0.args", [8], r"args.0: expected str, got 8"),
        ("spec.template.spec.containers.0.volumeMounts", {}, "volumeMounts: expected a list"),
    ],
)
def test_what_the_api_would_refuse_is_found(path, value, told):
    with pytest.raises(ValueError, match=told):
        checked(break_job(path, value))


def containers() -> dict[str, dict[str, Any]]:
    job, pytorch = documents("kubernetes-job.yml")[1], documents("kubernetes-pytorchjob.yml")[0]
    pods = {"Job": job["spec"]["template"], "PyTorchJob": pytorch["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]}
    return {kind: pod["spec"]["containers"][0] for kind, pod in pods.items()}


def asked(words: list[str]):
    """The job that a command line asks for; a usage error if it is none."""
    name, *rest = words
    context = cli.get_command(None, name).make_context(name, rest)
    return job_of(context, nproc=context.params["nproc"])


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_its_command_is_one_of_ours_and_uses_every_gpu(kind):
    container = containers()[kind]
    job = asked(container["args"])
    assert job.nproc == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert job.restarts == 3


def test_the_pods_of_a_pytorchjob_meet_where_the_operator_serves():
    document, container = documents("kubernetes-pytorchjob.yml")[0], containers()["PyTorchJob"]
    job, policy = asked(container["args"]), document["spec"]["elasticPolicy"]
    assert job.endpoint == (f"{document['metadata']['name']}-worker-0", container["ports"][0]["containerPort"])
    assert job.nodes == (policy["minReplicas"], policy["maxReplicas"])
    assert document["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == policy["maxReplicas"]
    assert (container["name"], container["ports"][0]["name"]) == ("pytorch", "pytorchjob-port")


def run_sbatch(folder: Path, *words: str, code: int = 0, **environment: str) -> tuple[int, list[list[str]]]:
    """(exit code, commands called) of the script where srun and scontrol only write down what they are called with."""
    show = (
        'case "$*" in *hostnames*) echo n1; echo n2;; *oneliner*) echo "NodeName=n1 NodeAddr=192.0.2.1 Port=1";; esac'
    )
    for name, does in {"srun": f"exit {code}", "scontrol": show}.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/called\n{does}\n')
        (folder / name).chmod(0o755)
    known = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]"} | environment
    done = subprocess.run(["bash", str(FOLDER / "slurm.sbatch"), *words], env=known, capture_output=True, text=True)
    called = folder / "called"
    return done.returncode, [shlex.split(line) for line in called.read_text().splitlines()] if called.exists() else []


def test_slurm_starts_one_launcher_a_node_that_meet_at_the_first(tmp_path):
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    code, called = run_sbatch(tmp_path, "train-backbone", "imagenet-lt", **nodes)
    assert code == 0
    srun = called[-1]
    assert srun[0] == "srun"
    job = asked(srun[srun.index("pipeline") + 1 :])
    assert (job.nproc, job.nodes, job.endpoint, job.name, job.restarts) == (
        4, (2, 2), ("192.0.2.1", 22345), "slurm-12345", 3,
    )  # fmt: skip


@pytest.mark.parametrize("code", [143, 1, 2, 3, 0])
def test_slurm_queues_again_what_was_stopped_and_nothing_else(tmp_path, code):
    ended, called = run_sbatch(tmp_path, "run", "digits-lt", code=code, SLURM_JOB_NUM_NODES="1")
    assert ended == code
    assert (["scontrol", "requeue", "12345"] in called) == (code == 143)
    srun = next(words for words in called if words[0] == "srun")
    assert not asked(srun[srun.index("pipeline") + 1 :]).several


def test_cluster_files_are_no_configurations():
    assert not [name for name in shipped_configs() if "cluster" in name or "kubernetes" in name]
