"""Operations of objectives, counted without data: everything that a method may ask of learners and context."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import pytest
import torch
from methods import ConsistencyConfig, JumpConfig, MatchingConfig
from torch.utils.flop_counter import FlopCounterMode

from beeline import counting
from beeline.checkpoint import build
from beeline.config import NetworkConfig, OptimizerConfig, ProbeNetworkConfig
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.learner import Learner
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.sampling.solvers import ode_step

NETWORK = NetworkConfig(
    kind="ddpmpp", img_resolution=8, img_channels=1, label_dim=4, model_channels=64, channel_mult=(1, 2), num_blocks=1,
    attn_resolutions=(8,), dropout=0.1,
)  # fmt: skip
PROBE = ProbeNetworkConfig(widths=(4,), strides=(1,))
Part = Literal["student", "target", "average", "slow", "teacher", "euler", "heun", "rate", "jvp", "frozen"]
EXTRA: dict[Part, float] = {
    "student": 3, "target": 1, "average": 1, "slow": 1, "teacher": 1, "euler": 1, "heun": 2, "rate": 3, "jvp": 3, "frozen": 2,
}  # fmt: skip
"""Evaluations of each part: a forward pass, twice as much for a backward pass, as much for one to the inputs alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartsConfig(ObjectiveConfig):
    """A step of the student, and the parts named."""

    parts: tuple[Part, ...] = ()
    second_level: bool = True

    def needs(self) -> Needs:
        return Needs(images=True, noise=True, models=("teacher",), second_level=self.second_level)

    def sampling(self) -> FewStep:
        return FewStep(num_steps=6)

    def about(self) -> str:
        return "parts"

    def build(self, context: Context) -> Parts:
        return Parts(self, context)


class Parts(Objective):
    def __init__(self, config: PartsConfig, context: Context) -> None:
        self.config, self.average, self.teacher = config, context.average, context.models["teacher"]
        self.slow = copy.deepcopy(context.average)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.real is not None
        x, labels = batch.real, batch.real_labels
        sigma = 0.1 + torch.rand(batch.size, generator=generator, device=x.device)
        ends = (None, sigma / 2) if self.config.second_level else ()
        to = sigma / 2 if self.config.second_level else None
        output = student(x, sigma, labels, *ends)
        wanted = torch.zeros_like(output)
        for part in self.config.parts:
            if part == "student":
                output = output + student(x, sigma, labels, *ends)
            elif part in ("target", "average", "slow"):
                model = None if part == "target" else getattr(self, part)
                wanted = wanted + student.target(x, sigma, labels, *ends, model=model)
            elif part == "teacher":
                wanted = wanted + self.teacher(x, sigma, labels).detach()
            elif part in ("euler", "heun"):
                wanted = wanted + ode_step(self.teacher, x, sigma, sigma / 2, labels, solver=part)
            elif part in ("rate", "jvp"):
                derivative = "difference" if part == "rate" else "jvp"
                value, slope = student.rate(x, sigma, labels, x, to=to, derivative=derivative)
                wanted = wanted + value + slope
            else:
                inputs = x.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(student.frozen(inputs, sigma, labels, *ends).sum(), inputs)
                wanted = wanted + gradient
        loss = l2(output, wanted).mean()
        (batch.weight * loss).backward()
        return {"loss": loss.detach()}


def counted(objective: ObjectiveConfig, network: NetworkConfig = NETWORK) -> float:
    return counting.step_evaluations(network, PROBE, objective)


@pytest.mark.parametrize("second_level", [False, True])
@pytest.mark.parametrize("part", EXTRA)
def test_each_part_costs_what_it_runs(part: Part, second_level: bool) -> None:
    alone = counted(PartsConfig(second_level=second_level))
    assert alone == pytest.approx(3, rel=0.03)  # the first layer needs no gradient for its input
    both = counted(PartsConfig(parts=(part,), second_level=second_level))
    assert both - alone == pytest.approx(EXTRA[part], rel=0.03)


@pytest.mark.parametrize("part", ["rate", "jvp"])
def test_derivatives_count_as_with_data(part: Part) -> None:
    """Forward-mode differentiation does not run without data, so its count is compared with a real one."""
    network = dataclasses.replace(NETWORK, dropout=0.0)
    config = PartsConfig(parts=(part,))
    model, teacher = build(dataclasses.replace(network, second_level=True)), build(network)
    teacher.eval().requires_grad_(False)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    objective = config.build(
        Context(image_shape=(1, 8, 8), num_classes=4, models={"teacher": teacher}, features={}, average=average)
    )
    x, labels = torch.randn(4, 1, 8, 8), torch.eye(4)
    batch = Batch(size=4, step=0, total=1, noise=x, labels=labels, real=x, real_labels=labels)
    with FlopCounterMode(display=False) as counter:
        objective.backward(Learner(model, OptimizerConfig()), None, batch, torch.Generator())
    wanted = counter.get_total_flops() / 4 / counting.evaluation(dataclasses.replace(network, second_level=True))
    assert counted(config) == pytest.approx(wanted, rel=0.01)


def test_published_methods_in_evaluations() -> None:
    """Distillation: one pass and its gradients. Consistency: the teacher and the target in addition. Distribution matching: in
    one step of five one pass with gradients, two scores; in the others one without, and the critic's."""
    assert counted(DistillationConfig(num_steps=6)) == pytest.approx(3, rel=0.03)
    assert counted(ConsistencyConfig()) == pytest.approx(5, rel=0.03)
    assert counted(MatchingConfig(every=5)) == pytest.approx((5 + 4 * 4) / 5, rel=0.03)
    assert counted(JumpConfig()) == pytest.approx(3, rel=0.03)


def test_unconditional_networks_and_dropout_make_no_difference() -> None:
    for network in (dataclasses.replace(NETWORK, label_dim=0), dataclasses.replace(NETWORK, dropout=0.0)):
        assert counted(PartsConfig(parts=("target", "heun")), network) == pytest.approx(6, rel=0.03)
