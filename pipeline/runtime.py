"""Start Ray or join a cluster: ports on loopback, no noise in the output, one clear message on failure."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import ray
from ray._private import log, ray_constants, services
from ray._private.ray_logging import stderr_deduplicator, stdout_deduplicator

from beeline.errors import BeelineError, StorageError, plain
from beeline.files.places import holds_credentials

TIMEOUT = 10  # seconds the head of a cluster has to answer; applies to two checks
LOOPBACK = "127.0.0.1"
RECIPE, FOLDER = "BEELINE_RECIPE", "BEELINE_FOLDER"
WORKER_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}  # with Ray's patch, every printed line appears twice
# Locations of the bucket and the trackers go to the workers with the job. Secret keys do not, because Ray shows a job's
# environment to everyone; the nodes have keys of their own.
FOLLOWING = (
    RECIPE,
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_EC2_METADATA_DISABLED"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"),
    *("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE", "WANDB_DIR"),
)
# Ray warns about its own normal work (Ray Data and Ray Train pass arguments to actors through the object store, and kill actors
# that are no longer needed) and about pools that are intentionally larger than the number of cores.
NOISE = (
    "has constructor arguments in the object store and max_restarts > 0",
    "PYTHON worker processes have been started on node",
    "The actor is dead because it was killed by `ray.kill`",
)

_until_shutdown = contextlib.ExitStack()


def ensure_ray() -> None:
    """Join the cluster at RAY_ADDRESS, or start a local Ray on this machine, unless Ray is already up.

    Raises BeelineError if the cluster does not answer within seconds, if Ray cannot start, or if a variable that goes with the
    job holds a password.
    """
    if ray.is_initialized():
        return
    variables = WORKER_ENVIRONMENT | {name: os.environ[name] for name in FOLLOWING if name in os.environ}
    for name, value in variables.items():
        if holds_credentials(value):
            raise BeelineError(
                f"{name} holds a password, and Ray shows a job's variables to everyone. Remove it from the URL and set it on "
                "every machine in a separate variable (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, AWS_*)"
            )
    address = os.environ.get("RAY_ADDRESS")
    address = find_head(address) if address and address != "local" else None
    _leave_out_noise()
    _until_shutdown.enter_context(_filtered_stderr())
    with _our_signals():
        try:
            _join(address, variables) if address else _start(variables)
        except Exception as error:
            cause = " ".join(str(error).split()).removesuffix(".")
            if address:
                raise BeelineError(
                    f"the Ray cluster at {address} cannot be joined ({cause}). The command must run on one of its machines "
                    "with the same Ray, Python and token; or submit it as a job"
                ) from error
            raise BeelineError(
                f"Ray cannot start on this machine ({cause}). It must be able to write to "
                f"{os.environ.get('RAY_TMPDIR') or '/tmp'} (or RAY_TMPDIR, a short path) and, for its token, to the home "
                "folder; on a busy machine run the command again"
            ) from error


def _join(address: str, variables: dict[str, str]) -> None:
    # Worker processes read RAY_ADDRESS in Ray's State API; without it they may find another Ray on the same machine.
    runtime_env = _runtime_env(variables | {"RAY_ADDRESS": address})
    ray.init(address=address, logging_level=logging.WARNING, runtime_env=runtime_env)


def _runtime_env(variables: dict[str, str]) -> dict[str, Any]:
    """Build the environment of worker processes; with a user's recipe they import its module, which may add sampling rules."""
    if ":" not in variables.get(RECIPE, ""):
        return {"env_vars": variables}
    hook = f"{__name__}.{import_own_recipe.__name__}"
    return {"env_vars": variables | {FOLDER: os.getcwd()}, "worker_process_setup_hook": hook}


def import_own_recipe() -> None:
    """Import the module of BEELINE_RECIPE; each worker process calls this first.

    The module comes from the folder that Ray copied to the node, or else from the driver's folder, on the same machine or a
    shared disk.
    """
    sys.path.extend([os.getcwd(), os.environ[FOLDER]])
    importlib.import_module(os.environ[RECIPE].partition(":")[0])


def logical_cpus() -> int:
    """CPUs that our own Ray has: at least 4. Pools reserve whole CPUs, and Ray Data needs some of its own to make progress."""
    return max(4, os.cpu_count() or 1)


def _start(variables: dict[str, str]) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _keep_to_loopback()
    port = os.environ.setdefault(ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE, str(_free_port()))
    ray.init(
        address="local",
        num_cpus=logical_cpus(),
        object_store_memory=300 * 2**20,
        include_dashboard=True,  # Ray Train asks it whether its controller is alive
        logging_level=logging.WARNING,
        runtime_env=_runtime_env(variables | {"RAY_ADDRESS": f"{LOOPBACK}:{port}"}),
        _node_ip_address=LOOPBACK,
    )


