"""The files that start clusters: whole by the schemas of those who read them, and in step with each other and the commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from harness import LOOPBACK, ROOT, free_port, listening, parse_command, wait_for
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster import spot_notice
from pipeline import runtime
from pipeline.stage import MADE_BY

FILES = sorted(path for path in (ROOT / "cluster").rglob("*") if path.suffix in (".yaml", ".sh") or path.name == "Dockerfile")
STAGES = {*MADE_BY.values(), "evaluation/report.py", "cluster/run_pipeline.py"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"your-registry/beeline:{PROJECT['version']}"


def text(name: str) -> str:
    return (ROOT / "cluster" / name).read_text()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text(name)))


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    """The launcher's file with Ray's defaults filled in, as `ray up` does."""
    return prepare_config(documents("aws.yaml")[0])


@pytest.fixture(scope="module")
def ray_cluster() -> dict[str, Any]:
    return documents("kuberay/raycluster.yaml")[1]


def settings() -> dict[str, str]:
    return documents("kuberay/raycluster.yaml")[0]["data"]


# Versions -----------------------------------------------------------------------------------------------------------------


def test_versions_agree_with_the_pins(aws: dict[str, Any], ray_cluster: dict[str, Any]) -> None:
    ray = next(pin.split("==")[1] for pin in PROJECT["dependencies"] if pin.startswith("ray["))
    python = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    assert re.findall(r"^FROM (.*)", text("Dockerfile"), re.M) == [f"rayproject/ray:{ray}-py{python}-gpu"]
    assert ray_cluster["spec"]["rayVersion"] == ray
    assert aws["docker"]["image"] == IMAGE
    assert {container["image"] for container in containers(ray_cluster)} == {IMAGE}
    assert f"-t {IMAGE} " in text("Dockerfile")
    for path in FILES:
        assert not re.search(r"[\w\]]==\d", path.read_text()), f"{path} repeats a pin"


def test_the_image_holds_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    copied = re.findall(r"^COPY --chown=ray:users (.*) \S+$", text("Dockerfile"), re.M)
    words = " ".join(copied).split()
    assert {package.split(".")[0] for package in packages} <= set(words)
    assert all((ROOT / word).exists() for word in words)
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"} <= set(words)


# AWS ----------------------------------------------------------------------------------------------------------------------


def test_ray_accepts_the_launchers_file(aws: dict[str, Any]) -> None:
    validate_config(aws)
    commands = [aws[key] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")]
    assert commands == [[], [], []], "Ray's defaults install things"
    assert list(aws["file_mounts"].values()) == ["~/.ray/auth_token"]
    broken = {**aws, "max_worker": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(broken)


def test_the_machines_are_what_they_are_called(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert types[aws["head_node_type"]]["resources"] == {"CPU": 0}
    assert [types[name]["min_workers"] for name in types] == [0, 0, 0]
    assert sum(kind["max_workers"] for kind in types.values()) == aws["max_workers"]
    accelerated = re.compile(r"(p\d+|g\d+)[a-z]*\.")
    for name, kind in types.items():
        config = kind["node_config"]
        assert bool(accelerated.match(config["InstanceType"])) == (name == "gpu")
        assert (config.get("InstanceMarketOptions") == {"MarketType": "spot"}) == (name == "gpu")
        assert config["IamInstanceProfile"]["Name"] == ("beeline-head" if name == "head" else "beeline-worker")
        assert config["MetadataOptions"]["HttpTokens"] == "required"  # spot_notice.py asks with a token
    region = aws["provider"]["region"]
    assert all(zone[:-1] == region for zone in aws["provider"]["availability_zone"].split(","))
    assert f"--env AWS_DEFAULT_REGION={region}" in aws["docker"]["run_options"]


# Kubernetes ---------------------------------------------------------------------------------------------------------------


def fields(*required: str, **optional: Any) -> dict[str, Any]:
    """A JSON schema: an object with these fields and no others. `required` are names of `optional`."""
    return {"type": "object", "properties": optional, "required": list(required), "additionalProperties": False}


def many(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
LABELS = {"type": "object", "additionalProperties": TEXT}
DNS_LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
METADATA = fields("name", name=DNS_LABEL, labels=LABELS)
# Written by hand from Kubernetes' and KubeRay 1.5's API types: of their hundreds of fields those in use. Kubernetes drops or
# refuses a field that it does not know, so a slip of the pen must not pass.
REFERENCE = fields("name", name=DNS_LABEL, optional=FLAG)
CONTAINER = fields(
    "name", "image", "resources", "ports",
    name=DNS_LABEL, image=TEXT,
    envFrom=many({"oneOf": [fields("configMapRef", configMapRef=REFERENCE), fields("secretRef", secretRef=REFERENCE)]}),
    lifecycle=fields(preStop=fields(exec=fields("command", command=many(TEXT)))),
    ports=many(fields("name", "containerPort", name={**TEXT, "maxLength": 15}, containerPort=COUNT)),
    resources=fields("requests", "limits", requests=LABELS, limits=LABELS),
)  # fmt: skip
POD = fields(
    "spec",
    spec=fields(
        "containers",
        containers=many(CONTAINER),
        securityContext=fields(runAsNonRoot=FLAG, runAsUser=COUNT),
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=LABELS,
        tolerations=many(fields("key", "operator", key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect=TEXT)),
    ),
)
GROUP = {"rayStartParams": LABELS, "template": POD}
SPECS = {
    "RayCluster": fields(
        "rayVersion", "headGroupSpec", "workerGroupSpecs",
        rayVersion=TEXT,
        authOptions=fields("mode", mode={"enum": ["token", "disabled"]}),
        enableInTreeAutoscaling=FLAG,
        autoscalerOptions=fields(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
        headGroupSpec=fields("rayStartParams", "template", **GROUP),
        workerGroupSpecs=many(
            fields("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template",
                   groupName=DNS_LABEL, minReplicas=COUNT, maxReplicas=COUNT, **GROUP)
        ),
    ),
    "RayJob": fields(
        "entrypoint", "clusterSelector",
        clusterSelector=LABELS,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        backoffLimit={"const": 0},  # see jobs.yaml
        entrypoint=TEXT,
    ),
    "PodMonitor": fields(
        "selector", "podMetricsEndpoints",
        selector=fields(matchLabels=LABELS),
        podTargetLabels=many(TEXT),
        podMetricsEndpoints=many(fields("port", port=TEXT, interval={**TEXT, "pattern": "^[0-9]+(ms|s|m)$"})),
    ),
}  # fmt: skip
VERSIONS = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "PodMonitor": "monitoring.coreos.com/v1"}


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The containers of a RayCluster's pods, the head's first."""
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


