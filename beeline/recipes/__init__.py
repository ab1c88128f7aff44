"""Recipes: one function per data set that returns the settings of every stage; one seed sets all others.

Make a variant with `dataclasses.replace`. Your own recipe is such a function in any importable module: commands accept
`package.module:function` in place of a recipe's name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace

from beeline.config import Recipe
from beeline.errors import BeelineError, plain
from beeline.recipes.cifar10_methods import cifar10_methods
from beeline.recipes.cifar10_small import cifar10_small
from beeline.recipes.digits import digits
from beeline.recipes.digits_methods import digits_methods
from beeline.recipes.published import afhqv2, cifar10, cifar10_uncond, imagenet64
from beeline.settings import OWN_RECIPE

RECIPES: dict[str, Callable[[int], Recipe]] = {
    "digits": digits,
    "digits_methods": digits_methods,
    "cifar10": cifar10,
    "cifar10_methods": cifar10_methods,
    "cifar10_small": cifar10_small,
    "cifar10_uncond": cifar10_uncond,
    "afhqv2": afhqv2,
    "imagenet64": imagenet64,
}


def find(name: str, seed: int = 0) -> Recipe:
    """Return the recipe called `name`: one of RECIPES, or `package.module:function`, which is imported and called with `seed`.

    Raises BeelineError if there is no such recipe, or if the function returns something else.
    """
    if name in RECIPES:
        return RECIPES[name](seed)
    module, colon, function = name.partition(":")
    if not colon:
        raise BeelineError(f"recipe {name!r} is unknown; expected {', '.join(RECIPES)}, or package.module:function")
    if re.fullmatch(OWN_RECIPE, name) is None:
        raise BeelineError(
            f"recipe {name!r} is not of the form package.module:function; write for example recipes:mine, without .py or /"
        )
    try:
        recipe = getattr(importlib.import_module(module), function)(seed)
    except (ImportError, AttributeError) as error:
        raise BeelineError(
            f"recipe {name!r} cannot be imported ({plain(error)}); expected a function {function}(seed) in a module in this "
            "folder or an installed one"
        ) from error
    if not isinstance(recipe, Recipe):
        raise BeelineError(f"recipe {name!r} returns a {type(recipe).__name__}; expected a beeline.config.Recipe")
    return replace(recipe, name=name)  # messages, and the commands in them, use this name
