"""The learner's calls without gradients, and their dropout masks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from beeline.config import OptimizerConfig
from beeline.denoiser import Denoiser
from beeline.objectives.learner import Learner

SIGMA = torch.tensor([0.5, 1.0, 2.0, 4.0])


@pytest.fixture
def learner(make_denoiser: Callable[..., Denoiser]) -> Learner:
    model = copy.deepcopy(make_denoiser(dropout=0.5)).requires_grad_(True).train()
    return Learner(model, OptimizerConfig(lr=1e-3))


def images() -> torch.Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_target_has_the_mask_of_the_last_call(learner: Learner) -> None:
    """Equal inputs give equal outputs under dropout, once for each call, and two calls differ."""
    first = learner(images(), SIGMA)
    assert first.requires_grad
    for _ in range(2):
        target = learner.target(images(), SIGMA)
        assert not target.requires_grad
        assert torch.equal(target, first.detach())
    second = learner(images(), SIGMA)
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.equal(learner.target(images(), SIGMA), second.detach())


def test_a_targets_mask_may_be_that_of_another_network(learner: Learner) -> None:
    """`model` is called with the same mask if it drops out, and without any in eval mode."""
    outputs = learner(images(), SIGMA).detach()
    twin = copy.deepcopy(learner.model)
    assert torch.equal(learner.target(images(), SIGMA, model=twin), outputs)
    average = copy.deepcopy(learner.model).eval()
    with torch.no_grad():
        wanted = average(images(), SIGMA)
    assert torch.equal(learner.target(images(), SIGMA, model=average), wanted)
    assert not torch.allclose(wanted, outputs, atol=1e-2)


def test_a_target_draws_nothing(learner: Learner) -> None:
    """The stream of torch's generator goes on as if the target had not been computed: exact resume needs that."""
    streams = []
    for targets in (0, 2):
        torch.manual_seed(5)
        learner(images(), SIGMA)
        for _ in range(targets):
            learner.target(images(), SIGMA)
        streams.append(torch.rand(3))
    assert torch.equal(*streams)


def test_without_dropout_nothing_is_kept(make_denoiser: Callable[..., Denoiser]) -> None:
    learner = Learner(copy.deepcopy(make_denoiser()).requires_grad_(True).train(), OptimizerConfig(lr=1e-3))
    outputs = learner(images(), SIGMA)
    assert learner._dropout is None
    assert torch.equal(learner.target(images(), SIGMA), outputs.detach())


def test_a_target_before_any_call(learner: Learner) -> None:
    """It draws a mask like any other call."""
    one, other = (learner.target(images(), SIGMA) for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-2)


def test_targets_follow_the_precision(learner: Learner) -> None:
    half = Learner(learner.model, OptimizerConfig(lr=1e-3), precision="bf16")
    outputs = half(images(), SIGMA).detach()
    assert torch.equal(half.target(images(), SIGMA), outputs)
    torch.manual_seed(9)
    exact = learner(images(), SIGMA).detach()
    torch.manual_seed(9)
    rounded = half(images(), SIGMA).detach()
    assert 0 < float((exact - rounded).abs().max()) < 0.1
