"""Configs as dictionaries and back, what counts as identity, and the recipes' seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from beeline.config import LmmConfig, NetworkConfig, Recipe, WorkersConfig, from_dict, to_dict
from beeline.recipes import RECIPES
from beeline.samplers import FewStep
from beeline.schedule import check_steps


def stages(recipe: Recipe) -> dict[str, Any]:
    """Every stage's config, by name."""
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return {name: value for name, value in fields.items() if dataclasses.is_dataclass(value)} | recipe.students


CASES = [(name, stage) for name, recipe in RECIPES.items() for stage in stages(recipe(0))]


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_stage_configs_survive_json(recipe: str, stage: str) -> None:
    config = stages(RECIPES[recipe](3))[stage]
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_come_back(recipe: str) -> None:
    made = RECIPES[recipe](3)
    assert from_dict(Recipe, to_dict(made)) == made


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_unknown_keys_are_refused(recipe: str, stage: str) -> None:
    config = stages(RECIPES[recipe](0))[stage]
    with pytest.raises(TypeError, match="no_such_key"):
        from_dict(type(config), to_dict(config) | {"no_such_key": 1})


def test_unknown_nested_and_missing_keys_are_refused() -> None:
    values = to_dict(RECIPES["digits"](0).students["lmm"])
    with pytest.raises(TypeError, match="no_such_key"):
        from_dict(LmmConfig, values | {"reconstruction": values["reconstruction"] | {"no_such_key": 1}})
    with pytest.raises(TypeError, match="reconstruction"):
        from_dict(LmmConfig, {name: value for name, value in values.items() if name != "reconstruction"})


def test_resources_are_left_out_of_the_identity() -> None:
    lmm = RECIPES["digits"](0).students["lmm"]
    everything, identity = to_dict(lmm), to_dict(lmm, resources=False)
    cadence = {"log_every", "checkpoint_every", "validate_every", "validate_count", "keep"}
    assert set(everything) - set(identity) == {"workers", "accumulate", "trackers"} | cadence
    assert everything["workers"]["count"] == lmm.workers.count
    spread = dataclasses.replace(lmm, workers=WorkersConfig(count=7), log_every=1, checkpoint_every=1)
    assert to_dict(spread, resources=False) == identity
    assert to_dict(dataclasses.replace(lmm, num_steps=40), resources=False) != identity


def test_a_pool_is_a_resource() -> None:
    pairs = RECIPES["digits"](0).pairs
    spread = dataclasses.replace(pairs, max_actors=9)
    assert to_dict(spread) != to_dict(pairs)
    assert to_dict(spread, resources=False) == to_dict(pairs, resources=False)
    assert to_dict(dataclasses.replace(pairs, batch_size=1), resources=False) != to_dict(pairs, resources=False)


def test_configs_are_frozen_and_keyword_only() -> None:
    config = NetworkConfig(kind="adm", img_resolution=8, img_channels=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.img_resolution = 16  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        NetworkConfig("adm", 8, 1)  # pyright: ignore[reportCallIssue]


def test_few_step_survives_json() -> None:
    how = FewStep(num_steps=40, rule="line", trained_steps=(0, 3))
    assert from_dict(FewStep, json.loads(json.dumps(to_dict(how)))) == how


def seeds(values: Any) -> Iterator[int]:
    if isinstance(values, dict):
        for name, value in values.items():
            if name == "seed":
                yield value
            else:
                yield from seeds(value)


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_a_recipe_is_seeded_as_a_whole(recipe: str, stage: str) -> None:
    first, second = (list(seeds(to_dict(stages(RECIPES[recipe](seed))[stage]))) for seed in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))
    if stage in ("teacher", "pairs", "probe", "evaluate", "lmm"):
        assert first


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_seeds_do_not_collide(recipe: str, seed: int) -> None:
    made = RECIPES[recipe](seed)
    assert made == RECIPES[recipe](seed)
    assert made.probe.losses.seed != made.probe.measure.seed
    draws = range(made.evaluate.seed, made.evaluate.seed + made.evaluate.draws)
    assert made.pairs.seed not in draws  # students are measured on noise that they never saw


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_consistent(recipe: str) -> None:
    made = RECIPES[recipe](0)
    assert made.name == recipe
    assert (made.teacher.network.img_resolution, made.teacher.network.img_channels) == (
        made.images.resolution,
        made.images.channels,
    )
    assert made.probe.losses.widths != made.probe.measure.widths
    for name, student in made.students.items():
        assert student.name == name
        assert (student.line, student.rule) in {("ve", "same_noise"), ("lerp", "line")}
    for text in (*made.few_steps, *made.sweep.schedules, *made.evaluate.steps):
        check_steps([int(part) for part in text.split(",")], made.students["lmm"].num_steps)
