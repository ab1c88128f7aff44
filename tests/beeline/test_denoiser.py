"""EDM preconditioning, labels and the teacher's training loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from beeline.denoiser import Denoiser
from beeline.labels import as_one_hot
from beeline.objectives.edm import edm_loss


class Recorder(nn.Module):
    """A raw network that records its arguments and returns a constant."""

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None, augment: None) -> torch.Tensor:
        self.seen = x, c_noise, labels
        return torch.full_like(x, 0.25)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_preconditioning_formulas(sigma: float) -> None:
    network = Recorder()
    model = Denoiser(network, img_resolution=4, img_channels=1, label_dim=0)
    x = torch.randn(3, 1, 4, 4)
    denoised = model(x, torch.tensor(sigma))
    total = math.sqrt(sigma**2 + 0.25)
    seen, c_noise, labels = network.seen
    torch.testing.assert_close(seen, x / total)
    torch.testing.assert_close(c_noise, torch.full((3,), math.log(sigma) / 4))
    assert labels is None
    torch.testing.assert_close(denoised, 0.25 / total**2 * x + sigma * 0.5 / total * 0.25)


def test_sigma_per_image_equals_one_by_one(make_denoiser: Callable[..., Denoiser]) -> None:
    model, x, sigma = make_denoiser(), torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    single = torch.cat([model(x[i : i + 1], sigma[i]) for i in range(3)])
    torch.testing.assert_close(model(x, sigma), single, rtol=1e-4, atol=1e-5)
    assert model(x.double(), sigma.double()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_class_indices_equal_one_hot_and_matter(make_denoiser: Callable[..., Denoiser], kind: str) -> None:
    model, x, sigma = make_denoiser(kind=kind, label_dim=5), torch.randn(3, 2, 8, 8), torch.ones(3)
    indices = torch.tensor([0, 4, 2])
    by_index = model(x, sigma, indices)
    assert (by_index == model(x, sigma, torch.eye(5)[indices])).all()
    assert not torch.allclose(by_index, model(x, sigma, torch.tensor([1, 1, 1])))


@pytest.mark.parametrize(
    ("label_dim", "labels", "message"),
    [
        (5, None, "conditional on 5 classes"),
        (5, torch.zeros(3, dtype=torch.int64), "expected"),
        (5, torch.zeros(2, 4), "expected"),
        (0, torch.zeros(2, dtype=torch.int64), "unconditional"),
    ],
)
def test_wrong_labels_are_refused(
    make_denoiser: Callable[..., Denoiser], label_dim: int, labels: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_denoiser(label_dim=label_dim)(torch.zeros(2, 2, 8, 8), torch.ones(2), labels)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 3, 8, 8), (1, 2, 16, 16), (1, 2, 8, 4), (1, 1, 2, 8, 8)])
def test_wrong_image_shapes_are_refused(make_denoiser: Callable[..., Denoiser], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(B, 2, 8, 8\)"):
        make_denoiser()(torch.zeros(shape), torch.ones(shape[0]))


def test_one_hot_is_float32() -> None:
    one_hot = as_one_hot(torch.tensor([2, 0]), 3, 2, torch.device("cpu"))
    assert one_hot is not None
    assert one_hot.dtype == torch.float32
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0]]


class Offset(nn.Module):
    """A denoiser that is off by a constant everywhere, and records its inputs."""

    def __init__(self, clean: torch.Tensor, offset: float) -> None:
        super().__init__()
        self.clean, self.offset = clean, offset

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None, augment: None) -> torch.Tensor:
        self.x, self.sigma, self.labels = x, sigma, labels
        return self.clean + self.offset


def test_edm_loss_weight_and_levels() -> None:
    images, labels = torch.rand(4000, 1, 2, 2) * 2 - 1, torch.zeros(4000, dtype=torch.int64)
    denoiser = Offset(images, 0.1)
    loss = edm_loss(denoiser, images, labels, torch.Generator().manual_seed(0))
    sigma = denoiser.sigma.double()
    wanted = 0.01 * ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    assert float(sigma.log().mean()) == pytest.approx(-1.2, abs=0.08)
    assert float(sigma.log().std()) == pytest.approx(1.2, abs=0.08)
    unit = (denoiser.x - images) / denoiser.sigma[:, None, None, None]
    assert float(unit.std()) == pytest.approx(1, abs=0.03)
    assert denoiser.labels is labels


def test_edm_loss_of_a_perfect_denoiser_is_zero() -> None:
    images = torch.rand(8, 1, 2, 2)
    assert float(edm_loss(Offset(images, 0.0), images, None)) == 0


def test_edm_loss_depends_on_the_generator() -> None:
    images = torch.rand(8, 1, 2, 2)
    losses = [float(edm_loss(Offset(images, 1.0), images, None, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_a_noise_level_that_is_none_is_refused(make_denoiser, sigma: float) -> None:
    with pytest.raises(ValueError, match=r"sigma lies in .*finite noise levels above 0"):
        make_denoiser()(torch.zeros(2, 2, 8, 8), torch.tensor([1.0, sigma]))
