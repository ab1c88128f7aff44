"""Steps that are noise levels, CTM's gamma sampling, and flow maps, whose network takes the level at which a jump ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from beeline.config import EvaluateConfig, from_dict, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError, SettingError
from beeline.files.layout import check_layout
from beeline.sampling import Sampling, generate
from beeline.sampling.few_step import FewStep, Step, few_step, parse_steps, rule_of, write_steps
from beeline.sampling.inference import prepare
from beeline.schedule import SIGMA_MIN, edm_sigmas
from beeline.settings import IndexList, StepList, allowed
from evaluation.results import FIGURE
from evaluation.samplings import samplings_of

LEVELS = edm_sigmas(18).tolist()
OWN = FewStep(num_steps=3, levels=(10.0, 1.0, 0.1), rule="fresh_noise")

indices = st.sets(st.integers(1, 9999), max_size=4).map(lambda found: (0, *sorted(found)))
levels = st.sets(st.integers(1, 10**12), min_size=1, max_size=4).map(
    lambda found: tuple(float(f"{part / 1e9:.9f}") for part in sorted(found, reverse=True))
)
schedules = st.one_of(indices, levels, st.tuples(indices, levels).map(lambda parts: (*parts[0], *parts[1])))
rules = st.sampled_from([None, "line", "fresh_noise", "gamma 0", "gamma 1", "gamma 0.5", "gamma 0.000000001"])


def kinds(steps: tuple[Step, ...]) -> list[type]:
    return [type(step) for step in steps]


@given(schedules, rules)
@hypothesis_settings(deadline=None)
def test_a_label_names_one_sampling(steps: tuple[Step, ...], rule: str | None) -> None:
    sampling = Sampling(steps=steps, rule=rule)
    again = Sampling.parse(sampling.label)
    assert (again, again.steps, again.rule, kinds(again.steps or ())) == (sampling, steps, rule, kinds(steps))
    assert parse_steps(write_steps(steps)) == steps
    assert allowed(write_steps(steps), StepList)
    assert allowed(write_steps(steps), IndexList) == (float not in kinds(steps))
    assert sampling.nfe == len(steps)
    assert set(sampling.slug) <= set("0123456789.-abcdefghijklmnopqrstuvwxyz_")


@given(st.lists(st.tuples(schedules, rules), min_size=2, max_size=2, unique=True))
@hypothesis_settings(deadline=None)
def test_different_samplings_have_different_files(pair: list[tuple[tuple[Step, ...], str | None]]) -> None:
    one, other = (Sampling(steps=steps, rule=rule) for steps, rule in pair)
    assert (one.slug == other.slug) == (one == other) == (one.label == other.label)


def test_a_level_is_not_an_index() -> None:
    """Python's 1 and 1.0 are equal and have the same hash; the samplings are not."""
    index, level = Sampling(steps=(0, 1)), Sampling(steps=(0, 1.0))
    assert index.steps == level.steps
    assert index != level
    assert len({index, level, Sampling(steps=(0, 1))}) == 2
    assert (index.label, level.label, level.slug) == ("0,1", "0,1.0", "0-1.0")
    config = EvaluateConfig(steps=("0,1", "0,1.0", "0,1.00", "00,1"))
    assert samplings_of(FewStep(num_steps=18), config, levels=None) == [index, level]


@pytest.mark.parametrize("label", ["0,0.8210", "0,1e-3", "0,.5", "0,5.", "0,-1.0", "0,0.5 ", "0,inf", "0,nan"])
def test_other_texts_are_no_labels(label: str) -> None:
    with pytest.raises(ValueError, match="is not the label of a sampling"):
        Sampling.parse(label)


@pytest.mark.parametrize(
    ("text", "steps"), [("0", (0,)), ("0,8", (0, 8)), ("0,0.821", (0, 0.821)), ("80.0,2.5,0.5", (80.0, 2.5, 0.5))]
)
def test_texts_of_steps(text: str, steps: tuple[Step, ...]) -> None:
    assert parse_steps(text) == steps
    assert kinds(parse_steps(text)) == kinds(steps)
    assert write_steps(steps) == text


@pytest.mark.parametrize("text", ["", "0,", "0, 1", "0.5.1", ".5", "5.", "1e-3", "-1", "0,²", "inf", "0," + "1" * 10])
def test_other_texts_are_no_steps(text: str) -> None:
    with pytest.raises(BeelineError, match="are not indices or noise levels"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("0,0.821", True),
        ("80.0,0.821", True),
        ("0,8,0.5", True),
        ("0,0.5,8", True),  # only the student's schedule tells
        ("0,0.5,0.5", False),
        ("0,0.5,2.0", False),
        ("0,0.0", False),
        ("8,0.5", False),
        ("0,9999", True),
        ("0,10000", False),
    ],
)
def test_schedules_in_settings(text: str, fits: bool) -> None:
    assert allowed(text, StepList) is fits


