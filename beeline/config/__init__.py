"""Settings of every stage, as frozen keyword-only dataclasses. A recipe (beeline/recipes) is a function that returns all of
them.

Fields made with `resource(...)` say how work is spread over machines and may change on resume. All other fields identify the
result: a run with another value refuses the existing artifact.
"""

from beeline.config.data import ImagesConfig, PairsConfig, PoolConfig, VerifyConfig
from beeline.config.evaluation import EvaluateConfig
from beeline.config.networks import NetworkConfig, ProbeNetworkConfig
from beeline.config.recipe import Recipe
from beeline.config.serialization import from_dict, resource, to_dict
from beeline.config.student import StudentConfig
from beeline.config.sweep import SweepConfig
from beeline.config.teacher import TeacherConfig
from beeline.config.training import PhaseConfig, ProbeConfig, TrainingConfig, WorkersConfig
from beeline.objectives.optimizer import OptimizerConfig

__all__ = [
    "EvaluateConfig",
    "ImagesConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PhaseConfig",
    "PoolConfig",
    "ProbeConfig",
    "ProbeNetworkConfig",
    "Recipe",
    "StudentConfig",
    "SweepConfig",
    "TeacherConfig",
    "TrainingConfig",
    "VerifyConfig",
    "WorkersConfig",
    "from_dict",
    "resource",
    "to_dict",
]
