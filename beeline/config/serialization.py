"""Conversion of configs to and from JSON-ready dicts; fields that may change on resume."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from beeline.objectives import ObjectiveConfig

T = TypeVar("T")


def resource(default: Any) -> Any:
    """Declare a dataclass field that changes how work is done, not its result: workers, threads, logging intervals."""
    return dataclasses.field(default=default, metadata={"resource": True})


def to_dict(config: Any, *, resources: bool = True) -> dict[str, Any]:
    """Convert a config to a JSON-ready dict (tuples become lists); without `resources`, only fields that affect the result, and
    no `added` field with its default. An objective's settings also name their class, as "method"."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        left_out = field.metadata.get("resource") or (field.metadata.get("added") and value == field.default)
        if resources or not left_out:
            if dataclasses.is_dataclass(value):
                value = to_dict(value, resources=resources)
            elif isinstance(value, dict):
                value = {key: to_dict(item, resources=resources) for key, item in value.items()}
            values[field.name] = list(value) if isinstance(value, tuple) else value
    if isinstance(config, ObjectiveConfig):
        values = {"method": f"{type(config).__module__}:{type(config).__qualname__}", **values}
    return values


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Invert `to_dict`, for configs without objectives. Raises TypeError for an unknown or missing key."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = from_dict(typing.cast(type, hint), value)
        elif typing.get_origin(hint) is dict:
            value = {key: from_dict(typing.get_args(hint)[1], item) for key, item in value.items()}
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)
