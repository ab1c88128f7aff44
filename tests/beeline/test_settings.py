"""Allowed values and error messages: configs within their ranges survive JSON, values outside are refused by name."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
from configs import restored
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from beeline.config import (
    ImagesConfig,
    NetworkConfig,
    PairsConfig,
    PoolConfig,
    ProbeNetworkConfig,
    StudentConfig,
    SweepConfig,
    VerifyConfig,
    from_dict,
)
from beeline.errors import BeelineError, SettingError
from beeline.networks.buildable import check_network, check_probe
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.recipes import RECIPES
from beeline.sampling.few_step import FewStep, Registered, RuleName
from beeline.settings import (
    MAX_SEED,
    Count,
    Divisible,
    Gpus,
    IndexList,
    Matching,
    ModelPath,
    Name,
    NameOrNone,
    NotEmpty,
    OneOf,
    Range,
    RayShare,
    Schedule,
    Seed,
    Settings,
    Some,
    StepList,
    allowed,
    check,
    described,
    naming_options,
)
from evaluation.toy.flows import ToyConfig
from evaluation.toy.transport import OtConfig


def configs(value: Any) -> Iterator[Settings]:
    """List the configs inside a recipe, without the recipe itself."""
    if isinstance(value, dict):
        for item in value.values():
            yield from configs(item)
    elif isinstance(value, Settings):
        yield value
        for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
            yield from configs(getattr(value, field.name))


EVERY = [*configs(RECIPES["digits"](0)), *configs(RECIPES["cifar10"](0)), VerifyConfig(), ToyConfig(), OtConfig()]
EVERY.append(FewStep(num_steps=18, trained_steps=(0, 8)))
KINDS = list({type(config): config for config in EVERY if not hasattr(config, "students")}.values())
FIELDS = [
    (config, name, hint)
    for config in KINDS
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items()
    if not isinstance(getattr(config, name), Settings)
]


def good(hint: Any) -> st.SearchStrategy[Any]:
    """Draw values that a type allows."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, conditions = parts[0], parts[1:]
        ranges = [part for part in conditions if isinstance(part, Range)]
        if base is int and ranges:
            made: st.SearchStrategy[Any] = st.integers(
                max(math.ceil(part.low) for part in ranges), min(math.floor(part.high) for part in ranges)
            )
            for part in conditions:
                if isinstance(part, Divisible):
                    made = made.map(lambda value, by=part.by: max(value // by, 1) * by)
        elif base is float and ranges:
            made = st.floats(max(part.low for part in ranges), min(part.high for part in ranges))
        elif conditions == (OneOf((1, 3)),):
            made = st.sampled_from([1, 3])
        elif any(isinstance(part, Schedule) for part in conditions):
            made = st.sets(st.integers(1, 9999), max_size=4).map(lambda steps: ",".join(map(str, [0, *sorted(steps)])))
            if allowed("0,0.5", hint):
                levels = st.floats(0.01, 79).map(lambda level: f"{level:.3f}")
                made = made | st.tuples(made, levels).map(",".join)
        elif any(isinstance(part, Registered) for part in conditions):
            made = st.sampled_from(["line", "same_noise", "fresh_noise", "gamma 0", "gamma 1", "gamma 0.25"])
        elif any(isinstance(part, Matching) for part in conditions):
            pattern = next(part.pattern for part in conditions if isinstance(part, Matching))
            made = st.from_regex(pattern, fullmatch=True)
        else:
            made = good(base)
        return made.filter(lambda value: allowed(value, hint))
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(good(part) for part in parts))
    if origin is tuple:
        return st.lists(good(parts[0]), max_size=4).map(tuple) if parts[-1] is ... else st.tuples(*map(good, parts))
    if origin is dict:
        return st.dictionaries(good(parts[0]), good(parts[1]), max_size=3)
    if isinstance(hint, type) and issubclass(hint, Settings):
        return st.sampled_from([config for config in EVERY if isinstance(config, hint)])
    return {bool: st.booleans(), str: st.text(max_size=9), int: st.integers(), type(None): st.none()}[hint]


def bad(hint: Any) -> st.SearchStrategy[Any]:
    """Draw values that a type does not allow: out of range, not finite, of another type, or a tuple with such an entry."""
    anything = [
        math.nan,
        math.inf,
        -math.inf,
        -1,
        -0.5,
        0,
        1.5,
        2**64,
        10**40,
        True,
        None,
        "",
        "x y",
        "../x",
        (),
        (math.nan,),
        [1],
    ]
    found = st.sampled_from(anything)
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if typing.get_origin(base) is tuple:
        entry = typing.get_args(base)[0]
        found = found | st.tuples(good(entry), bad(entry))
    if typing.get_origin(base) is dict:
        key, entry = typing.get_args(base)
        keys = bad(key).filter(lambda value: not isinstance(value, list))
        found = found | st.dictionaries(good(key), bad(entry), min_size=1) | st.dictionaries(keys, good(entry), min_size=1)
    return found.filter(lambda value: not allowed(value, hint))


@given(st.data())
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_a_config_within_its_ranges_survives_json(data: st.DataObject) -> None:
    config, name, hint = data.draw(st.sampled_from(FIELDS))
    value = data.draw(good(hint))
    try:
        made = replace(config, **{name: value})
    except SettingError:  # of several settings together
        return
    assert getattr(made, name) == value
    assert restored(made) == made


@given(st.data())
@hypothesis_settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_a_value_out_of_range_is_refused_by_name(data: st.DataObject) -> None:
    config, name, hint = data.draw(st.sampled_from([field for field in FIELDS if field[2] not in (bool, str)]))
    value = data.draw(bad(hint))
    with pytest.raises(SettingError) as refused:
        replace(config, **{name: value})
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:80]
    assert str(refused.value).startswith(f"{type(config).__name__}.{name} is {shown}")
    assert str(refused.value).endswith(f"; expected {described(hint)}")
    assert "\n" not in str(refused.value)


