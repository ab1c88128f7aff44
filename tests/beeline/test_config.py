"""Configs as dictionaries and back, their identity, and the recipes' seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from configs import restored, with_objectives

from beeline.config import NetworkConfig, PhaseConfig, Recipe, StudentConfig, WorkersConfig, from_dict, to_dict
from beeline.objectives import Needs
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig
from beeline.recipes import RECIPES
from beeline.sampling.few_step import FewStep, parse_steps


def stages(recipe: Recipe) -> dict[str, Any]:
    """List every stage's config, by name."""
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return {name: value for name, value in fields.items() if dataclasses.is_dataclass(value)} | recipe.students


CASES = [(name, stage) for name, recipe in RECIPES.items() for stage in stages(recipe(0))]


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_stage_configs_survive_json(recipe: str, stage: str) -> None:
    config = stages(RECIPES[recipe](3))[stage]
    assert restored(config) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_come_back(recipe: str) -> None:
    made = RECIPES[recipe](3)
    assert restored(made) == made
    assert list(restored(made).students) == list(made.students)  # the first is the main one


def test_code_named_in_a_file_is_not_loaded() -> None:
    student = RECIPES["digits_methods"](0).students["kd"]
    with pytest.raises(TypeError, match="abstract class ObjectiveConfig"):
        from_dict(StudentConfig, to_dict(student))


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_unknown_keys_are_refused(recipe: str, stage: str) -> None:
    config = stages(RECIPES[recipe](0))[stage]
    parts = [phase.objective for phase in config.phases.values()] if isinstance(config, StudentConfig) else []
    for part in (config, *parts):
        with pytest.raises(TypeError, match="no_such_key"):
            from_dict(type(part), with_objectives(part, to_dict(part)) | {"no_such_key": 1})


def test_unknown_nested_and_missing_keys_are_refused() -> None:
    lmm = RECIPES["digits"](0).students["lmm"]
    values = with_objectives(lmm, to_dict(lmm))
    phase = values["phases"]["reconstruction"]
    with pytest.raises(TypeError, match="no_such_key"):
        from_dict(StudentConfig, values | {"phases": {"reconstruction": phase | {"no_such_key": 1}}})
    with pytest.raises(TypeError, match="objective"):
        from_dict(PhaseConfig, {name: value for name, value in phase.items() if name != "objective"})
    with pytest.raises(TypeError, match="phases"):
        from_dict(StudentConfig, {name: value for name, value in values.items() if name != "phases"})


def test_resources_are_left_out_of_the_identity() -> None:
    lmm = RECIPES["digits"](0).students["lmm"]
    everything, identity = to_dict(lmm), to_dict(lmm, resources=False)
    cadence = {"log_every", "checkpoint_every", "validate_every", "validate_count", "keep"}
    assert set(everything) - set(identity) == {"workers", "accumulate", "trackers", "pairs", "dropout", "subsets"} | cadence
    assert everything["workers"]["count"] == lmm.workers.count
    spread = dataclasses.replace(lmm, workers=WorkersConfig(count=7), log_every=1, checkpoint_every=1)
    assert to_dict(spread, resources=False) == identity
    assert to_dict(dataclasses.replace(lmm, subsets=2), resources=False) != identity
    phase = lmm.phases["adversarial"]
    for changed in (
        dataclasses.replace(phase, iterations=9),
        dataclasses.replace(phase, objective=dataclasses.replace(phase.objective, num_steps=40)),  # pyright: ignore[reportCallIssue]
        dataclasses.replace(phase, objective=DistillationConfig()),
    ):
        assert to_dict(dataclasses.replace(lmm, phases=lmm.phases | {"adversarial": changed}), resources=False) != identity
    kd, rf = (dataclasses.replace(phase, objective=made()) for made in (DistillationConfig, RectifiedFlowConfig))
    assert to_dict(kd, resources=False)["objective"].keys() == to_dict(rf, resources=False)["objective"].keys()
    assert to_dict(kd) != to_dict(rf)  # methods of the same settings


def test_phases_of_no_iterations_are_left_out() -> None:
    lmm = RECIPES["digits"](0).main
    first, second, third = lmm.phases.values()
    assert (list(lmm.running), lmm.iterations) == (["reconstruction", "adversarial", "frechet"], 620)
    assert lmm.models() == {"students/lmm/reconstruction": first, "students/lmm/adversarial": second, "students/lmm": third}
    assert lmm.needs() == Needs(noise=True, pairs=True, images=True, all_images=True, features=("probe",))
    assert lmm.record("reconstruction") == {
        "method": "lines, perceptual distance (probe)",
        "phase": "reconstruction",
        "features": ["probe"],
        "trained": to_dict(lmm, resources=False),
    }
    lmm = dataclasses.replace(lmm, phases={"reconstruction": first, "adversarial": second})
    assert lmm.models() == {"students/lmm/reconstruction": first, "students/lmm": second}
    alone = dataclasses.replace(lmm, phases=lmm.phases | {"adversarial": dataclasses.replace(second, iterations=0)})
    assert (list(alone.running), alone.iterations) == (["reconstruction"], 300)
    assert alone.models() == {"students/lmm": first}
    assert alone.needs() == Needs(pairs=True, features=("probe",))
    none = dataclasses.replace(alone, phases={"reconstruction": dataclasses.replace(first, iterations=0)})
    assert (none.running, none.iterations, none.needs()) == ({}, 0, Needs())


def test_the_first_student_is_the_main_one() -> None:
    recipe = RECIPES["digits"](0)
    assert recipe.main == recipe.students["lmm"]
    turned = dict(reversed(recipe.students.items()))
    assert dataclasses.replace(recipe, students=turned).main == recipe.students["sot"]


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
        for phase in student.phases.values():
            if isinstance(phase.objective, LinesMatchingConfig):
                how = phase.objective.sampling()
                assert how.num_steps == made.pairs.num_steps
                for text in (*made.few_steps, *made.sweep.schedules, *made.evaluate.steps):
                    how.sigmas(parse_steps(text))
                assert (how.line, how.rule) in {("ve", "same_noise"), ("lerp", "line")}
