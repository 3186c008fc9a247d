"""Dockerfile, .dockerignore, compose.yaml and docs/docker.md: what can be known of them without building an image."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import cli
from pipeline.provenance import git_revision
from tests.test_cluster_files import asked, containers

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BESIDE_PYTHON = Path(sys.executable).parent


def instructions() -> list[tuple[str, str]]:
    """(name, what follows) of each instruction of the Dockerfile, its lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).replace("\\\n", " ")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, _, rest in found]


def of_stages(name: str) -> list[list[str]]:
    """What follows each instruction of that name, by stage."""
    stages: list[list[str]] = []
    for instruction, rest in instructions():
        if instruction == "FROM":
            stages.append([])
        if instruction == name and stages:
            stages[-1].append(rest)
    return stages


def everywhere(name: str) -> list[str]:
    return [rest for stage in of_stages(name) for rest in stage]


def settings(rests: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for rest in rests for word in shlex.split(rest))


def copied() -> list[str]:
    """What the Dockerfile copies out of the context."""
    return [source for rest in everywhere("COPY") if "--from" not in rest for source in rest.split()[:-1]]


def let_through(paths: list[str]) -> set[str]:
    """Those paths that .dockerignore leaves in the context: of the patterns that match a path or a folder above it, the last
    decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    patterns = [(not line.startswith("!"), line.lstrip("!").removeprefix("**/"), "**/" in line) for line in lines]

    def ignored(path: str) -> bool:
        parts, verdict = path.split("/"), False
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        for ignore, pattern, anywhere in patterns:
            assert "/" not in pattern, "patterns of one name are understood here"
            if any(fnmatch.fnmatchcase(name, pattern) for name in (parts if anywhere else above[:1])):
                verdict = ignore
        return verdict

    return {path for path in paths if not ignored(path)}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.rstrip("\0").split("\0")


def test_what_is_copied_is_there_and_enough_to_build_the_wheel():
    assert copied()
    assert all((ROOT / source).exists() for source in copied())
    built = PROJECT["tool"]["setuptools"]
    folders = {built["package-dir"].get(package, package.split(".")[0]) for package in built["packages"]}
    sources = {Path(source).parts[0] for module in built["ext-modules"] for source in module["sources"]}
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert set(copied()) == folders | sources | files


def test_the_context_is_what_is_copied_and_nothing_else():
    paths = tracked()
    expected = {path for path in paths if path.split("/")[0] in copied()}
    rubbish = [
        "pipeline/__pycache__/a.pyc",
        "pipeline/rebalance/engine/_c_kernel.cpython-311.so",
        "cache/x/__pycache__/b.pyc",
    ]
    rubbish += [
        ".git/config",
        ".venv/bin/python",
        "runs/digits-lt/last.pt",
        "data/train/1.jpg",
        ".env",
        "build/lib/x.py",
    ]
    assert let_through(paths + rubbish) == expected
    assert "pipeline/rebalance/engine/csrc/heads.c" in expected


def test_dependencies_are_those_of_the_project():
    """The list that is installed in a layer of its own, made by the Dockerfile's own words."""
    made = next(rest for rest in everywhere("RUN") if "> /requirements.txt" in rest)
    words = shlex.split(made.split("> /requirements.txt")[0])
    assert words[:2] == ["python3", "-c"]
    code = words[2].replace("/src/pyproject.toml", str(ROOT / "pyproject.toml"))
    extras = settings(everywhere("ARG"))["EXTRAS"].split()
    done = subprocess.run([sys.executable, "-c", code, *extras], capture_output=True, text=True, check=True)
    optional = PROJECT["project"]["optional-dependencies"]
    assert done.stdout.splitlines() == PROJECT["project"]["dependencies"] + [
        r for name in extras for r in optional[name]
    ]
    assert not re.search(r"\b(torch|numpy|timm)\b", " ".join(rest for name, rest in instructions() if name == "RUN"))


def test_the_final_stage_takes_from_the_others_and_starts_as_it_says():
    runs, copies = of_stages("RUN")[-1], of_stages("COPY")[-1]
    assert all(
        rest.startswith("--from=wheel ") for rest in copies
    )  # a change of the sources keeps the dependencies' layer
    assert not any(
        "apt-get" in rest or "--mount" in rest for rest in runs
    )  # a mount's change is not seen by all builders
    assert json.loads(of_stages("ENTRYPOINT")[-1][0])[-1] in PROJECT["project"]["scripts"]
    user, _, group = of_stages("USER")[-1][0].partition(":")
    assert int(user) > 0  # a number: Kubernetes cannot know that a name is not root
    assert int(group) > 0


def test_labels_agree_with_the_project():
    labels = settings(of_stages("LABEL")[-1])
    one = "org.opencontainers.image."
    assert labels[f"{one}title"] == PROJECT["project"]["name"]
    assert labels[f"{one}version"] == PROJECT["project"]["version"]
    assert labels[f"{one}licenses"] == PROJECT["project"]["license"]
    assert PROJECT["project"]["description"].startswith(labels[f"{one}description"].split(",")[0])
    assert "REVISION=" in of_stages("ARG")[-1]
    for name in ("created", "source", "base.digest"):
        argument = labels[f"{one}{name}"].strip("${}")
        assert f"{argument}=" in of_stages("ARG")[-1], name
    assert labels[f"{one}revision"] == settings(of_stages("ENV")[-1])["PIPELINE_REVISION"] == "${REVISION}"