def test_every_number_of_every_config_has_a_range() -> None:
    for config in KINDS:
        for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
            for value in (math.nan, math.inf, 10**40, -(10**40), (math.nan,), (10**40,)):
                assert not allowed(value, hint), f"{type(config).__name__}.{name} takes {value}"


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, Count, True),
        (0, Count, False),
        (1.0, Count, False),
        (True, Count, False),
        ("1", Count, False),
        (0, Gpus, True),
        (0.25, Gpus, True),
        (2, Gpus, True),
        (1.5, Gpus, False),
        (0.00001, Gpus, False),
        (MAX_SEED, Seed, True),
        (MAX_SEED + 1, Seed, False),
        ("lmm", Name, True),
        ("ema-50", Name, True),
        ("a_b.c-1", Name, True),
        ("x" * 100, Name, True),
        ("x" * 101, Name, False),
        ("", Name, False),
        (".", Name, False),
        ("..", Name, False),
        (".x", Name, False),
        ("-x", Name, False),
        ("a/b", Name, False),
        ("a\\b", Name, False),
        ("a\n", Name, False),
        ("a\0", Name, False),
        ("é", Name, False),
        ("", NameOrNone, True),
        ("..", NameOrNone, False),
        ("teacher", ModelPath, True),
        ("students/lmm/ema-50", ModelPath, True),
        ("students/../x", ModelPath, False),
        ("students//x", ModelPath, False),
        ("/etc", ModelPath, False),
        ("students/", ModelPath, False),
        ("0,8", StepList, True),
        ("0", StepList, True),
        ("8,0", StepList, False),
        ("0,0", StepList, False),
        ("0,²", StepList, False),
        ("0, 8", StepList, False),
        ("", StepList, False),
        ("0,0.821", StepList, True),
        ("80.0", StepList, True),
        ("0,0.0", StepList, False),
        ("0,0.5,0.5", StepList, False),
        ("0,0.821", IndexList, False),
        ("0,8", IndexList, True),
        ("gamma 0.5", RuleName, True),
        ("gamma 0", RuleName, True),
        ("gamma 1", RuleName, True),
        ("gamma 1.5", RuleName, False),
        ("gamma 0.50", RuleName, False),
        ("gamma", RuleName, False),
        (("0",), Some[StepList], True),
        ((), Some[StepList], False),
        (["0"], Some[StepList], False),
        (1, Literal[1, 3], True),
        (True, Literal[1, 3], False),
    ],
)
def test_what_types_allow(value: object, hint: object, fits: bool) -> None:
    assert allowed(value, hint) is fits


