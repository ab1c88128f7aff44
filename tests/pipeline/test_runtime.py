"""Starting Ray and joining clusters: failures are reported in one line within seconds; a local Ray is reachable only from this
machine and leaves nothing behind."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray.exceptions
from harness import LINES, LOOPBACK, ROOT, Head, Run, files, free_port, listening, wait_for

from beeline.entry import SIGNALS
from beeline.errors import BeelineError, StorageError
from pipeline import runtime
from pipeline.runtime import ensure_ray, find_head, find_user_error


@pytest.fixture
def web_server() -> Iterator[str]:
    """HOST:PORT of a server that is not a Ray head."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:PORT", "does not answer (Connection refused)"),
        ("no-such-host.invalid:6379", "does not answer ("),
        ("ray://127.0.0.1:10001", "expected HOST:PORT of the head"),
        ("http://127.0.0.1:8265", "expected HOST:PORT of the head"),
        ("nonsense", "expected HOST:PORT of the head"),
        ("127.0.0.1:99999", "expected HOST:PORT of the head"),
    ],
)
def test_addresses_that_lead_nowhere(address: str, said: str) -> None:
    address = address.replace("PORT", str(free_port()))
    with pytest.raises(BeelineError) as caught:
        find_head(address)
    assert address in str(caught.value)
    assert said in str(caught.value)


def test_another_server_is_not_taken_for_a_head(web_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "TIMEOUT", 1)
    with pytest.raises(BeelineError, match=f"the server at {web_server} is not a Ray head"):
        find_head(web_server)


def test_a_head_is_found(head: Head) -> None:
    place = find_head(head.address)
    assert place.split(":")[1] == head.address.split(":")[1]


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "WANDB_BASE_URL", "RAY_ADDRESS"])
def test_passwords_do_not_get_to_ray(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://user:topsecret@127.0.0.1:5000")
    with pytest.raises(BeelineError, match="password") as caught:
        ensure_ray()
    assert name in str(caught.value)
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ({"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}, "does not answer"),
        ({"RAY_TMPDIR": "/dev/null/x"}, "Ray cannot start on this machine"),
        ({"HOME": "/dev/null/x", "RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}, "Ray cannot start on this machine"),
    ],
    ids=["address", "temporary", "home"],
)
def test_a_command_that_cannot_have_ray_says_so_in_one_line(variable: dict[str, str], said: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in (os.environ | variable).items() if value}
    code = (
        "from beeline.entry import run_main; from pipeline.runtime import ensure_ray, shutdown; run_main(ensure_ray, shutdown)"
    )
    if "RAY_ADDRESS" in variable:  # one of them as its user meets it
        command = ["pipeline/ingest_images.py", "digits", "--workspace", str(tmp_path)]
    else:
        command = ["-c", code]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert all(line.startswith("images: 1,797 images in 10 classes") for line in done.stdout.splitlines())
    assert re.fullmatch(rf"error: .*{said}.*\n", done.stderr), done.stderr


def test_a_users_error_is_found_in_what_ray_makes_of_it() -> None:
    inner = ray.exceptions.RayTaskError("_train", "Traceback ...", StorageError("the disk is full"))
    outer = ray.exceptions.RayTaskError("train_lmm", "Traceback ...", inner.as_instanceof_cause())
    for error in (inner, inner.as_instanceof_cause(), outer.as_instanceof_cause()):
        found = find_user_error(error)
        assert str(found) == "the disk is full"
        assert isinstance(found, StorageError)
    assert find_user_error(ray.exceptions.RayTaskError("_train", "Traceback ...", ValueError("a bug"))) is None


def errors(output: str) -> list[str]:
    """List the lines that report an error, without the command's own traceback."""
    assert not re.search("^Traceback", output, re.MULTILINE), output
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_a_ray_of_our_own_keeps_to_loopback_and_ends_with_its_command(trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    settings = ["--pairs.count", "100000", "--pairs.shard-size", "25", "--pairs.batch-size", "25"]
    process = subprocess.Popen(
        [sys.executable, "pipeline/gen_pairs.py", "digits", "--workspace", f"file://{workspace}", *settings],
        cwd=ROOT, env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: len(files(workspace / "pairs", "part-*")) >= 3 or process.poll() is not None, 240, "three shards")
    running = psutil.Process(process.pid).children(recursive=True)
    addresses = listening([psutil.Process(process.pid), *running])
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert addresses, output
    assert addresses <= LOOPBACK
    *lines, last = output.splitlines()
    assert last == f"error: {SIGNALS[signal.SIGTERM]}", output
    assert all(line.startswith("pairs: ") for line in lines), output  # nothing of Ray's
    assert not psutil.wait_procs(running, timeout=60)[1]
    assert not list(workspace.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("script", "number", "worker", "settings"),
    [
        ("trainers/train_lmm.py", signal.SIGINT, "RayTrainWorker", [f"{LINES}.iterations", "100000"]),
        ("trainers/train_lmm.py", signal.SIGKILL, "RayTrainWorker", [f"{LINES}.iterations", "100000"]),
        ("trainers/sweep_lmm.py", signal.SIGTERM, "Trial(", ["--sweep.iterations", "100000"]),
    ],
    ids=["training", "killed training", "sweep"],
)
def test_trainings_on_a_cluster_end_with_their_command(
    script: str, number: signal.Signals, worker: str, settings: list[str], head: Head, trained: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    shutil.copytree(trained / "teacher", workspace / "students/lmm/reconstruction")
    process = subprocess.Popen(
        [sys.executable, script, "digits", "--workspace", str(workspace), *settings],
        cwd=ROOT, env=head.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: bool(head.workers(worker)) or process.poll() is not None, 300, worker)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()  # it would train for hours
    if number in SIGNALS:
        assert process.returncode == 128 + number, output
        assert errors(output) == [f"error: {SIGNALS[number]}"], output
    wait_for(lambda: head.left_over() == ([], []), 90, "the end of actors and placement groups")


def test_errors_in_actors_and_tasks_reach_the_user_as_one_line(run: Run, trained: Path, tmp_path: Path) -> None:
    """Errors come from a pool's work, a worker's constructor, and a task."""
    images, pairs, probe = (tmp_path / name for name in ("images", "pairs", "probe"))
    (images / "images/part-00000.parquet").mkdir(parents=True)
    shutil.copytree(trained, pairs, ignore=shutil.ignore_patterns("teacher"))
    shutil.copytree(trained, probe, ignore=shutil.ignore_patterns("probe"))
    shard = probe / "images/part-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    for command, said in (
        (
            ("pipeline/ingest_images.py", "digits", "--workspace", images),
            "part-00000.parquet cannot be written: Is a directory",
        ),
        (
            ("pipeline/verify_pairs.py", "digits", "--workspace", pairs, "--verify.resample", "1"),
            "holds no model; make it with",
        ),
        (("trainers/train_probe.py", "digits", "--workspace", probe), "part-00000.parquet is damaged"),
    ):
        done = run(*command, ok=False)
        assert done.returncode == 1
        (line,) = errors(done.stdout + done.stderr)
        assert said in line
