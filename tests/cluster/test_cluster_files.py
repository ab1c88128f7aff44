"""Cluster files: valid by the schemas of their readers, and consistent with each other and with the commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
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
    """Load the launcher's file with Ray's defaults filled in, as `ray up` does."""
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
        assert config["SecurityGroupIds"] == ["sg-your-group"], "Ray's own group lets in SSH from everywhere"
    region = aws["provider"]["region"]
    assert all(zone[:-1] == region for zone in aws["provider"]["availability_zone"].split(","))
    assert f"--env AWS_DEFAULT_REGION={region}" in aws["docker"]["run_options"]


def policy(name: str) -> list[dict[str, Any]]:
    """Return the statements of a policy in cluster/aws/, with actions and resources as lists."""
    found = json.loads(text(f"aws/{name}.json"))
    assert found["Version"] == "2012-10-17"
    for statement in found["Statement"]:
        assert statement["Effect"] == "Allow"
        for key in ("Action", "Resource"):
            value = statement.get(key, [])
            statement[key] = [value] if isinstance(value, str) else value
    return found["Statement"]


def test_roles_may_do_no_more_than_they_must(aws: dict[str, Any]) -> None:
    files = [path for path in (ROOT / "cluster").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert "FullAccess" not in "".join(path.read_text() for path in files)
    launch, name, region = policy("launch"), aws["cluster_name"], aws["provider"]["region"]
    for statement in (*launch, *policy("bucket")):
        assert not any("*" in action for action in statement["Action"])
        looks = all(action.startswith("ec2:Describe") for action in statement["Action"])
        assert ("*" in statement["Resource"]) == looks, "only looking goes for everything"
        for resource in statement["Resource"]:
            _, service, where = (resource.split(":", 4) + [""] * 4)[1:4]
            assert service in ("s3", "iam", "") or where == region
    may = {action: statement for statement in launch for action in statement["Action"]}
    assert set(may) == {
        "ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances",
        "ssm:GetParameters", "iam:PassRole",
    }  # fmt: skip
    assert may["ec2:TerminateInstances"]["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": name}}
    started = next(statement["Condition"]["StringEquals"] for statement in launch if "LaunchMachines" in statement["Sid"])
    assert started["aws:RequestTag/ray-cluster-name"] == name
    types = aws["available_node_types"]
    assert set(started["ec2:InstanceType"]) == {types[kind]["node_config"]["InstanceType"] for kind in ("cpu", "gpu")}
    worker = types["gpu"]["node_config"]["IamInstanceProfile"]["Name"]
    assert may["iam:PassRole"]["Resource"] == [f"arn:aws:iam::your-account:role/{worker}"]
    assert policy("trust")[0]["Principal"] == {"Service": "ec2.amazonaws.com"}
    image = types["head"]["node_config"]["ImageId"].removeprefix("resolve:ssm:")
    assert (
        f"{may['ssm:GetParameters']['Resource'][0].removesuffix('*').split(':')[-1]}"
        == "parameter/aws/service/deeplearning/ami/"
    )
    assert image.startswith("/aws/service/deeplearning/ami/")
    assert f"region={region}\n" in text("aws/prepare.sh")


AWS = """#!/usr/bin/env python3
import json, sys, pathlib
words = sys.argv[1:]
log = pathlib.Path(__file__).with_name("log")
made = log.read_text().splitlines() if log.exists() else []
with log.open("a") as file:
    print(json.dumps(words), file=file)
if words[:2] == ["sts", "get-caller-identity"]:
    print("123456789012")
elif words[:2] == ["ec2", "describe-security-groups"]:
    print("sg-0abc" if any("create-security-group" in line for line in made) else "None")
elif words[:2] == ["iam", "get-role"]:
    sys.exit(not any("create-role" in line and words[-1] in line for line in made))