def test_how_types_read() -> None:
    assert described(Count) == "a whole number from 1 to 1,000,000,000"
    assert described(Annotated[float, Range(0, 1, without="high")]) == "a number from 0, below 1"
    assert described(Gpus) == "a number from 0 to 1,024 whole or at most 1"
    assert described(Some[Count]) == "values, each a whole number from 1 to 1,000,000,000 (not empty)"
    assert described(tuple[Count, Count]) == "2 values, each a whole number from 1 to 1,000,000,000"
    assert described(Literal["a", "b"] | None) == "'a' or 'b' or None"
    assert {str(NotEmpty()), str(RayShare())} == {"(not empty)", "whole or at most 1"}


def test_a_long_value_is_cut() -> None:
    with pytest.raises(SettingError) as refused:
        check("--name", "x" * 300, Name)
    assert str(refused.value).startswith(f"--name is '{'x' * 79}...; expected text of letters")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs.count", "0"], "--pairs.count is 0"),
        (["--pairs.count=0"], "--pairs.count is 0"),
        (["--evaluate.count", "5", "--pairs.count", "0"], "--pairs.count is 0"),
        (["--evaluate.count", "5", "--pairs.count", "00"], "--pairs.count is 0"),
        (["--a.count", "x", "--b.count", "y"], "--a.count or --b.count is 0"),
        (["--recount", "0"], "PairsConfig.count is 0"),
        ([], "PairsConfig.count is 0"),
    ],
)
def test_a_command_names_its_option(words: list[str], message: str) -> None:
    with pytest.raises(SettingError) as refused, naming_options(words):
        replace(RECIPES["digits"](0).pairs, count=0)
    assert str(refused.value) == f"{message}; expected a whole number from 1 to 1,000,000,000"


def test_settings_that_do_not_go_together() -> None:
    recipe = RECIPES["digits"](0)
    network, lmm = recipe.teacher.network, recipe.students["lmm"]
    lines = lmm.phases["reconstruction"].objective
    assert isinstance(lines, LinesMatchingConfig)
    with pytest.raises(
        SettingError, match=r"img_resolution is 28; expected a multiple of 8, because channel_mult \(1, 2, 2, 2\)"
    ):
        replace(network, img_resolution=28, channel_mult=(1, 2, 2, 2))
    assert replace(network, img_resolution=28, channel_mult=(1, 2, 2)).img_resolution == 28
    with pytest.raises(SettingError, match=r"strides is \(1,\); expected one for each of the widths"):
        ProbeNetworkConfig(widths=(4, 4), strides=(1,))
    with pytest.raises(SettingError, match="expected multiples of 4, because norm is on"):
        ProbeNetworkConfig(widths=(6,), strides=(1,))
    assert ProbeNetworkConfig(widths=(6,), strides=(1,), norm=False).widths == (6,)
    with pytest.raises(SettingError, match=r"PoolConfig\.max_actors is 2; expected at least min_actors, 3"):
        PoolConfig(min_actors=3)
    with pytest.raises(SettingError, match="count is 200001; expected at most 200,000, which is 100,000 shards of 2"):
        PairsConfig(count=200_001, shard_size=2)
    with pytest.raises(SettingError, match=r"steps is \(0, 18\); expected indices below num_steps, 18"):
        replace(lines, steps=(0, 18))
    assert replace(lines, steps=(0, 18), num_steps=19).steps == (0, 18)
    for line, rule in (("ve", "line"), ("lerp", "same_noise")):
        with pytest.raises(SettingError, match=f"rule is '{rule}'; expected a rule that follows the line '{line}'"):
            replace(lines, line=line, rule=rule)
        assert replace(lines, line=line, rule="fresh_noise").line == line
    assert replace(lines, line="ve", rule="same_noise").rule == "same_noise"
    for distance in ("lpips", "lpips_avg", "johnson"):
        with pytest.raises(SettingError, match="resize is 15; expected 16 or more, for VGG16"):
            replace(lines, distance=distance, resize=15)
        assert replace(lines, distance=distance, resize=16).resize == 16
    assert replace(lines, distance="probe", resize=15).resize == 15
    phase = lmm.phases["adversarial"]
    for name in ("best", "checkpoints", "samples", "tensorboard", "ema-50"):
        with pytest.raises(
            SettingError, match=r"phases is .* expected names other than best, checkpoints, pairs, samples, tensorboard"
        ):
            replace(lmm, phases={name: phase})
    assert list(replace(lmm, phases={"ema": phase}).phases) == ["ema"]
    with pytest.raises(SettingError, match=r"ema_half_lives is .* expected values that differ"):
        replace(lmm, ema_half_lives=(693.0, 693.0000001))
    with pytest.raises(SettingError, match="expected the lower bound, then the upper bound"):
        SweepConfig(learning_rates=(1e-3, 1e-4))
    with pytest.raises(SettingError, match=r"StudentConfig\.name is 'lmm'; expected 'other'"):
        replace(recipe, students={"other": lmm})