@pytest.mark.parametrize("name", ["raycluster", "jobs", "podmonitor", "s3-secret"])
def test_kubernetes_files_have_only_known_fields(name: str) -> None:
    for document in documents(f"kuberay/{name}.yaml"):
        kind = document["kind"]
        if kind in SPECS:
            schema = fields("spec", apiVersion={"const": VERSIONS[kind]}, kind=TEXT, metadata=METADATA, spec=SPECS[kind])
        else:
            body = {"Secret": {"type": TEXT, "stringData": LABELS}, "ConfigMap": {"data": LABELS}}[kind]
            schema = fields(*body, apiVersion={"const": "v1"}, kind=TEXT, metadata=METADATA, **body)
        jsonschema.validate(document, schema)


def test_kubernetes_names_agree(ray_cluster: dict[str, Any]) -> None:
    name, spec = ray_cluster["metadata"]["name"], ray_cluster["spec"]
    secret, monitor = documents("kuberay/s3-secret.yaml")[0], documents("kuberay/podmonitor.yaml")[0]["spec"]
    assert all(value.startswith("your-") for value in secret["stringData"].values()), "keys in the repository"
    assert {key for key in settings() if key.startswith("AWS_")} <= set(runtime.FOLLOWING)
    known = {("configMapRef", documents("kuberay/raycluster.yaml")[0]["metadata"]["name"])}
    known.add(("secretRef", secret["metadata"]["name"]))
    for container in containers(ray_cluster):
        assert {(kind, ref["name"]) for source in container["envFrom"] for kind, ref in source.items()} == known
    assert monitor["selector"]["matchLabels"] == {"ray.io/cluster": name}
    head, *workers = [
        {port["name"]: port["containerPort"] for port in container["ports"]} for container in containers(ray_cluster)
    ]
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= set(head)
    for group, ports in zip([spec["headGroupSpec"], *spec["workerGroupSpecs"]], [head, *workers], strict=True):
        assert int(group["rayStartParams"]["metrics-export-port"]) == ports["metrics"]


def test_pods_scale_from_none_and_leave_in_time(ray_cluster: dict[str, Any]) -> None:
    spec = ray_cluster["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["gpu", "cpu"]
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group["groupName"] == "gpu")
        python, script, *options = container["lifecycle"]["preStop"]["exec"]["command"]
        assert (python, script) == ("python", "/home/ray/beeline/cluster/spot_notice.py")
        assert spot_notice.parse(options).now < pod["terminationGracePeriodSeconds"]


def test_there_is_a_job_for_each_stage(ray_cluster: dict[str, Any]) -> None:
    jobs = documents("kuberay/jobs.yaml")
    assert {shlex.split(job["spec"]["entrypoint"])[1] for job in jobs} == STAGES
    assert len(jobs) == len(STAGES)
    for job in jobs:
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": ray_cluster["metadata"]["name"]}
        assert job["metadata"]["labels"] == {"stage": job["metadata"]["name"]}
        assert job["metadata"]["name"] == Path(shlex.split(job["spec"]["entrypoint"])[1]).stem.replace("_", "-")