@pytest.mark.parametrize("how", [FewStep(num_steps=18, trained_steps=(0, 8)), OWN, FewStep(num_steps=18, rule="gamma 0.5")])
def test_it_survives_json(how: FewStep) -> None:
    assert from_dict(FewStep, json.loads(json.dumps(to_dict(how)))) == how


def test_floats_are_levels() -> None:
    how = FewStep(num_steps=18)
    assert how.sigmas(how.check([0, 0.821])) == [80.0, 0.821]
    assert how.check([80.0, 0.821]) == (80.0, 0.821)
    numpy: list[Any] = [np.int64(0), np.float64(1.0)]
    assert how.check(numpy) == (0, 1.0)
    assert kinds(how.check(numpy)) == [int, float]
    assert how.sigmas(how.check((0, 8, 0.5, 17))) == [80.0, LEVELS[8], 0.5, LEVELS[17]]
    assert OWN.sigmas(OWN.check((0, 2))) == [10.0, 0.1]
    assert OWN.check((10.0, 0.5)) == (10.0, 0.5)


@pytest.mark.parametrize(
    ("how", "steps", "message"),
    [
        *((FewStep(num_steps=18), steps, "must fall from pure noise, 0 or 80, and stay above 0") for steps in (
            (0.821,), (0, 0.5, 0.5), (0, 0.5, 2.0), (0, 0.5, 8), (0, 0.0), (0, -1.0), (0, math.nan), (0, math.inf), (math.nan,),
            (math.inf, 1.0), (81.0, 1.0), (0, 80.0),
        )),
        (FewStep(num_steps=18), (0, 0.5, 18), "step 18 is outside of the schedule's 18 levels"),
        (FewStep(num_steps=18), (-1, 0.5), "step -1 is outside"),
        (FewStep(num_steps=18), (), "must begin with 0"),
        (OWN, (80.0, 1.0), "must fall from pure noise, 0 or 10"),
        (OWN, (0, 3), "3 levels"),
        (FewStep(num_steps=18, trained_steps=(0, 1)), (0, 1.0), "has never seen level 1.0"),
        (FewStep(num_steps=18, trained_steps=(0, 1)), (0, 0.5), "has never seen level 0.5"),
    ],
)  # fmt: skip
def test_levels_that_a_student_does_not_take(how: FewStep, steps: tuple[Step, ...], message: str) -> None:
    with pytest.raises(BeelineError, match=message):
        how.check(steps)


def test_trained_levels_may_be_given_as_levels() -> None:
    how = FewStep(num_steps=18, trained_steps=(0, 8))
    assert how.check((80.0, LEVELS[8])) == (80.0, LEVELS[8])
    assert how.unseen((0, 3, 8, 0.5, 80.0)) == [3, 0.5]
    assert FewStep(num_steps=18).unseen((0, 3, 0.5)) == []
    assert replace(OWN, trained_steps=(0, 1)).unseen((0, 1.0, 0.1)) == [0.1]


@pytest.mark.parametrize("own", [(1.0,), (1.0, 2.0, 3.0), (3.0, 2.0, 2.0), (3.0, 2.0, 0.0), (3.0, math.nan, 1.0)])
def test_own_levels_fall(own: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match=r"FewStep\.levels is"):
        FewStep(num_steps=3, levels=own)


@pytest.mark.parametrize("name", ["gamma", "gamma ", "gamma 2", "gamma 1.5", "gamma -0.5", "gamma 0.50", "gamma 00", "gamma x"])
def test_rules_that_are_none(name: str) -> None:
    with pytest.raises(SettingError, match=r"FewStep\.rule is .* for example gamma 0\.5"):
        FewStep(num_steps=18, rule=name)


def noise(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def denoised(x: torch.Tensor, sigma: float, to: float | None = None) -> torch.Tensor:
    """A prediction that depends on all it is given."""
    return x / (1 + sigma) + (0.0 if to is None else 0.1 * to)


def moved(rule: str, sigma: float, following: float) -> torch.Tensor:
    return rule_of(rule)(denoised, noise(0), sigma, following, noise=noise(1), fresh=lambda: noise(2))


@pytest.mark.parametrize(("sigma", "following"), [(80.0, 0.821), (2.0, 0.5), (5.0, 0.0)])
def test_the_ends_of_gamma(sigma: float, following: float) -> None:
    """gamma 0 is "line", gamma 1 is "fresh_noise" up to sigma_min; both cost one prediction and end in it."""
    assert torch.equal(moved("gamma 0", sigma, following), moved("line", sigma, following))
    difference = following - max(following**2 - SIGMA_MIN**2, 0.0) ** 0.5
    torch.testing.assert_close(
        moved("gamma 1", sigma, following), moved("fresh_noise", sigma, following) + difference * noise(2)
    )
    assert difference < 1e-5
    if following == 0:
        assert torch.equal(moved("gamma 0.5", sigma, 0.0), denoised(noise(0), sigma, 0.0))


def test_gamma_between() -> None:
    """Algorithm 3 of CTM: jump to sqrt(1 - gamma^2) t, add noise of gamma t; the variances add up to t^2."""
    sigma, following, gamma = 3.0, 1.25, 0.6
    end = 1.0  # 0.8 * 1.25
    wanted = end / sigma * noise(0) + (1 - end / sigma) * denoised(noise(0), sigma, end) + 0.75 * noise(2)
    torch.testing.assert_close(moved("gamma 0.6", sigma, following), wanted)
    assert end**2 + (gamma * following) ** 2 == pytest.approx(following**2)


def student(make_denoiser: Callable[..., Denoiser], *, second_level: bool) -> Denoiser:
    """A student with random weights: a flow map that depends much on its second level, or an ordinary denoiser."""
    model = make_denoiser(img_channels=1, second_level=second_level)
    model.few_step = FewStep(num_steps=18)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if "map_to" in name else 1)
    return model