def test_partial_changes_in_python_pass() -> None:
    recipe = RECIPES["digits"](0)
    lmm = recipe.students["lmm"]
    none = replace(lmm.phases["reconstruction"], iterations=0)
    assert replace(lmm, phases={"reconstruction": none}).name == "lmm"  # what runs is train_lmm.py's to ask
    assert replace(lmm, phases={}).running == {}
    assert replace(none, objective=DistillationConfig(num_steps=1)).objective == DistillationConfig(num_steps=1)
    assert replace(recipe, images=ImagesConfig(resolution=32, channels=3)).images.channels == 3
    assert from_dict(PairsConfig, {"count": 5, "shard_size": 2}) == PairsConfig(count=5, shard_size=2)
    with pytest.raises(SettingError, match="solver is 'euler'; expected 'heun' or 'calibrated'"):
        from_dict(PairsConfig, {"count": 5, "shard_size": 2, "solver": "euler"})
    with pytest.raises(SettingError, match="rule is 'other'"):
        FewStep(num_steps=18, rule="other")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match=r"StudentConfig\.precision is 'fp64'"):
        replace(lmm, precision="fp64")
    assert issubclass(SettingError, BeelineError)
    assert not issubclass(SettingError, ValueError)  # tyro would print it in a box, with status 2
    assert isinstance(lmm, StudentConfig)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_channels": 36}, r"num_channels \(144\) must be divisible by num_groups \(32\)"),
        ({"kind": "adm", "model_channels": 224, "channel_mult": (1, 1)}, "shape"),  # three heads of 224 channels
        ({"model_channels": 4096, "channel_mult": (64, 64)}, "expected at most 10,000,000,000"),
    ],
)
def test_networks_that_cannot_be_built(changes: dict[str, Any], reason: str) -> None:
    network = replace(RECIPES["digits"](0).teacher.network, **changes)
    with pytest.raises(BeelineError, match=reason):
        check_network("teacher.network", network)


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("label_dim", [0, 3])
def test_networks_that_can(kind: Any, label_dim: int) -> None:
    network = NetworkConfig(
        kind=kind, img_resolution=8, img_channels=3, label_dim=label_dim, model_channels=64, channel_mult=(1, 2), num_blocks=1
    )
    check_network("teacher.network", network)
    check_probe("probe.losses", RECIPES["digits"](0).probe.losses, channels=3, num_classes=label_dim or 2)