def shutdown() -> None:
    """Leave the cluster, or stop the local Ray."""
    gc.collect()  # dropping a reference to a Ray object after Ray's shutdown ends the process with status 1
    ray.shutdown()
    _until_shutdown.close()


def find_head(address: str) -> str:
    """Return HOST:PORT of the head at `address`, which is HOST:PORT or "auto".

    Raises BeelineError unless a Ray head answers within seconds; Ray's own client would try for 15 minutes.
    """
    if address == "auto":
        try:
            place = services.get_ray_address_from_environment(address, None)
        except ConnectionError:
            raise BeelineError("RAY_ADDRESS is 'auto', but no Ray runs on this machine; start one, or unset it") from None
    else:
        place = address
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):(\d{1,5})", str(place))
    if match is None or not 0 < int(match[2]) < 2**16:
        shown = "a URL with a password" if holds_credentials(address) else repr(address)
        raise BeelineError(
            f"RAY_ADDRESS is {shown}; expected HOST:PORT of the head (by default port 6379), or auto. Ray's client (ray://) "
            "and its dashboard (http://) cannot be used to join a cluster; unset it to start a local Ray"
        )
    host, port = match[1].strip("[]"), int(match[2])
    fix = "Start it, correct RAY_ADDRESS, or unset it to start a local Ray"
    try:
        socket.create_connection((host, port), timeout=TIMEOUT).close()
    except OSError as error:
        raise BeelineError(f"the Ray cluster at {address} does not answer ({plain(error)}). {fix}") from None
    if os.environ.get("RAY_USE_TLS", "0") != "1":
        channel = grpc.insecure_channel(str(place))
        try:
            grpc.channel_ready_future(channel).result(timeout=TIMEOUT)
        except grpc.FutureTimeoutError:
            raise BeelineError(f"the server at {address} is not a Ray head (by default port 6379). {fix}") from None
        finally:
            channel.close()
    public = services.canonicalize_bootstrap_address(str(place)) or str(place)
    if public != place and not _answers(public):  # a head that listens only on loopback, like the one of cluster/local.sh
        _keep_to_loopback()
        return str(place)
    return public


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT):
        return True
    return False


def _keep_to_loopback() -> None:
    """Make Ray listen only on loopback and look for a head there.

    Ray does this when it believes that it cannot be a cluster. This process has read the variable already; its child processes
    have not.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def find_user_error(error: BaseException | None) -> BeelineError | None:
    """Find the BeelineError in a chain of causes, including Ray's wrappers, or return None."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, BeelineError):
            kind = StorageError if isinstance(error, StorageError) else BeelineError
            return kind(*error.args)  # without the traceback text that Ray adds to its dual types
        failures = getattr(error, "worker_failures", None)
        waiting += [error.__cause__, error.__context__]
        waiting += [getattr(error, name, None) for name in ("cause", "controller_failure")]
        waiting += list(failures.values()) if isinstance(failures, dict) else []
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _our_signals() -> Iterator[None]:
    """Keep our SIGTERM handler: Ray installs one in Python while it starts, and then one that dumps a stack."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:  # Ray's handler has seen the signal
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _leave_out_noise() -> None:
    """Remove Ray's messages about its normal work from our output; warnings and errors stay."""
    pattern = re.compile("|".join(map(re.escape, NOISE)))
    for deduplicator in (stdout_deduplicator, stderr_deduplicator):  # output of Ray's processes passes through them
        deduplicator.skip_re = pattern
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # errors of other tasks than the one that ends the command
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


@contextlib.contextmanager
def _filtered_stderr() -> Iterator[None]:
    """Remove lines of NOISE from what Ray's C++ code writes to stderr in this process.

    A separate grep process does it, so that nothing is lost if this process crashes.
    """
    grep, texts = shutil.which("grep"), [f"-e{text}" for text in NOISE]
    try:
        original = os.dup(2) if grep else -1
    except OSError:  # it is closed
        original = -1
    if grep is None or original < 0:
        yield
        return
    process = subprocess.Popen(
        [grep, "--line-buffered", "-vF", *texts], stdin=subprocess.PIPE, stdout=original, start_new_session=True
    )
    assert process.stdin is not None
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        os.close(original)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process started here may still hold the other end
            process.wait(5)


def quiet_data() -> None:
    """Silence Ray Data's messages about its normal work; call it once Ray Data is imported."""
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # we have our own progress
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, log.PlainRayHandler):
            handler.setLevel(logging.WARNING)
