"""From a stage's function to its command: `python pipeline/gen_pairs.py RECIPE [--workspace URI] [--pairs.count N] ...`.

A stage is a function whose parameters are named after sections of the recipe; their defaults come from the recipe, and
tyro makes the options. The function itself is what other code calls.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import ray
import tyro

from beeline.errors import BeelineError
from beeline.recipes import RECIPES
from beeline.settings import naming_options

MAX_RECIPE_SEED = 10**18  # recipes make other seeds of it, which fit into 63 bits, too
WORKER_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}  # patched, every printed line comes twice
# Where the bucket and the trackers are goes with the job. Keys do not: Ray shows a job's environment to everyone. Nodes have
# their own.
FOLLOWING = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_EC2_METADATA_DISABLED"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"),
    *("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE", "WANDB_DIR"),
)


def run_command(stage: Callable[..., Any]) -> NoReturn:
    """Parse the command line, run `stage`, exit: 0 for a complete result, 1 with one clear message, 2 for bad options.

    `RECIPE`, `--seed` (seeds every stage of the recipe) and, where the stage trains a student, `--student` (which of the
    recipe's students the defaults come from) choose the defaults; everything else overrides single settings.
    """
    parameters = inspect.signature(stage).parameters
    argv = sys.argv[1:]
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    script = f"python {os.path.relpath(sys.argv[0])}"
    if name not in RECIPES:
        asked_help = name is None and argv in (["-h"], ["--help"])
        problem = "" if asked_help else f"{'no recipe' if name is None else f'recipe {name!r} is unknown'}; "
        usage = f"usage: {script} RECIPE [--workspace URI] [--seed N] [OPTIONS], RECIPE one of: {', '.join(RECIPES)}"
        print(f"{problem}{usage}", file=sys.stdout if asked_help else sys.stderr)
        sys.exit(0 if asked_help else 2)
    seed = _pop_option(argv, "--seed", "0")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 20 and int(seed) <= MAX_RECIPE_SEED):
        _fail(f"--seed is {seed!r}; expected a whole number from 0 to {MAX_RECIPE_SEED:,}")
    recipe = RECIPES[name](int(seed))
    defaults: dict[str, Any] = {
        "recipe": recipe if parameters.get("recipe") and "Recipe" in str(parameters["recipe"].annotation) else name,
        "workspace": f"runs/{name}",
    }
    defaults |= {section: getattr(recipe, section) for section in parameters if hasattr(recipe, section)}
    if "lmm" in parameters:
        student = _pop_option(argv, "--student", "lmm")
        if student not in recipe.students:
            _fail(f"--student is {student!r}; this recipe has {', '.join(recipe.students)}")
        defaults["lmm"] = recipe.students[student]
    call = functools.partial(stage, **{key: value for key, value in defaults.items() if key in parameters})
    try:
        with _unwrapped_errors(), naming_options(argv):
            tyro.cli(call, args=argv, prog=f"{script} {name} [--seed N]")
    except BeelineError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", status=130)
    finally:
        gc.collect()  # a reference to one of Ray's objects that is dropped after Ray's shutdown ends the process with status 1
        ray.shutdown()
    sys.exit(0)


def _fail(message: str, status: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _pop_option(argv: list[str], option: str, default: str) -> str:
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(f"{option}="):
            del argv[i]
            return word.split("=", 1)[1]
    return default


@contextlib.contextmanager
def _unwrapped_errors():
    """Let a BeelineError that was raised inside Ray come out as itself."""
    try:
        yield
    except BeelineError:
        raise
    except Exception as error:
        inner = find_user_error(error)
        if inner is not None:
            raise inner from None
        raise


def find_user_error(error: BaseException | None) -> BeelineError | None:
    """The BeelineError in a chain of causes, Ray's wrappers included, or None."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, BeelineError):
            return BeelineError(*error.args)  # without the traceback text that Ray adds to its dual types
        failures = getattr(error, "worker_failures", None)
        waiting += [error.__cause__, error.__context__]
        waiting += [getattr(error, name, None) for name in ("cause", "controller_failure")]
        waiting += list(failures.values()) if isinstance(failures, dict) else []
    return None


def ensure_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start a Ray of our own on this machine, unless one is already up."""
    if ray.is_initialized():
        return
    runtime_env = {"env_vars": WORKER_ENVIRONMENT | {name: os.environ[name] for name in FOLLOWING if name in os.environ}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, runtime_env=runtime_env)
        return
    # At least 4 logical CPUs: pools reserve whole CPUs, and Ray Data needs some of its own to make progress.
    cpus = max(4, os.cpu_count() or 1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=300 * 2**20,
        include_dashboard=True,  # Ray Train asks it whether its controller is alive
        logging_level=logging.WARNING,
        runtime_env=runtime_env,
    )


class Progress:
    """Lines of progress for long work: items done, rate, time left. At most one every `interval` seconds."""

    def __init__(self, what: str, total: int, unit: str, interval: float = 5.0) -> None:
        self.what, self.total, self.unit, self.interval = what, total, unit, interval
        self.done, self._start, self._last = 0, time.monotonic(), time.monotonic()

    def add(self, count: int, note: str = "") -> None:
        """Count `count` more items done; `note` is appended to the line."""
        self.done += count
        now = time.monotonic()
        if now - self._last >= self.interval or self.done >= self.total:
            self._last = now
            rate = self.done / max(now - self._start, 1e-9)
            left = round((self.total - self.done) / max(rate, 1e-9))
            print(
                f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f}/s, "
                f"{datetime.timedelta(seconds=left) if left >= 120 else f'{left} s'} left{note}",
                flush=True,
            )
