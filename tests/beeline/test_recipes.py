"""Recipes are complete and consistent, and contain the papers' numbers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
from configs import restored

from beeline import objectives
from beeline.checkpoint import build
from beeline.objectives import ObjectiveConfig
from beeline.objectives.fd_loss import FrechetLossConfig
from beeline.recipes import RECIPES
from trainers.trials import can_vary


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_consistent(name: str) -> None:
    recipe = RECIPES[name](3)
    assert recipe.name == name
    assert restored(recipe) == recipe
    network = recipe.teacher.network
    assert (recipe.images.resolution, recipe.images.channels) == (network.img_resolution, network.img_channels)
    assert {config.seed for config in (recipe.teacher, recipe.pairs, *recipe.students.values())} == {3}
    assert recipe.probe.losses.seed != recipe.probe.measure.seed
    assert recipe.teacher.batch_size % recipe.teacher.workers.count == 0
    assert (recipe.teacher.augment > 0) <= (network.augment_dim == 9)
    for key, student in recipe.students.items():
        assert student.name == key
        assert student.running
        assert student.batch_size % student.workers.count == 0
    if can_vary(recipe.main):
        assert recipe.sweep.init == next(iter(recipe.main.models())) == "students/lmm/reconstruction"
    pair_bytes = 4 * network.img_channels * network.img_resolution**2
    assert recipe.pairs.shard_size * pair_bytes <= 128 * 2**20


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cifar10", 55_735_299), ("cifar10_uncond", 55_733_891), ("afhqv2", 61_805_571), ("imagenet64", 295_899_267)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build(RECIPES[name](0).teacher.network)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_edms_training_in_iterations() -> None:
    teacher = RECIPES["cifar10"](0).teacher
    assert (teacher.iterations, teacher.optimizer.warmup, round(teacher.ema_half_life)) == (390_625, 19_531, 977)


def test_every_method_has_a_student_in_colour() -> None:
    modules = pkgutil.walk_packages(objectives.__path__, f"{objectives.__name__}.")
    classes = [value for module in modules for value in vars(importlib.import_module(module.name)).values()]
    methods = {value for value in classes if inspect.isclass(value) and issubclass(value, ObjectiveConfig)}
    recipe = RECIPES["cifar10_methods"](0)
    used = {type(phase.objective) for student in recipe.students.values() for phase in student.phases.values()}
    assert used == {method for method in methods if not inspect.isabstract(method)}


def test_score_distillation_sees_the_published_number_of_images() -> None:
    students = RECIPES["cifar10_methods"](0).students
    assert students["sid"].iterations * students["sid"].batch_size == 800_000_000
    assert students["sid"].ema_half_lives[0] * students["sid"].batch_size == pytest.approx(500_000, rel=1e-3)
    assert students["sida"].init == "students/sid"


def test_networks_of_the_frechet_loss_do_not_judge_it() -> None:
    recipe = RECIPES["cifar10_methods"](0)
    (phase,) = recipe.students["fd"].phases.values()
    assert isinstance(phase.objective, FrechetLossConfig)
    assert not set(phase.objective.networks) & {*recipe.evaluate.features, "probe"}
