"""From a stage's function to its command: `python pipeline/gen_pairs.py RECIPE [--workspace URI] [--pairs.count N] ...`.

A stage is a function whose parameters are named after sections of the recipe; their defaults come from the recipe, and
tyro makes the options. The function itself is what other code calls.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import tyro

from beeline.entry import run_main
from beeline.errors import BeelineError
from beeline.places import holds_credentials
from beeline.recipes import RECIPES
from beeline.settings import naming_options
from pipeline.runtime import find_user_error, shutdown

MAX_RECIPE_SEED = 10**18  # recipes make other seeds of it, which fit into 63 bits, too


def run_command(stage: Callable[..., Any]) -> NoReturn:
    """Parse the command line, run `stage`, exit: 0 for a complete result, 1 with one clear message, 2 for bad options, 130 and
    143 after Ctrl-C and SIGTERM.

    `RECIPE`, `--seed` (seeds every stage of the recipe) and, where the stage trains a student, `--student` (which of the
    recipe's students the defaults come from) choose the defaults; everything else overrides single settings.
    """

    def call() -> None:
        try:
            _parse_and_run(stage)
        except Exception as error:
            user_error = find_user_error(error)  # Ray wraps what is raised in its processes
            if user_error is None:
                raise
            raise user_error from None

    run_main(call, cleanup=shutdown)


def _parse_and_run(stage: Callable[..., Any]) -> None:
    parameters = inspect.signature(stage).parameters
    argv = sys.argv[1:]
    if any(holds_credentials(word) for word in argv):
        raise BeelineError(
            "an option holds a password inside a URL, and Ray shows a command's options to everyone; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or role, and give s3://bucket/prefix alone"
        )
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
        raise BeelineError(f"--seed is {seed!r}; expected a whole number from 0 to {MAX_RECIPE_SEED:,}")
    recipe = RECIPES[name](int(seed))
    defaults: dict[str, Any] = {
        "recipe": recipe if parameters.get("recipe") and "Recipe" in str(parameters["recipe"].annotation) else name,
        "workspace": f"runs/{name}",
    }
    defaults |= {section: getattr(recipe, section) for section in parameters if hasattr(recipe, section)}
    if "lmm" in parameters:
        student = _pop_option(argv, "--student", "lmm")
        if student not in recipe.students:
            raise BeelineError(f"--student is {student!r}; this recipe has {', '.join(recipe.students)}")
        defaults["lmm"] = recipe.students[student]
    call = functools.partial(stage, **{key: value for key, value in defaults.items() if key in parameters})
    with naming_options(argv):
        tyro.cli(call, args=argv, prog=f"{script} {name} [--seed N]")


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