# Commands -----------------------------------------------------------------------------------------------------------------


def commands(pattern: str) -> Iterator[list[str]]:
    """The commands of all files that match, as words: those in comments, over several lines and in scripts alike."""
    variables = {**settings(), "RAY_HEAD_IP": "10.0.0.1", "root": "/home/me/beeline"}
    for path in FILES:
        whole = re.sub(r"\\?\n\s*(#\s+)?(?=--\w|python )", " ", path.read_text())
        for found in re.findall(pattern + r"[^\n`>]*", whole):
            filled = re.sub(r"\$\{?(\w+)(:-\w+|[%#][*:]+)?\}?", lambda m: variables.get(m[1], "0"), found)
            yield [word for word in shlex.split(filled) if word != "$@"]


def test_every_command_exists_and_takes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [*commands(r"python (?=(?:pipeline|trainers|evaluation|cluster)/)")]
    for words in seen:
        with monkeypatch.context() as patch:
            parse_command(words, patch)
    assert {words[1] for words in seen} == STAGES
    for _, _, *arguments in commands(r"python (?=/home/ray/beeline/cluster/spot_notice)"):
        spot_notice.parse(arguments)


def test_ray_knows_its_options(ray_cluster: dict[str, Any]) -> None:
    groups = [ray_cluster["spec"]["headGroupSpec"], *ray_cluster["spec"]["workerGroupSpecs"]]
    used = {f"--{name}" for group in groups for name in group["rayStartParams"]}
    started = [*commands(r"ray start (?=-)")]
    assert len(started) >= 3
    used |= {word.split("=")[0] for words in started for word in words if word.startswith("--")}
    assert used >= {"--head", "--address", "--autoscaling-config", "--dashboard-host", "--metrics-export-port", "--num-cpus"}
    ray = Path(sys.executable).parent / "ray"
    help = subprocess.run([ray, "start", "--help"], capture_output=True, text=True, timeout=60).stdout
    assert used <= set(re.findall(r"--[a-z][a-z-]+", help))


# A head on this machine -----------------------------------------------------------------------------------------------------


def test_a_local_head_takes_jobs_with_the_token(tmp_path: Path) -> None:
    dashboard, metrics = free_port(), free_port()
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = inherited | {"HOME": str(tmp_path), "PORT": str(free_port()), "WORKSPACE": "s3://bucket/here"}
    environment |= {"DASHBOARD_PORT": str(dashboard), "METRICS_PORT": str(metrics)}
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [
                ROOT / "cluster/local.sh", "--num-cpus=1", "--object-store-memory=80000000", "--min-worker-port=21000",
                "--max-worker-port=21100", f"--ray-client-server-port={free_port()}",
            ],
            cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    family = []
    try:
        wait_for(lambda: b"Ctrl-C" in log.read_bytes() or process.poll() is not None, 90, "the head")
        assert process.poll() is None, log.read_text()
        family = psutil.Process(process.pid).children(recursive=True)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/jobs/", timeout=30)
        token = tmp_path / ".ray/auth_token"
        assert token.stat().st_mode & 0o077 == 0, "others can read the token"
        program = "import os; print('ran in', os.getcwd(), 'for', os.environ['WORKSPACE'])"
        done = subprocess.run(
            [
                str(Path(sys.executable).parent / "ray"), "job", "submit", f"--address=http://127.0.0.1:{dashboard}",
                "--", sys.executable, "-c", program,
            ],
            cwd=tmp_path, env=environment | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        # Without a working directory of its own a job has that of `ray start`, and its environment: jobs.yaml relies on both.
        assert f"ran in {ROOT} for s3://bucket/here" in done.stdout
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=30) as answer:
            assert b"ray_" in answer.read()
        family = psutil.Process(process.pid).children(recursive=True)
        assert listening(family)
        assert listening(family) <= LOOPBACK
        join = "from pipeline.runtime import ensure_ray, shutdown; ensure_ray(); shutdown()"
        address = {"RAY_ADDRESS": f"127.0.0.1:{environment['PORT']}", "RAY_AUTH_MODE": "token"}
        subprocess.run([sys.executable, "-c", join], cwd=ROOT, env=environment | address, check=True, timeout=120)
    finally:
        process.terminate()
        process.wait(60)
        left = psutil.wait_procs(family, 10)[1]
        for child in left:
            child.kill()
    assert process.returncode == 143
    assert family
    assert not left
    folder = re.findall(r"logs +(\S+)/session_latest", log.read_text())[0]
    assert not Path(folder).exists()