def test_what_an_image_was_built_from_is_in_what_it_makes(monkeypatch, tmp_path):
    """Outside a checkout, as in the image."""
    monkeypatch.setattr("pipeline.provenance.__file__", str(tmp_path / "pipeline" / "provenance.py"))
    monkeypatch.delenv("PIPELINE_REVISION", raising=False)
    assert git_revision() is None
    monkeypatch.setenv("PIPELINE_REVISION", "1a6f449")
    assert git_revision() == "1a6f449"


def test_caches_are_in_one_folder_that_any_user_may_write_to():
    environment = settings(of_stages("ENV")[-1])
    folders = {name: value for name, value in environment.items() if value.startswith("/") and name != "PATH"}
    assert folders["HOME"] == "/cache"
    assert of_stages("VOLUME")[-1] == ["/cache"]  # may be written to under docker run --read-only too
    assert all(Path(folder).is_relative_to("/cache") for folder in folders.values())
    assert {"MPLCONFIGDIR", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} <= set(folders)
    assert environment["USER"]  # else torch asks for the name of a user that may have none
    assert "install -d -m 1777 /work /cache" in " ".join(everywhere("RUN"))


@pytest.mark.skipif(not (BESIDE_PYTHON / "hadolint").exists(), reason="hadolint is not in the extra dev on this system")
def test_hadolint_finds_nothing():
    done = subprocess.run(
        [BESIDE_PYTHON / "hadolint", "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def services() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_services_differ_in_the_gpu_alone_and_start_one_of_our_commands():
    gpu, cpu = services()["gpu"], services()["cpu"]
    asked(gpu["command"])
    (device,) = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert cpu.pop("profiles") == ["cpu"]
    assert gpu == cpu


def compose(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What Docker Compose answers, which needs no engine for it."""
    found = shutil.which("docker-compose", path=BESIDE_PYTHON) or shutil.which("docker-compose")
    if not found:
        pytest.skip("Docker Compose is not in the extra dev on this system")
    return subprocess.run(
        [found, "--project-directory", ROOT, "--file", ROOT / "compose.yaml", "--env-file", "/dev/null", *words],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_docker_compose_reads_it_as_it_is_meant():
    said = {
        "UID": "12345",
        "GID": "54321",
        "DATA": "/images",
        "WORK": "/runs",
        "SHM_SIZE": "16gb",
        "REVISION": "1a6f449",
    }
    done = compose("--profile", "cpu", "config", "--format", "json", **said)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for name, service in json.loads(done.stdout)["services"].items():
        mounts = {mount["target"]: mount for mount in service["volumes"]}
        assert (mounts["/data"]["source"], mounts["/data"]["read_only"]) == ("/images", True)
        assert (mounts["/work"]["source"], mounts["/work"].get("read_only")) == ("/runs", None)
        assert mounts["/cache"]["type"] == "volume"
        assert (service["user"], int(service["shm_size"])) == ("12345:54321", 16 * 2**30)
        assert (service["read_only"], service["tmpfs"]) == (True, ["/tmp"])
        assert service["build"]["args"] == {"REVISION": "1a6f449"}
        assert ("deploy" in service) == (name == "gpu")


def test_docker_compose_starts_no_gpu_where_none_is_asked_for():
    done = compose("config", "--format", "json", "cpu")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["services"]) == ["cpu"]


def commands(path: str) -> list[list[str]]:
    """The words of each docker command in a page's code blocks or a file's comments, lines that go on joined."""
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = re.sub(r"\\\n#?", " ", text).splitlines()
    found = (re.match(r"(?:# +)?(docker .*)", line) for line in lines)
    return [shlex.split(line[1].replace("&&", ";").split(";")[0], comments=True) for line in found if line]


def ours(words: list[str]) -> list[str]:
    """What follows the image, or the service, in a docker command that starts it."""
    names = services() if "compose" in words else ("iwb-pipeline",)
    return words[next(place for place, word in enumerate(words) if word in names) + 1 :]


@pytest.mark.parametrize(("path", "many"), [("docs/docker.md", 6), ("compose.yaml", 2), ("Dockerfile", 1)])
def test_commands_that_are_told_are_ours(path, many):
    started = [ours(words) for words in commands(path) if "run" in words]
    assert len(started) == many
    for name, *rest in started:
        command = cli.get_command(None, name)
        assert command is not None, name
        command.make_context(name, [*rest])


def test_an_image_has_one_name():
    built = {
        words[words.index("-t") + 1]
        for path in ("docs/docker.md", "Dockerfile")
        for words in commands(path)
        if "-t" in words
    }
    used = {service["image"] for service in services().values()}
    assert built == used == {"iwb-pipeline"}
    pulled = {container["image"] for container in containers().values()}
    assert len(pulled) == 1
    assert f"`{(name := pulled.pop())}`" in (ROOT / "docs/docker.md").read_text(encoding="utf-8")
    assert name.rpartition("/")[2] == "iwb-pipeline"


def test_the_page_tells_what_the_image_has():
    text = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?:\.\./|[a-z]+\.md)[^)#]*)\)", text):
        assert (ROOT / "docs" / target).exists(), target
    arguments = {rest.partition("=")[0] for name, rest in instructions() if name == "ARG"}
    assert set(re.findall(r"--build-arg (\w+)", text)) == arguments
    for folder in re.findall(r"-v \S+:(/\w+)", text):
        assert folder in ("/work", "/cache", "/data", "/shared")
