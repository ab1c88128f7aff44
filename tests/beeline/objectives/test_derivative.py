"""Derivative of a denoiser along a path: forward mode and differences agree with float64 differences, for every network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beeline.checkpoint import build
from beeline.config import NetworkConfig, OptimizerConfig
from beeline.denoiser import Denoiser
from beeline.objectives.derivative import Derivative, rate
from beeline.objectives.learner import Learner

SMALL: dict[str, Any] = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 64, "channel_mult": (1, 2)}
SMALL |= {"num_blocks": 1, "attn_resolutions": (8, 4), "second_level": True}


def random_denoiser(kind: Any, dropout: float = 0.0) -> Denoiser:
    torch.manual_seed(0)
    model = build(NetworkConfig(kind=kind, dropout=dropout, **SMALL))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.03)
    return model


@pytest.mark.parametrize(
    ("kind", "derivative", "error"),
    [
        *((kind, "jvp", 1e-4) for kind in ("ddpmpp", "ncsnpp", "adm")),
        ("ddpmpp", "difference", 3e-3),
        ("adm", "difference", 3e-3),
        ("ncsnpp", "difference", 5e-2),
    ],
)
def test_it_is_the_derivative(kind: str, derivative: Derivative, error: float) -> None:
    """Compare with central differences of the raw network in float64, where a small step loses no precision."""
    model = random_denoiser(kind).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x, velocity = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    sigma, to = torch.tensor([0.1, 0.5, 4.0, 40.0]), torch.tensor([0.0, 0.1, 1.0, 40.0])
    x, velocity, labels = x * (1 + sigma).reshape(-1, 1, 1, 1), velocity * sigma.reshape(-1, 1, 1, 1), torch.arange(4)
    value, found = rate(model, x, sigma, labels, velocity, to=to, derivative=derivative)
    torch.testing.assert_close(value, model(x, sigma, labels, None, to).detach())
    assert not found.requires_grad
    exact = model.double()
    step, levels = 1e-5, sigma.double()

    def at(u: float) -> torch.Tensor:
        level = levels * torch.tensor(u, dtype=torch.float64).exp()
        shaped, total = level.reshape(-1, 1, 1, 1), (level**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
        moved = x.double() + u * velocity.double()
        one_hot = torch.nn.functional.one_hot(labels, 4).double()
        end = {"to": to.double().clamp_min(0.002).log() / 4}
        raw = exact.model(moved / total, level.log() / 4, one_hot, None, end)
        return 0.25 / total**2 * moved + 0.5 * shaped / total * raw

    with torch.no_grad():
        expected = ((at(step) - at(-step)) / (2 * step)).float()
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < error


def test_a_learner_has_it_in_its_precision() -> None:
    model = random_denoiser("ddpmpp")
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), torch.arange(2)
    velocity = x - model(x, sigma, labels).detach()
    exact = Learner(model, OptimizerConfig()).rate(x, sigma, labels, velocity, derivative="jvp")[1]
    rough = Learner(model, OptimizerConfig(), precision="bf16").rate(x, sigma, labels, velocity, derivative="jvp")[1]
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.05
    assert all(parameter.grad is None for parameter in model.parameters())


def test_differences_keep_one_mask() -> None:
    """All evaluations see the dropout mask of the learner's last call."""
    model = random_denoiser("ddpmpp", dropout=0.5).train()
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), torch.arange(2)
    learner = Learner(model, OptimizerConfig())
    output = learner(x, sigma, labels).detach()
    value, difference = learner.rate(x, sigma, labels, x)
    torch.testing.assert_close(value, output)
    ahead = learner.target(x + 0.01 * x, sigma * torch.tensor(0.01).exp(), labels)
    behind = learner.target(x - 0.01 * x, sigma * torch.tensor(-0.01).exp(), labels)
    torch.testing.assert_close(difference, (ahead - behind) / 0.02)
    saved = learner.rate(x, sigma, labels, x, value=output)
    assert saved[0] is output
    torch.testing.assert_close(saved[1], difference)


def test_the_path_of_a_gaussian_is_known() -> None:
    """Data N(0, s^2): D(x; sigma) = s^2 x / (s^2 + sigma^2), differentiated by hand."""

    class Gaussian(Denoiser):
        def forward(
            self,
            x: torch.Tensor,
            sigma: torch.Tensor,
            labels: Any = None,
            augment_labels: Any = None,
            to: Any = None,
            *_: Any,
            **__: Any,
        ) -> torch.Tensor:
            return 0.25 * x / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)

    model = Gaussian(torch.nn.Identity(), img_resolution=2, img_channels=1, label_dim=0)
    x, sigma = torch.randn(3, 1, 2, 2), torch.tensor([0.2, 1.0, 5.0])
    s = sigma.reshape(-1, 1, 1, 1)
    velocity = x - model(x, sigma)
    expected = 0.25 * velocity / (0.25 + s**2) - 0.5 * s**2 * x / (0.25 + s**2) ** 2
    for derivative in ("difference", "jvp"):
        torch.testing.assert_close(
            rate(model, x, sigma, None, velocity, derivative=derivative)[1], expected, rtol=1e-3, atol=1e-5
        )
