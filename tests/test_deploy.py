"""The files in deploy/, against the schemas of those who read them, and run where possible."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import tune_mnist

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "tune_mnist" / "deploy"
IMAGE = f"tune-mnist:{tune_mnist.__version__}"
KUBERNETES = "1.34"
RAYJOBS = ("rayjob-cpu.yaml", "rayjob-gpu.yaml")
PINNED = dict(re.findall(r"^(.+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def rayjob(name: str) -> Any:
    return documents(name)[1]


def check_rayjob(job: dict[str, Any]) -> None:
    schema = yaml.safe_load((ROOT / "tests/data/kuberay_rayjob.schema.yaml").read_text())
    jsonschema.Draft202012Validator(schema).validate(job)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        check_kubernetes({"apiVersion": "v1", "kind": "Pod", **group["template"]})


def check_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_rayjobs_and_the_pod_that_fetches_results_are_what_kuberay_and_kubernetes_take() -> None:
    (pod,) = documents("fetch.yaml")
    check_kubernetes(pod)
    (mounted,) = pod["spec"]["volumes"]
    for volume, job in map(documents, RAYJOBS):
        check_kubernetes(volume)
        check_rayjob(job)
        claim = volume["metadata"]["name"]
        assert mounted["persistentVolumeClaim"]["claimName"] == claim


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("shutdownAfterFinish", True),
        ("shutdownAfterJobFinishes", False),  # ttlSecondsAfterFinished needs it
        ("activeDeadlineSeconds", "9h"),
        ("rayClusterSpec.authOptions.mode", "tokens"),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("rayClusterSpec.workerGroupSpecs", [{"minReplicas": "4"}]),
        ("rayClusterSpec.headGroupSpec.template.spec.volume", []),
    ],
)
def test_a_mistake_in_a_rayjob_would_be_seen(where: str, value: object) -> None:
    job = rayjob("rayjob-cpu.yaml")
    *parents, key = where.split(".")
    reduce(getitem, parents, job["spec"])[key] = value
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(job)


@pytest.mark.parametrize(("name", "is_gpu"), [(RAYJOBS[0], False), (RAYJOBS[1], True)])
def test_rayjobs_end_in_order_before_their_deadline_and_only_one_shares_gpus(
    name: str, is_gpu: bool
) -> None:
    spec = rayjob(name)["spec"]
    found = re.search(r"--time-budget (\d+)h", spec["entrypoint"])
    assert found
    assert int(found[1]) * 3600 < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == is_gpu
    assert ("--gpus-per-trial 0.25" in spec["entrypoint"]) == is_gpu
    assert spec["rayClusterSpec"]["rayVersion"] == PINNED["ray"]


def test_ray_up_takes_the_cluster_of_virtual_machines() -> None:
    (config,) = documents("cluster.yaml")
    validate_config(prepare_config(config))
    config["available_node_types"]["cpu"]["minimum_workers"] = 4
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_every_file_names_the_image_of_this_version_and_that_has_the_constraints() -> None:
    for path in DEPLOY.iterdir():
        images = set(re.findall(r"tune-mnist:[\w.]+", path.read_text()))
        assert images <= {IMAGE}, path
        assert images or path.name == "slurm.sh", path
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert "pip install --no-cache-dir -c constraints.txt '.[cluster]'" in dockerfile
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"FROM python:{needed.removeprefix('>=')}-slim" in dockerfile


@pytest.mark.network
def test_the_image_gets_all_files_that_it_takes_to_install_the_package(tmp_path: Path) -> None:

    context = tmp_path / "context"
    context.mkdir()
    for line in re.findall(r"^COPY (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        *sources, target = line.split()
        for source in map(ROOT.joinpath, sources):
            if source.is_dir():
                shutil.copytree(source, context / target)
            else:
                shutil.copy(source, context / target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(context)], capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr or "No module named pip" in done.stderr:
        pytest.skip(f"no pip, or no package index within reach: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"tune_mnist/deploy/{path.name}" for path in DEPLOY.iterdir()} <= set(names)
    assert "tune_mnist/search_spaces/default.yaml" in names
    assets = {f"tune_mnist/reporting/assets/report.{kind}" for kind in ("html", "css", "js")}
    assert assets <= set(names)


def add_program(tmp_path: Path, name: str, script: str) -> None:
    program = tmp_path / "programs" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def recorded(tmp_path: Path, *commands: str) -> dict[str, str]:
    """An environment in which these commands only write down what they were given."""
    for command in commands:
        add_program(tmp_path, command, f'echo {command} "$@" >> {tmp_path}/said')
    return {**os.environ, "PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}


def said(tmp_path: Path) -> list[str]:
    file = tmp_path / "said"
    lines = file.read_text().splitlines()
    file.unlink()
    return lines


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjob_starts_its_search_and_a_retry_resumes_it(name: str, tmp_path: Path) -> None:
    # As KubeRay's submitter, a shell, hands it to Ray, and Ray to a shell.
    given = rayjob(name)["spec"]["entrypoint"].replace("/results", str(tmp_path))
    handed_on = shlex.join(shlex.split(given))
    environment = recorded(tmp_path, "python")
    subprocess.run(handed_on, shell=True, env=environment, check=True)
    (start,) = said(tmp_path)
    run = re.search(r"--run (\w+)", start)
    assert start.startswith("python -m tune_mnist.search --address auto")
    assert f"--results-dir {tmp_path}" in start
    assert run
    (tmp_path / run[1]).mkdir()
    (tmp_path / run[1] / "search.yaml").touch()
    subprocess.run(handed_on, shell=True, env=environment, check=True)
    (resume,) = said(tmp_path)
    assert f"--resume {tmp_path}/{run[1]}" in resume
    assert "--trials" not in resume


def test_a_slurm_job_starts_its_search_and_submitted_again_resumes_it(tmp_path: Path) -> None:
    environment = recorded(tmp_path, "ray", "srun") | {
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "16",
    }
    add_program(tmp_path, "scontrol", "printf 'node1\\nnode2\\nnode3\\n'")
    command = ["bash", str(DEPLOY / "slurm.sh"), "--space", "quick"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    _, start = said(tmp_path)
    steps, search = start.split(" -- ")
    assert steps == "srun ray symmetric-run --address node1:6379 --min-nodes 3 --num-cpus 16"
    assert search.startswith("python -m tune_mnist.search --address auto")
    assert search.endswith("--run slurm --space quick")
    (tmp_path / "results" / "slurm").mkdir(parents=True)
    (tmp_path / "results" / "slurm" / "search.yaml").touch()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert said(tmp_path)[1].endswith("--resume results/slurm")
