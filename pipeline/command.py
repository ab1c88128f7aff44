"""Command lines of the stages: `python pipeline/gen_pairs.py RECIPE [--workspace URI] [--pairs.count N] ...`.

A stage is a function whose parameters are named after sections of the recipe. The recipe supplies their defaults and tyro
turns them into options. Other code calls the function directly.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

from beeline import recipes
from beeline.entry import run_main
from beeline.errors import BeelineError
from beeline.files.places import holds_credentials
from beeline.recipes import RECIPES
from beeline.settings import naming_options
from pipeline.runtime import RECIPE, find_user_error, shutdown

WORKSPACE = "BEELINE_WORKSPACE"
MAX_RECIPE_SEED = 10**18  # recipes derive further seeds from it, which must fit into 63 bits


def run_command(stage: Callable[..., Any]) -> NoReturn:
    """Parse the command line, run `stage`, exit: 0 for a complete result, 1 with one clear message, 2 for bad options, 130 and
    143 after Ctrl-C and SIGTERM.

    Three arguments choose the defaults: `RECIPE`, `--seed` (seeds every stage of the recipe) and, if the stage trains a
    student, `--student` (one of the recipe's students). All other options override single settings. The environment variables
    BEELINE_RECIPE and BEELINE_WORKSPACE replace RECIPE and --workspace.
    """

    def call() -> None:
        try:
            _parse_and_run(stage)
        except Exception as error:
            user_error = find_user_error(error)  # Ray wraps exceptions raised in its processes
            if user_error is None:
                raise
            raise user_error from None

    run_main(call, cleanup=shutdown)


def _recipe_options(prog: str, argv: Sequence[str], *, student: bool) -> tuple[argparse.Namespace, list[str]]:
    """The options that choose the recipe's defaults, and all other words of the command line."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--seed", default="0")
    if student:
        parser.add_argument("--student")
    return parser.parse_known_args(argv)


def _parse_and_run(stage: Callable[..., Any]) -> None:
    parameters = inspect.signature(stage).parameters
    argv = sys.argv[1:]
    if any(holds_credentials(word) for word in argv):
        raise BeelineError(
            "an option holds a password inside a URL, and Ray shows a command's options to everyone; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or role, and give s3://bucket/prefix alone"
        )
    named = argv.pop(0) if argv and not argv[0].startswith("-") else None
    script, asked_help = f"python {os.path.relpath(sys.argv[0])}", argv in (["-h"], ["--help"])
    name = named or (None if asked_help else os.environ.get(RECIPE))
    if not name or (name not in RECIPES and ":" not in name):
        asked_help = asked_help and named is None
        problem = "" if asked_help else f"{'no recipe' if not name else f'recipe {name!r} is unknown'}; "
        usage = f"usage: {script} RECIPE [--workspace URI] [--seed N] [OPTIONS], RECIPE one of: {', '.join(RECIPES)}"
        own = f"or package.module:function for your own recipe; {RECIPE} and {WORKSPACE} set the defaults"
        print(f"{problem}{usage}, {own}", file=sys.stdout if asked_help else sys.stderr)
        sys.exit(0 if asked_help else 2)
    chosen, argv = _recipe_options(f"{script} {name}", argv, student="student" in parameters)
    seed = chosen.seed
    if not (seed.isascii() and seed.isdigit() and len(seed) < 20 and int(seed) <= MAX_RECIPE_SEED):
        raise BeelineError(f"--seed is {seed!r}; expected a whole number from 0 to {MAX_RECIPE_SEED:,}")
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # Python itself searches only the script's folder
    recipe = recipes.find(name, int(seed))
    os.environ[RECIPE] = name  # workers import the module of a user's recipe (pipeline/runtime.py)
    defaults: dict[str, Any] = {
        "recipe": recipe if parameters.get("recipe") and "Recipe" in str(parameters["recipe"].annotation) else name,
        "workspace": os.environ.get(WORKSPACE) or f"runs/{name.rpartition(':')[2]}",
    }
    defaults |= {section: getattr(recipe, section) for section in parameters if hasattr(recipe, section)}
    if "student" in parameters:
        student = recipe.main.name if chosen.student is None else chosen.student
        if student not in recipe.students:
            raise BeelineError(f"--student is {student!r}; this recipe has {', '.join(recipe.students)}")
        defaults["student"] = recipe.students[student]
    call = functools.partial(stage, **{key: value for key, value in defaults.items() if key in parameters})
    with naming_options(argv):
        tyro.cli(call, args=argv, prog=f"{script} {name} [--seed N]")
