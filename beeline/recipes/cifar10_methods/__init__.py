"""CIFAR-10 with a student of every method, at the settings of their papers or of the authors' code.

Where a paper has no CIFAR-10 run (AYF, BOOT, shortcut models, FD-loss, guided distillation), or does not say a setting, the
settings are ours and marked so. None has been trained yet.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace

from beeline.config import Recipe
from beeline.recipes.cifar10_methods.flows import flows
from beeline.recipes.cifar10_methods.maps import consistency, flow_maps, halving
from beeline.recipes.cifar10_methods.scores import adversarial_scores, fine_tuning, scores
from beeline.recipes.published import cifar10


def cifar10_methods(seed: int = 0) -> Recipe:
    """CIFAR-10, class-conditional, with a student of every method (pairs of the teacher, LPIPS with VGG16 at 224 pixels)."""
    recipe = cifar10(seed)
    families = (consistency, flow_maps, flows, halving, scores, adversarial_scores, fine_tuning)
    students = functools.reduce(operator.or_, (family(recipe.main) for family in families), recipe.students)
    return replace(recipe, name="cifar10_methods", students=students)