@pytest.fixture(scope="module", params=[True, False])
def map_of(make_denoiser: Callable[..., Denoiser], request: pytest.FixtureRequest) -> Denoiser:
    return student(make_denoiser, second_level=request.param)


@pytest.mark.parametrize("rule", ["line", "fresh_noise", "same_noise", "gamma 0.6"])
def test_jumps_of_flow_maps(map_of: Denoiser, rule: str) -> None:
    """A flow map is asked for the level at which each jump ends: that of the next step by "line", 0 by the rules that add noise
    to a prediction. Written out here; other students are never asked for a second level."""
    steps, sigmas = (0, 2.5), [80.0, 2.5, 0.0]
    how = FewStep(num_steps=18, rule=rule)
    images = few_step(map_of, noise(0).float(), None, steps=steps, how=how, fresh=lambda n: noise(5 + n).float())

    def g(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
        to = {"to": torch.full((len(x),), s)} if map_of.takes_second_level else {}
        return map_of(x.float(), torch.full((len(x),), t), None, **to).double()

    def jump(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
        return s / t * x + (1 - s / t) * g(x, t, s)

    start, fresh = 80.0 * noise(0).float().double(), noise(5).float().double()
    if rule == "line":
        x = jump(start, 80.0, 2.5)
    elif rule == "gamma 0.6":
        x = jump(start, 80.0, 2.0) + 1.5 * fresh
    else:
        spread = 2.5 if rule == "same_noise" else (2.5**2 - SIGMA_MIN**2) ** 0.5
        x = g(start, 80.0, 0.0) + spread * (noise(0).float().double() if rule == "same_noise" else fresh)
    torch.testing.assert_close(images, g(x, 2.5, sigmas[-1]).float(), rtol=1e-4, atol=1e-4)
    prepared = few_step(prepare(map_of), noise(0).float(), None, steps=steps, how=how, fresh=lambda n: noise(5 + n).float())
    torch.testing.assert_close(images, prepared, rtol=1e-4, atol=1e-3)


def test_the_second_level_matters(make_denoiser: Callable[..., Denoiser]) -> None:
    """The test above could not fail for a network that ignores it."""
    model = student(make_denoiser, second_level=True)
    ends = [model(noise(0).float(), torch.full((3,), 5.0), to=torch.full((3,), to)) for to in (0.0, 2.5)]
    assert float((ends[0] - ends[1]).abs().max()) > 5e-3  # 50 times the tolerance


def test_generate_by_another_rule(map_of: Denoiser) -> None:
    own = generate(map_of, 4, seed=3, steps=(0, 2.5))
    assert torch.equal(generate(map_of, 4, seed=3, steps=(0, 2.5), rule="line"), own)
    assert torch.equal(generate(map_of, 4, seed=3, steps=(0, 2.5), rule="gamma 0"), own)
    for rule in ("gamma 0.5", "fresh_noise", "same_noise"):
        assert not torch.allclose(generate(map_of, 4, seed=3, steps=(0, 2.5), rule=rule), own, atol=1e-5)
    assert map_of.few_step == FewStep(num_steps=18)
    with pytest.raises(SettingError, match=r"FewStep\.rule is 'gamma 2'; expected"):
        generate(map_of, 1, steps=(0,), rule="gamma 2")
    model = prepare(map_of)
    model.few_step = FewStep(num_steps=18, trained_steps=(0,))
    with pytest.raises(BeelineError, match="never seen"):
        generate(model, 1, steps=(0, 2.5))


def test_solvers_have_no_rules(make_denoiser: Callable[..., Denoiser]) -> None:
    with pytest.raises(BeelineError, match="the rule 'line' was given, but this model is sampled by a solver"):
        generate(make_denoiser(), 1, rule="line")


def test_rows_of_figures_hold_levels() -> None:
    row = {
        "model": "m",
        "nfe": 2,
        "sampler": "0,0.821",
        "metric": "fid",
        "n": 1,
        "mean": 1.0,
        "std": 0.0,
        "min": 1.0,
        "draws": [],
    }
    for steps in ([0, 0.821], [0, 8], None):
        check_layout(json.loads(json.dumps(row | {"steps": steps})), FIGURE)
    with pytest.raises(ValueError, match="steps"):
        check_layout(row | {"steps": ["0"]}, FIGURE)