"""


def test_the_roles_are_made_with_the_users_names_and_once(tmp_path: Path) -> None:
    """Use an `aws` command that records its calls."""
    (tmp_path / "aws").write_text(AWS)
    (tmp_path / "aws").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command_line = [ROOT / "cluster/aws/prepare.sh", "my-bucket", "203.0.113.7/32"]
    for _ in range(2):
        done = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "SecurityGroupIds: [sg-0abc]" in done.stdout
    calls = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert not any("your-" in word for words in calls for word in words)
    documents = [words[words.index("--policy-document") + 1] for words in calls if "--policy-document" in words]
    assert len(documents) == 2 * 3
    assert all(json.loads(document)["Statement"] for document in documents)
    assert any("123456789012:security-group/sg-0abc" in document for document in documents)
    for once in ("create-security-group", "create-role", "create-instance-profile"):
        assert sum(words[1] == once for words in calls) == (1 if "group" in once else 2)
    let_in = [words for words in calls if words[1] == "authorize-security-group-ingress"]
    assert [words[-2:] for words in let_in] == [["--source-group", "sg-0abc"], ["--cidr", "203.0.113.7/32"]]


# Kubernetes ---------------------------------------------------------------------------------------------------------------


def fields(*required: str, **optional: Any) -> dict[str, Any]:
    """Build a JSON schema: an object with only these fields. `required` are names of `optional`."""
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
LEAST = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
PEER = fields(namespaceSelector={"type": "object"}, podSelector=fields("matchLabels", matchLabels=LABELS))
CONTAINER = fields(
    "name", "image", "resources", "ports", "securityContext",
    securityContext={"const": LEAST},
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
        securityContext={"const": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}},
        automountServiceAccountToken={"const": False},
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
        autoscalerOptions=fields(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, securityContext={"const": LEAST}),
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
    "NetworkPolicy": fields(
        "podSelector", "policyTypes", "ingress",
        podSelector=fields("matchLabels", matchLabels=LABELS),
        policyTypes={"const": ["Ingress"]},
        ingress=many(fields("from", **{"from": many(PEER)}, ports=many(fields("port", port=COUNT)))),
    ),
    "PodMonitor": fields(
        "selector", "podMetricsEndpoints",
        selector=fields(matchLabels=LABELS),
        podTargetLabels=many(TEXT),
        podMetricsEndpoints=many(fields("port", port=TEXT, interval={**TEXT, "pattern": "^[0-9]+(ms|s|m)$"})),
    ),
}  # fmt: skip
VERSIONS = {
    "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "PodMonitor": "monitoring.coreos.com/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}  # fmt: skip


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """List the containers of a RayCluster's pods, the head's first."""
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


@pytest.mark.parametrize("name", ["raycluster", "jobs", "podmonitor"])
def test_kubernetes_files_have_only_known_fields(name: str) -> None:
    for document in documents(f"kuberay/{name}.yaml"):
        kind = document["kind"]
        if kind in SPECS:
            schema = fields("spec", apiVersion={"const": VERSIONS[kind]}, kind=TEXT, metadata=METADATA, spec=SPECS[kind])
        else:
            body = {"ConfigMap": {"data": LABELS}}[kind]  # and no Secret: keys are no business of files in a repository
            schema = fields(*body, apiVersion={"const": "v1"}, kind=TEXT, metadata=METADATA, **body)
        jsonschema.validate(document, schema)


def test_kubernetes_names_agree(ray_cluster: dict[str, Any]) -> None:
    name, spec = ray_cluster["metadata"]["name"], ray_cluster["spec"]
    monitor = documents("kuberay/podmonitor.yaml")[0]["spec"]
    (secret,) = re.findall(r"create secret generic (\S+)", text("kuberay/raycluster.yaml"))
    (documented,) = re.findall(r"create secret generic (\S+)", (ROOT / "docs/clusters.md").read_text())
    assert secret == documented
    assert {key for key in settings() if key.startswith("AWS_")} <= set(runtime.FOLLOWING)
    known = {("configMapRef", documents("kuberay/raycluster.yaml")[0]["metadata"]["name"])}
    known.add(("secretRef", secret))
    for container in containers(ray_cluster):
        assert {(kind, ref["name"]) for source in container["envFrom"] for kind, ref in source.items()} == known
    assert monitor["selector"]["matchLabels"] == {"ray.io/cluster": name}
    head, *workers = [
        {port["name"]: port["containerPort"] for port in container["ports"]} for container in containers(ray_cluster)
    ]
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= set(head)
    for group, ports in zip([spec["headGroupSpec"], *spec["workerGroupSpecs"]], [head, *workers], strict=True):
        assert int(group["rayStartParams"]["metrics-export-port"]) == ports["metrics"]


def test_only_friends_reach_the_pods(ray_cluster: dict[str, Any]) -> None:
    spec = documents("kuberay/raycluster.yaml")[2]["spec"]
    own = {"matchLabels": {"ray.io/cluster": ray_cluster["metadata"]["name"]}}
    assert spec["podSelector"] == own
    within, operator, prometheus = spec["ingress"]
    assert within == {"from": [{"podSelector": own}]}
    ports = {port["name"]: port["containerPort"] for port in containers(ray_cluster)[0]["ports"]}
    assert [rule["port"] for rule in operator["ports"]] == [ports["dashboard"]]
    scraped = {endpoint["port"] for endpoint in documents("kuberay/podmonitor.yaml")[0]["spec"]["podMetricsEndpoints"]}
    assert {rule["port"] for rule in prometheus["ports"]} == {ports[name] for name in scraped}


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
    """List the commands in all matching files, as words: in comments, over several lines, and in scripts."""
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
            patch.setenv("BEELINE_RECIPE", "digits")  # jobs have the head's
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


def test_a_local_head_takes_jobs_with_the_token(trained: Path, tmp_path: Path) -> None:
    dashboard, metrics, workspace = free_port(), free_port(), tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = inherited | {"HOME": str(tmp_path), "PORT": str(free_port()), "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    environment |= {"BEELINE_RECIPE": "own_method:tiny", "BEELINE_WORKSPACE": str(workspace)}
    environment |= {"DASHBOARD_PORT": str(dashboard), "METRICS_PORT": str(metrics)}
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [
                ROOT / "cluster/local.sh", "--num-cpus=4", "--object-store-memory=80000000", "--min-worker-port=21000",
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
        # Without a working directory of its own a job has that of `ray start`, and its environment: jobs.yaml relies on both.
        done = subprocess.run(
            [Path(sys.executable).parent / "ray", "job", "submit", "--", "python", "pipeline/gen_pairs.py"],
            cwd=tmp_path, env=environment | {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pairs: 100 of 100 pairs" in done.stdout
        assert len(list((workspace / "pairs").glob("part-*.parquet"))) == 2
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
